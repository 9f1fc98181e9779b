"""Seeds to images: image i is a function of its own seed, label and settings, whatever it is batched with."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mezzotint import draws
from mezzotint.data.pixels import to_uint8
from mezzotint.models import load_model, schedule_of
from mezzotint.pictures import grid, save_png, to_pillow
from mezzotint.process import guidance as guide
from mezzotint.process import samplers
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, Level, Model, Schedule
from mezzotint.process.samplers import grids
from mezzotint.process.schedules import Table
from mezzotint.registry import Spec, checked_options, nearest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to sample.

    sampler, grid: registered names with options; grid None is the family's own: Karras' for EDM's log-normal
        schedule, even in u otherwise. steps: intervals of the grid.
    guidance: classifier-free scale as DiT counts it, uncond + guidance (cond - uncond); None or 1 is none.
    size: (height, width) of the network's input; None is its native size.
    batch: images per network call; with `exact` it changes speed and memory only.
    exact: evaluate the network in tiles of one size, for the same bytes at every batch size. None: on the CPU.
    """

    sampler: Spec = field(default_factory=lambda: Spec("ddim"))
    grid: Spec | None = None
    steps: int = 50
    guidance: float | None = None
    size: tuple[int, int] | None = None
    batch: int = 64
    exact: bool | None = None


def sample(
    model: Model,
    seeds: Sequence[int],
    label: int | Sequence[int] | Tensor | None = None,
    text: Tensor | None = None,
    sampler: str = "ddim",
    steps: int = 50,
    guidance: float | None = None,
    size: int | tuple[int, int] | None = None,
) -> Image:
    """Images from seeds.

    Args:
        model: in eval mode, on any device.
        seeds: one non-negative integer per image; an image depends on its own seed alone.
        label: class index of each image, or one for all; None is the null label (no class).
        text: token embeddings, one row per image, for models with text.
        sampler, steps: see `mezzotint.process.samplers`.
        guidance: classifier-free scale as DiT counts it; None or 1 is none.
        size: height and width of the network's input, one number for square.

    Returns:
        (len(seeds), c, h, w) float32, in [-1, 1] for pixel models; latents for latent models.

    Errors: ValueError for an unknown sampler, a label out of range, guidance of an unconditional model, a size that
        the network cannot take.
    """
    square = (size, size) if isinstance(size, int) else size
    settings = Settings(sampler=Spec(sampler), steps=steps, guidance=guidance, size=square)
    cond = Cond(label=labels_of(model, label, len(seeds)), text=text)
    return generate(model, list(seeds), cond, settings)


def labels_of(model: Model, label: int | Sequence[int] | Tensor | None, count: int) -> Tensor | None:
    """Labels as a (count,) tensor, checked against the model's classes."""
    if label is None:
        return None
    classes = model.card.config.num_classes
    if not classes:
        raise ValueError("labels were given but this model is unconditional; leave label out")
    row = torch.as_tensor(label, dtype=torch.long, device="cpu").reshape(-1)
    row = row.expand(count) if len(row) == 1 else row
    if len(row) != count:
        raise ValueError(f"{len(row)} labels for {count} seeds; give one label, or one per seed")
    if len(row) and (row.min() < 0 or row.max() > classes):
        raise ValueError(
            f"label {int(row.max() if row.max() > classes else row.min())} is out of range: "
            f"0 to {classes - 1}, or {classes} for no class"
        )
    return row


def default_grid(schedule: Schedule, name: str) -> Spec:
    """The grid a family is sampled on when none is asked for."""
    if name == "lognormal":  # EDM samples where it was not trained evenly: Karras' grid (EDM eq. 5)
        return Spec("karras")
    # A table's noisy end is finite; a continuous schedule may be infinite at u = 1.
    ends = isinstance(schedule, Table) or bool(schedule(torch.ones((), dtype=torch.float64)).isfinite())
    return Spec("even") if ends else Spec("even", {"start": 0.999})


def grid_of(model: Model, settings: Settings) -> Tensor:
    """The rising log-SNRs at which the sampler stops."""
    schedule = schedule_of(model)
    spec = settings.grid or default_grid(schedule, model.card.schedule.name)
    build = grids.registry[spec.name]
    return build(schedule, settings.steps, **checked_options(f"grid {spec.name}", build, spec.options))


TILE = 4  # images; larger is a little faster for many images and slower for one


def tiled(denoise: Denoiser, size: int = TILE) -> Denoiser:
    """The same denoiser called with exactly `size` images at a time, the last tile filled up by repetition.

    Matrix kernels choose their blocking, and with it their rounding, by the shape of the whole call; with one shape
    for every call an image's bytes do not depend on what it is batched with.
    """

    def each(z: Image, logsnr: Level, cond: Cond) -> Denoised:
        tiles = []
        for start in range(0, len(z), size):
            rows = torch.arange(start, start + size, device=z.device).clamp(max=len(z) - 1)
            tiles.append(denoise(z[rows], logsnr[rows], cond.map(lambda t, rows=rows: t[rows])))
        x, eps, var = zip(*tiles, strict=True)
        learned = None if var[0] is None else torch.cat(var)[: len(z)]
        return Denoised(torch.cat(x)[: len(z)], torch.cat(eps)[: len(z)], learned)

    return each


@torch.no_grad()
def generate(model: Model, seeds: list[int], cond: Cond, settings: Settings) -> Image:
    """Images from seeds under `settings`; see `sample`. `cond` holds one row per seed, on any device."""
    config = model.card.config
    height, width = settings.size or (config.size, config.size)
    run = samplers.registry[settings.sampler.name]
    options = checked_options(f"sampler {settings.sampler.name}", run, settings.sampler.options)
    stops = grid_of(model, settings)
    device = next(model.parameters()).device
    exact = device.type == "cpu" if settings.exact is None else settings.exact
    denoise: Denoiser = tiled(model) if exact else model
    if settings.guidance is not None:
        denoise = guide.classifier_free(denoise, guide.null_label(config.num_classes), guide.dit_s(settings.guidance))
    shape = (config.channels, height, width)
    images = []
    for start in range(0, len(seeds), settings.batch):
        part = slice(start, start + settings.batch)
        numbers = seeds[part]

        def noise(i: int, z: Image, numbers: list[int] = numbers) -> Image:
            return draws.normal("sampler", 0, numbers, tuple(z.shape[1:]), draw=i).to(z)

        if "noise" in inspect.signature(run).parameters:
            options = {**options, "noise": noise}
        # At the grid's noisy end z is standard normal up to the image's trace, alpha(grid[0]).
        z = draws.normal("sample", 0, numbers, shape).to(device)
        images.append(run(denoise, z, stops, cond.map(lambda t, p=part: t[p].to(device)), **options))
    return torch.cat(images) if images else torch.empty(0, *shape, device=device)


def open_model(source: str | Path) -> Model:
    """The averaged model of a run folder, a model folder, or a hub repository, in eval mode on the best device."""
    folder = Path(source)
    if (folder / "recipe.yaml").exists() and not (folder / "model").exists():
        raise ValueError(f"{folder} is a run that has saved no model yet; wait for its first checkpoint")
    model = load_model(folder / "model" if (folder / "model").exists() else str(source))
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def label_indices(model: Model, names: Sequence[str]) -> list[int]:
    """Class names or numbers as indices; ValueError lists near names."""
    known = model.card.labels or ()
    found = []
    for name in names:
        if name in known:
            found.append(known.index(name))
        elif name.isdigit():
            found.append(int(name))
        else:
            raise ValueError(
                f"unknown label {name!r}; {nearest(name, known) if known else 'this model has no label names'}"
            )
    return found


def default_labels(model: Model, count: int, chosen: Sequence[int] = ()) -> list[int] | None:
    """One label per image, the chosen ones (or all classes) in turn; None for an unconditional model."""
    classes = model.card.config.num_classes
    if not classes:
        if chosen:
            raise ValueError("labels were given but this model is unconditional; leave them out")
        return None
    turn = list(chosen) or list(range(classes))
    return [turn[i % len(turn)] for i in range(count)]


def sample_to(source: str, out: Path, settings: Settings, n: int, seed: int, labels: Sequence[str] = ()) -> Path:
    """Sample `n` images into one PNG grid (`out` ends in .png) or a folder with one PNG per image, seed by seed.

    Errors: ValueError as `sample`, and for n below 1 or an `out` that is neither.
    """
    if n < 1:
        raise ValueError(f"n {n}; ask for one image or more")
    if out.suffix not in ("", ".png"):
        raise ValueError(f"{out} is neither a .png nor a folder; end it in .png for one grid")
    model = open_model(source)
    chosen = default_labels(model, n, label_indices(model, labels))
    seeds = list(range(seed, seed + n))
    drawn = generate(model, seeds, Cond(label=labels_of(model, chosen, n)), settings)
    pixels = to_uint8(drawn.cpu())
    if out.suffix == ".png":
        names = model.card.labels
        captions = None if chosen is None else [names[i] if names else str(i) for i in chosen]
        save_png(grid(pixels, captions=captions), out)
        return out
    for number, image in zip(seeds, pixels, strict=True):
        save_png(to_pillow(image), out / f"{number:06d}.png")
    return out
