"""A model as a diffusers pipeline: `mezzotint.sample` behind diffusers' calling convention.

The folders of `mezzotint export --to diffusers` import this module. The same seed gives the same
image as in mezzotint.
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
    """The pipeline's one component: a Model with the loading interface of diffusers."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: str, torch_dtype: torch.dtype | None = None) -> Network:
        """Load a folder of `save_model`; the weights become `torch_dtype`, by default float32."""
        return cls(load_model(folder).to(torch_dtype or torch.float32))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype


class MezzotintPipeline(DiffusionPipeline):
    """Seeds and class labels to images, by any sampler of mezzotint."""

    def __init__(self, network: Network):
        super().__init__()
        self.register_modules(network=network)

    def save_pretrained(self, save_directory: str | Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the folder again; diffusers' own method does not know the component."""
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
        """Generate images.

        Args:
            seeds: one per image, in place of diffusers' generator; an image depends on its own seed
                alone.
            label: class label of each image, or one for all; None is no class.
            num_inference_steps, sampler: see `mezzotint.sample`.
            guidance_scale: classifier-free scale in the convention of DiT and diffusers; None or 1
                is no guidance.
            size: height and width of the network's input; None is its native size.
            output_type: "pil"; "np" (b, h, w, c) or "pt" (b, c, h, w) in [0, 1]; "latent" is the
                output of `mezzotint.sample`, before the autoencoder and before rounding to 8 bits.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; choose pil, np, pt or latent")
        model: Model = self.network.model
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        samples = sample(
            model, seeds, label, None, sampler, num_inference_steps, guidance_scale, size
        )
        images: Any = samples if output_type == "latent" else self.decode(samples, output_type)
        return ImagePipelineOutput(images=images)

    def decode(self, samples: Tensor, output_type: str) -> Any:
        """Return the samples as `output_type`, decoded where the network works on latents."""
        name = self.network.model.info.codec
        decoder = open_codec(name, self.network.device)
        if name != "pixels":
            check_codec_fits(decoder, samples.shape[1], "this model")
        pixels = to_uint8(decoder.decode(samples.float())).cpu()
        if output_type == "pil":
            return [to_pil(image) for image in pixels]
        images = pixels.float() / 255
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).numpy()
