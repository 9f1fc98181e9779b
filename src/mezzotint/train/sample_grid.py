"""The sample grids of a run: fixed seeds, fixed labels, one PNG per milestone."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from mezzotint.config import SampleGrid
from mezzotint.core.distributed import World
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data import autoencoder
from mezzotint.data.latent_dataset import Dataset
from mezzotint.data.transforms import to_uint8
from mezzotint.process.denoiser import Cond, Model
from mezzotint.sampling.protocols import parse_sampler
from mezzotint.sampling.sample import count_network_calls, generate
from mezzotint.sampling.settings import Guidance, SamplingSettings


def grid_labels(num_classes: int, count: int) -> torch.Tensor | None:
    """Labels of a grid, in class order, as even as the count allows; None for an unconditional network."""
    if not num_classes:
        return None
    return (
        torch.arange(count) * num_classes // count if count >= num_classes else torch.arange(count)
    )


@functools.lru_cache(maxsize=2)
def preview_codec(name: str, device: torch.device) -> autoencoder.Codec | None:
    """What shows latents while training: TAESD for Stable Diffusion's, since it is quick; None if none is at hand."""
    quick = autoencoder.if_cached("taesd", device) if name in autoencoder.SD_LATENTS else None
    return quick or autoencoder.if_cached(name, device)


def to_visible(images: torch.Tensor, codec: str) -> torch.Tensor:
    """Images in [-1, 1] of a network's output; where no decoder is on this machine, three channels of the latents."""
    space = preview_codec(codec, images.device)
    return images[:, :3] / 3 if space is None else space.decode(images)


def grid_settings(asked: SampleGrid) -> SamplingSettings:
    """How a grid is sampled; ValueError for an unknown sampler or option."""
    guided = None if asked.guidance is None else Guidance(dit_s=asked.guidance)
    try:
        return SamplingSettings(
            sampler=parse_sampler(asked.sampler), steps=asked.steps, guidance=guided
        )
    except ValueError as error:
        raise ValueError(f"samples.sampler={asked.sampler}: {error}") from None


def check_sample_grid(asked: SampleGrid, model: Model) -> None:
    """ValueError for what the first grid would fail with, by running the sampler around an empty network."""
    settings = grid_settings(asked)
    if asked.every_images and asked.count:
        try:
            count_network_calls(model, settings)
        except ValueError as error:
            raise ValueError(f"the grids cannot be sampled as samples.* asks: {error}") from None


def grid_path(folder: Path, images: int) -> Path:
    """The grid of a run's folder after so many images."""
    return folder / "samples" / f"{images:012d}.png"


def grid_samples(count: int, total: int) -> list[int]:
    """Evenly spaced samples of a set of `total` pictures; a grid shows their captions."""
    return [i * total // count for i in range(count)]


def save_sample_grid(
    model: Model,
    folder: Path,
    settings: SampleGrid,
    seed: int,
    world: World,
    images: Dataset | None = None,
) -> Path:
    """Sample the grid, every rank a share of it, and write samples/IMAGES.png.

    images: the set whose captions are asked for if it has embedded ones; they are listed in samples/captions.txt.
    """
    config = model.info.config
    labels = grid_labels(config.num_classes, settings.count)
    mine = list(range(world.rank, settings.count, world.size))
    cond = Cond() if labels is None else Cond(label=labels[mine])
    if images is not None and images.words is not None:
        shown = grid_samples(settings.count, len(images))
        text, mask = images.words.batch([shown[i] for i in mine])
        cond = replace(cond, text=text, text_mask=mask)
        if world.is_rank0:
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            lines = [" ".join((images.text(i) or "").split()) for i in shown]
            (folder / "samples" / "captions.txt").write_text(
                "".join(f"{line}\n" for line in lines), "utf-8"
            )
    made = generate(model, [seed + i for i in mine], cond, grid_settings(settings))
    pixels = to_uint8(to_visible(made, model.info.codec).cpu())
    shares = [(mine, pixels)]
    if world.size > 1:
        gathered: list = [None] * world.size
        dist.all_gather_object(gathered, (mine, pixels))
        shares = gathered
    path = grid_path(folder, model.info.images)
    if world.is_rank0:
        sheet = torch.empty(settings.count, *pixels.shape[1:], dtype=torch.uint8)
        for numbers, part in shares:
            sheet[numbers] = part
        names = model.info.labels
        captions = [names[i] for i in labels.tolist()] if names and labels is not None else None
        columns = settings.count // config.num_classes if labels is not None else None
        save_png(make_grid(sheet, columns=columns or None, captions=captions), path)
    return path
