"""A model as a diffusers pipeline: `mezzotint.sample` behind diffusers' calling convention.

The folders of `mezzotint export --to diffusers` import this module. The same seed gives the same
image as in mezzotint.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

from mezzotint.convert.export import save_diffusers
from mezzotint.core.image_grid import to_pil
from mezzotint.core.registry import suggest
from mezzotint.data.autoencoder import check_codec_fits, open_codec
from mezzotint.data.transforms import to_uint8
from mezzotint.models import load_model
from mezzotint.process.denoiser import Model
from mezzotint.sampling.conditioning import Labels, Seeds, list_items, list_seeds
from mezzotint.sampling.sample import sample

# Arguments of diffusers' pipelines that have another name or form here.
INSTEAD = {
    "seed": "seeds",
    "labels": "class_labels",
    "height": "size=(height, width)",
    "width": "size=(height, width)",
    "num_images_per_prompt": "batch_size",
    "num_images": "batch_size",
    "latents": "seeds, which decide the noise",
    "eta": "sampler, e.g. sampler='ancestral'",
    "scheduler": "sampler, e.g. sampler='dpmpp_2m'",
    "timesteps": "num_inference_steps",
    "negative_prompt": "guidance_scale; guidance is away from no prompt",
}


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

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[Any],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        **hub: Any,
    ) -> None:
        """Write the folder again; diffusers' own method does not know the component.

        Args:
            save_directory: the folder to write.
            safe_serialization, variant, use_flashpack: as diffusers calls it; only safetensors in
                one variant are written.
            max_shard_size: accepted and not needed, the weights are one file.
            push_to_hub: upload the folder afterwards; `hub` are arguments of `push_to_hub`, with
                the folder's name as the default of `repo_id`.

        Errors: ValueError for another format or variant, and arguments of `hub` without
            push_to_hub.
        """
        if not safe_serialization or variant is not None or use_flashpack:
            raise ValueError(
                "weights are written as safetensors, in one variant; leave out "
                "safe_serialization=False, variant and use_flashpack"
            )
        if hub and not push_to_hub:
            raise ValueError(f"{', '.join(hub)} without push_to_hub=True; leave out either")
        save_diffusers(self.network.model, Path(save_directory))
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)

    def __call__(
        self,
        seeds: Seeds | None = None,
        label: Labels | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        sampler: str = "ddim",
        size: int | tuple[int, int] | None = None,
        output_type: str = "pil",
        *,
        prompt: str | Sequence[str] | None = None,
        class_labels: Labels | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate images.

        Args:
            seeds: one per image; an image depends on its own seed alone. By default 0, 1, 2, ...
            label, class_labels: class label of each image, or one for all; None is no class. Two
                names of one argument.
            num_inference_steps, sampler: see `mezzotint.sample`.
            guidance_scale: classifier-free scale in the convention of DiT and diffusers; None or 1
                is no guidance.
            size: height and width of the network's input; None is its native size.
            output_type: "pil"; "np" (b, h, w, c) or "pt" (b, c, h, w) in [0, 1]; "latent" is the
                output of `mezzotint.sample`, before the autoencoder and before rounding to 8 bits.
            prompt: of each image, or one for all, for networks that read text.
            generator: draws a seed for each image, in place of `seeds`; a list has one per image.
            batch_size: number of images. By default as many as there are seeds, generators, labels
                or prompts; from one seed s they are s, s + 1, ...
            return_dict: False returns the tuple (images,).

        Errors: ValueError for counts that differ, for two names of one argument, and for any
            argument of another pipeline, with what to use instead.
        """
        if others:
            raise ValueError("; ".join(_advise(name) for name in others))
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"unknown output_type {output_type!r}; choose pil, np, pt or latent")
        if seeds is not None and generator is not None:
            raise ValueError("give seeds or generator, not both")
        if label is not None and class_labels is not None:
            raise ValueError("label and class_labels are one argument; give one of them")
        model: Model = self.network.model
        labels = label if label is not None else class_labels
        if labels is not None and not isinstance(labels, str):
            labels = list_items(labels)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be 1 or more")
        counts = [len(many) for many in (labels, prompt) if isinstance(many, list | tuple)]
        count = batch_size or max(counts, default=1)
        samples = sample(
            model,
            choose_seeds(seeds, generator, count, fixed=batch_size is not None),
            labels,
            prompt,
            sampler,
            num_inference_steps,
            1.0 if guidance_scale is None else guidance_scale,
            size,
        )
        images: Any = samples if output_type == "latent" else self.decode(samples, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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


def choose_seeds(
    seeds: Seeds | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    count: int,
    fixed: bool,
) -> list[int]:
    """Return the seed of each image.

    Args:
        count: number of images; with `fixed` an error where seeds or generators are of another
            number.
    """
    if isinstance(generator, torch.Generator):
        return list_seeds([generator] * count)
    given = list_seeds(generator if generator is not None else 0 if seeds is None else seeds)
    if len(given) == 1 and generator is None:
        return [given[0] + i for i in range(count)]
    if fixed and len(given) != count:
        raise ValueError(f"{len(given)} seeds or generators for a batch_size of {count}")
    return given


def _advise(name: str) -> str:
    """Return what to use instead of an argument of other pipelines."""
    if name in INSTEAD:
        return f"{name} is not an argument of this pipeline; use {INSTEAD[name]}"
    known = [k for k in inspect.signature(MezzotintPipeline.__call__).parameters if k != "others"]
    return f"{name} is not an argument of this pipeline; {suggest(name, known[1:])}"
