"""Sample grids of a run: the same seeds, labels and captions at every milestone, one PNG each."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch

from mezzotint.config import Evaluate, SampleGrid
from mezzotint.core.distributed import World, gather_to_rank0, raise_on_all_ranks
from mezzotint.core.files import atomic_write
from mezzotint.core.image_grid import class_captions, make_grid, save_png
from mezzotint.core.registry import Spec
from mezzotint.data import autoencoder
from mezzotint.data.dataset import Dataset
from mezzotint.data.transforms import to_uint8
from mezzotint.process.denoiser import Cond, Model
from mezzotint.sampling.parse import parse_sampler
from mezzotint.sampling.sample import count_network_calls, generate
from mezzotint.sampling.settings import Guidance, SamplingSettings


def grid_labels(num_classes: int, count: int) -> torch.Tensor | None:
    """Return a grid's labels in class order, as even as `count` allows; None without classes."""
    if not num_classes:
        return None
    positions = torch.arange(count)
    return positions * num_classes // count if count >= num_classes else positions


def spread_indices(count: int, total: int) -> list[int]:
    """Return `count` evenly spaced indices into a dataset of `total` images."""
    return [i * total // count for i in range(count)]


@functools.lru_cache(maxsize=2)
def preview_codec(name: str, device: torch.device) -> autoencoder.Codec | None:
    """Return a decoder for previews: TAESD, which is fast, for Stable Diffusion; else `name`.

    None where no decoder is in the cache; nothing is downloaded.
    """
    if name == "pixels":
        return autoencoder.open_codec(name, device)
    taesd = autoencoder.if_cached("taesd", device) if name in autoencoder.SD_LATENTS else None
    return taesd or autoencoder.if_cached(name, device)


def to_visible(images: torch.Tensor, codec: str) -> torch.Tensor:
    """Decode to images in [-1, 1]; without a decoder, return three channels of the latents."""
    decoder = preview_codec(codec, images.device)
    return images[:, :3] / 3 if decoder is None else decoder.decode(images)


def grid_settings(grid: SampleGrid) -> SamplingSettings:
    """Return the sampling settings of a grid; ValueError for an unknown sampler or option."""
    guidance = None if grid.guidance is None else Guidance(scale=grid.guidance)
    try:
        sampler = parse_sampler(grid.sampler)
        return SamplingSettings(
            sampler=sampler, steps=grid.steps, guidance=guidance, dtype=grid.dtype
        )
    except ValueError as error:
        raise ValueError(f"samples.sampler={grid.sampler}: {error}") from None


def check_sample_grid(grid: SampleGrid, model: Model) -> None:
    """Raise the ValueError that the first grid would fail with, by a dry run of the sampler."""
    settings = grid_settings(grid)
    if grid.every_images and grid.count:
        try:
            count_network_calls(model, settings)
        except ValueError as error:
            raise ValueError(f"samples.* cannot be sampled from this network: {error}") from None
    else:
        _check_options("samples", settings.sampler, grid.steps, model)


def check_evaluation_sampler(settings: Evaluate, model: Model) -> None:
    """Raise ValueError for an unknown sampler or an option out of range, used or not."""
    try:
        sampler = parse_sampler(settings.sampler)
    except ValueError as error:
        raise ValueError(f"evaluate.sampler={settings.sampler}: {error}") from None
    _check_options("evaluate", sampler, settings.steps, model)


def _check_options(name: str, sampler: Spec, steps: int, model: Model) -> None:
    """Raise ValueError where the sampler refuses its options; no options are always valid."""
    if not sampler.options:
        return
    try:
        count_network_calls(model, SamplingSettings(sampler=sampler, steps=steps))
    except ValueError as error:
        raise ValueError(f"{name}.sampler={sampler}: {error}") from None


def grid_path(folder: Path, images: int) -> Path:
    """Return the path of the grid at `images` seen in a run folder."""
    return folder / "samples" / f"{images:012d}.png"


def save_sample_grid(
    model: Model,
    folder: Path,
    grid: SampleGrid,
    seed: int,
    world: World,
    dataset: Dataset | None = None,
) -> Path:
    """Sample a grid, a share on every rank, and write samples/IMAGES.png.

    Sample i has seed `seed + i` and the i-th label of `grid_labels`.

    Args:
        dataset: where it has embedded captions, the grid shows evenly spaced ones, which are listed
            in samples/captions.txt.

    Returns: the path of the grid.

    Errors: FloatingPointError, on other ranks RankFailed, for samples that are not finite.
    """
    config = model.info.config
    labels = grid_labels(config.num_classes, grid.count)
    positions = list(range(world.rank, grid.count, world.size))
    cond = Cond() if labels is None else Cond(label=labels[positions])
    if dataset is not None and dataset.caption_embeddings is not None:
        shown = spread_indices(grid.count, len(dataset))
        text, mask = dataset.caption_embeddings.batch([shown[i] for i in positions])
        cond = replace(cond, text=text, text_mask=mask)
        if world.is_rank0:
            _write_captions(folder / "samples" / "captions.txt", dataset, shown)
    error, pixels = None, torch.empty(0)
    try:
        samples = generate(model, [seed + i for i in positions], cond, grid_settings(grid))
        pixels = to_uint8(to_visible(samples, model.info.codec).cpu())
    except FloatingPointError as failure:
        error = failure
    raise_on_all_ranks(error, world)
    path = grid_path(folder, model.info.images)
    shares = gather_to_rank0((positions, pixels))
    if shares is not None:
        images = torch.empty(grid.count, *pixels.shape[1:], dtype=torch.uint8)
        for rows, share in shares:
            images[rows] = share
        names = model.info.labels
        captions = class_captions(labels.tolist(), names) if names and labels is not None else None
        # One row per class where all classes are shown equally often.
        whole = config.num_classes > 1 and grid.count % config.num_classes == 0
        columns = grid.count // config.num_classes if whole else None
        save_png(make_grid(images, columns=columns or None, captions=captions), path)
    return path


def _write_captions(path: Path, dataset: Dataset, indices: list[int]) -> None:
    """Write the captions of these images, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join((dataset.text(i) or "").split()) for i in indices]
    atomic_write(path, "".join(f"{line}\n" for line in lines))
