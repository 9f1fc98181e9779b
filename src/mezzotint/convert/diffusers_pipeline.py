"""A model as a diffusers pipeline. Imported by the folders of `mezzotint export --to diffusers`, when diffusers loads.

The pipeline is `mezzotint.sample` behind diffusers' calling convention: the same seed gives the same image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from mezzotint.convert.export import save_diffusers
from mezzotint.core.image_grid import to_pil
from mezzotint.data.autoencoder import check_codec_fits, open_codec
from mezzotint.data.transforms import to_uint8
from mezzotint.models import load_model
from mezzotint.process.denoiser import Model
from mezzotint.sampling.sample import sample


class Network(nn.Module):
    """The pipeline's one component: a Model, loaded and saved as diffusers asks its components to be."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> Network:
        """The model of a `save_model` folder; torch_dtype: of its weights, float32 by default."""
        return cls(load_model(folder).to(torch_dtype or torch.float32))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype


class MezzotintPipeline(DiffusionPipeline):
    """Seeds and labels to pictures, by any sampler of mezzotint."""

    def __init__(self, network: Network):
        super().__init__()
        self.register_modules(network=network)

    def save_pretrained(self, save_directory: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the folder again; diffusers' own would not know the component."""
        save_diffusers(self.network.model, Path(save_directory))

    def __call__(
        self,
        seeds: int | Sequence[int] = 0,
        label: int | Sequence[int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        sampler: str = "ddim",
        size: int | tuple[int, int] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Pictures.

        Args:
            seeds: one per picture, in place of diffusers' generator; a picture depends on its own seed alone.
            label: class index of each picture, or one for all; None is no class.
            num_inference_steps, sampler: see `mezzotint.sample`.
            guidance_scale: classifier-free scale as DiT and diffusers count it; None or 1 is none.
            size: height and width of the network's input; None is its native size.
            output_type: "pil"; "np" (b, h, w, c) or "pt" (b, c, h, w) in [0, 1]; "latent" is what `mezzotint.sample`
                gives, before an autoencoder and before rounding to 8 bits.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; pil, np, pt or latent")
        model: Model = self.network.model
        numbers = [seeds] if isinstance(seeds, int) else list(seeds)
        made = sample(
            model, numbers, label, None, sampler, num_inference_steps, guidance_scale, size
        )
        images: Any = made if output_type == "latent" else self.pictures(made, output_type)
        return ImagePipelineOutput(images=images)

    def pictures(self, made: Tensor, output_type: str) -> Any:
        """What the network made, decoded where it works in latents, as `output_type` asks."""
        name = self.network.model.info.codec
        decoder = open_codec(name, self.network.device)
        if name != "pixels":
            check_codec_fits(decoder, made.shape[1], "this model")
        pixels = to_uint8(decoder.decode(made.float())).cpu()
        if output_type == "pil":
            return [to_pil(image) for image in pixels]
        images = pixels.float() / 255
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()
