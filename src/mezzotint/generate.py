"""Seeds to images: image i is a function of its own seed, label and settings, whatever it is batched with."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mezzotint import draws, prompts
from mezzotint.backbones import needs_label
from mezzotint.models import load_model, schedule_of
from mezzotint.process import guidance as guide
from mezzotint.process import samplers
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, Level, Model, Schedule
from mezzotint.process.samplers import Grid, grids
from mezzotint.process.schedules import Table, invert
from mezzotint.ranks import own_device
from mezzotint.registry import Spec, checked_options, nearest

CLIPS: dict[str, Callable[..., Denoiser]] = {"static": guide.clipped, "dynamic": guide.dynamically_clipped}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly to guide, and where. Exactly one of the three scales is given, each its own paper's number.

    dit_s: guess = weak + s (strong - weak), of DiT, DiffiT, EDM2 and autoguidance; 1 is none.
    simple_diffusion_w: guess = (1 + w) cond - w uncond; 0 is none.
    dimr_s: guess = cond + s (cond - uncond); 0 is none.
    low, high: natural log-SNRs between which guidance acts, `low` the noisier.
    power: of the power-cosine, which rises from no guidance at pure noise to the scale at the clean end; None is
        constant.
    time: what the power-cosine runs over: "u" (None too) is the schedule's own, a table's n / N, as DiMR has it;
        "index" is a table's (n - 1) / N, as DiffiT has it.
    channels: how many leading channels are guided; None is all.
    """

    dit_s: float | None = None
    simple_diffusion_w: float | None = None
    dimr_s: float | None = None
    low: float | None = None
    high: float | None = None
    power: float | None = None
    time: str | None = None
    channels: int | None = None

    def __post_init__(self):
        given = [n for n in ("dit_s", "simple_diffusion_w", "dimr_s") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"guidance needs one of dit_s, simple_diffusion_w and dimr_s; given: {given or 'none'}")
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval needs both ends, low and high, as log-SNRs")
        if not math.isfinite(self.peak):
            raise ValueError(f"guidance {self.peak} must be a finite number; 1 is none as DiT counts it")
        if self.time not in (None, "u", "index") or (self.time is not None and self.power is None):
            raise ValueError(f"time {self.time!r} must be u or index, and belongs to a power-cosine (power=4)")

    @property
    def peak(self) -> float:
        """The scale in DiT's unit; the power-cosine's largest."""
        if self.dit_s is not None:
            return self.dit_s
        if self.simple_diffusion_w is not None:
            return 1 + self.simple_diffusion_w
        assert self.dimr_s is not None
        return 1 + self.dimr_s


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to sample.

    sampler, grid: registered names with options; grid None is Karras' for Heun's sampler and for EDM's log-normal
        schedule, even in u otherwise. steps: intervals of the grid.
    guidance: None is none.
    clip: "static" (low=-1, high=1) or "dynamic" (quantile=0.995) clipping of the denoised image after guidance; None
        is none.
    size: (height, width) of the network's input; None is its native size.
    batch: images per network call; with `exact` it changes speed and memory only.
    exact: evaluate the network in tiles of one size, for the same bytes at every batch size. None: on the CPU.
    dtype: of the network's arithmetic, "float32", "bfloat16" or "float16"; the solver's is always float32.
    """

    sampler: Spec = field(default_factory=lambda: Spec("ddim"))
    grid: Spec | None = None
    steps: int = 50
    guidance: Guidance | None = None
    clip: Spec | None = None
    size: tuple[int, int] | None = None
    batch: int = 64
    exact: bool | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size {self.size} must be positive")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; {nearest(self.dtype, DTYPES)}")
        if self.clip is not None and self.clip.name not in CLIPS:
            raise ValueError(f"unknown clipping {self.clip.name!r}; {nearest(self.clip.name, CLIPS)}")


def sample(
    model: Model,
    seeds: Sequence[int],
    label: int | str | Sequence[int | str] | Tensor | None = None,
    text: str | Sequence[str] | Tensor | None = None,
    sampler: str = "ddim",
    steps: int = 50,
    guidance: float | None = None,
    size: int | tuple[int, int] | None = None,
) -> Image:
    """Images from seeds.

    Args:
        model: in eval mode, on any device.
        seeds: one non-negative integer per image; an image depends on its own seed alone.
        label: class index or name of each image, or one for all; None is the null label (no class).
        text: one prompt for all or one per image, or token embeddings (b, t, d), for models that read text.
        sampler, steps: see `mezzotint.process.samplers`.
        guidance: classifier-free scale as DiT counts it; None or 1 is none.
        size: height and width of the network's input, one number for square.

    Returns:
        (len(seeds), c, h, w) float32, in [-1, 1] for pixel models; latents for latent models.

    Errors: ValueError for an unknown sampler, a label out of range, guidance of an unconditional model, a size that
        the network cannot take.
    """
    if not isinstance(model, Model):
        raise ValueError(f"{model!r} is no model; open one first: sample(load_model(folder_or_hub_name), ...)")
    square = (size, size) if isinstance(size, int) else size
    guided = None if guidance is None else Guidance(dit_s=guidance)
    settings = Settings(sampler=Spec(sampler), steps=steps, guidance=guided, size=square)
    cond = replace(text_of(model, text, len(seeds)), label=labels_of(model, label, len(seeds)))
    images = generate(model, list(seeds), cond, settings)
    return images.clamp(-1, 1) if model.card.codec == "pixels" else images


def text_of(model: Model, text: str | Sequence[str] | Tensor | None, count: int) -> Cond:
    """The text part of a condition for `count` images; ValueError for another number of prompts."""
    if text is None:
        return Cond()
    if isinstance(text, Tensor):
        return Cond(text=text, text_mask=torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))
    said = [text] * count if isinstance(text, str) else list(text)
    if len(said) != count:
        raise ValueError(f"{len(said)} prompts for {count} seeds; give one prompt, or one per seed")
    return prompts.read(model, said)


def labels_of(model: Model, label: int | str | Sequence[int | str] | Tensor | None, count: int) -> Tensor | None:
    """Labels, by index or name, as a (count,) tensor, checked against the model's classes."""
    classes = model.card.config.num_classes
    if label is None:
        if needs_label(model.card.config):
            raise ValueError(f"this network has no null label: give labels, 0 to {classes - 1}")
        return None
    if not classes:
        raise ValueError("labels were given but this model is unconditional; leave label out")
    if not isinstance(label, int | Tensor):
        names = [label] if isinstance(label, str) else label
        label = [label_indices(model, [n])[0] if isinstance(n, str) else n for n in names]
    row = torch.as_tensor(label, dtype=torch.long, device="cpu").reshape(-1)
    row = row.expand(count) if len(row) == 1 else row
    if len(row) != count:
        raise ValueError(f"{len(row)} labels for {count} seeds; give one label, or one per seed")
    null = not needs_label(model.card.config)
    last = classes if null else classes - 1
    if len(row) and (row.min() < 0 or row.max() > last):
        raise ValueError(
            f"label {int(row.max() if row.max() > last else row.min())} is out of range: "
            f"0 to {classes - 1}" + (f", or {classes} for no class" if null else "")
        )
    return row


def default_grid(schedule: Schedule, name: str, sampler: str) -> Spec:
    """The grid when none is asked for; `name` is the schedule's."""
    # EDM samples where it was not trained evenly: Karras' grid (EDM eq. 5). Its sampler steps in sigma = exp(-logsnr /
    # 2), of which a grid even in u of a cosine would take nearly all, 1800 to 20, in its first step.
    if name == "lognormal" or sampler == "heun":
        return Spec("karras")
    # A table's noisy end is finite; a continuous schedule may be infinite at u = 1.
    ends = isinstance(schedule, Table) or bool(schedule(torch.ones((), dtype=torch.float64)).isfinite())
    return Spec("even") if ends else Spec("even", {"start": 0.999})


def grid_of(model: Model, settings: Settings) -> Tensor:
    """The rising log-SNRs at which the sampler stops."""
    schedule = schedule_of(model)
    spec = settings.grid or default_grid(schedule, model.card.schedule.name, settings.sampler.name)
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
            rows = torch.arange(start, start + size).clamp(max=len(z) - 1)
            there = rows.to(z.device)
            tiles.append(denoise(z[there], logsnr[rows.to(logsnr.device)], cond.map(lambda t, rows=there: t[rows])))
        x, eps, var = zip(*tiles, strict=True)
        learned = None if var[0] is None else torch.cat(var)[: len(z)]
        return Denoised(torch.cat(x)[: len(z)], torch.cat(eps)[: len(z)], learned)

    return each


def scale_of(guidance: Guidance, schedule: Schedule) -> guide.Scale:
    """The guidance scale as a function of log-SNR, in DiT's unit.

    Errors: ValueError for an interval outside the schedule, and for time "index" of a schedule that is no table.
    """
    scale = guide.dit_s(guidance.peak)
    if guidance.power is not None:
        scale = guide.power_cosine(guidance.peak, guidance.power, _time(guidance.time or "u", schedule))
    if guidance.low is None or guidance.high is None:
        return scale
    noisy, clean = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    if guidance.high < noisy or guidance.low > clean:
        raise ValueError(
            f"the guidance interval {guidance.low:g}...{guidance.high:g} lies outside the schedule, whose log-SNR runs "
            f"from {noisy:.4g} (noise) to {clean:.4g} (clean)"
        )
    return guide.interval(scale, guidance.low, guidance.high)


def _time(name: str, schedule: Schedule) -> Callable[[Tensor], Tensor]:
    if name == "u":
        return lambda logsnr: invert(schedule, logsnr)
    if not isinstance(schedule, Table):
        raise ValueError("time=index needs a discrete table (linear_ddpm, scaled_linear ...); leave it out for u")
    return lambda logsnr: schedule.index(logsnr) / len(schedule)


def in_dtype(denoise: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The denoiser with its matrix products in another dtype (autocast)."""

    def cast(z: Image, logsnr: Level, cond: Cond) -> Denoised:
        with torch.autocast(z.device.type, dtype):
            return denoise(z, logsnr, cond)

    return cast


def chain(strong: Denoiser, model: Model, settings: Settings, weak: Denoiser | None = None) -> Denoiser:
    """The network as a sampler sees it: guided, then clipped.

    Args:
        strong: evaluates `model`, whose card says what classes and schedule it has.
        weak: guides in place of the empty condition (autoguidance).
    """
    g, denoise = settings.guidance, strong
    if weak is not None and g is None:
        raise ValueError("a guide needs a guidance scale, e.g. dit_s=1.5")
    if g is not None and g.peak != 1:
        scale, channels = scale_of(g, schedule_of(model)), model.card.config.channels
        if g.channels is not None and not 1 <= g.channels <= channels:
            raise ValueError(f"{g.channels} guided channels; this model has {channels}")
        if weak is None:
            denoise = guide.classifier_free(denoise, prompts.null_of(model), scale, g.channels)
        elif g.channels is not None:
            raise ValueError("autoguidance guides all channels; leave channels out")
        else:
            denoise = guide.autoguidance(denoise, weak, scale)
    if settings.clip is not None:
        clip = CLIPS[settings.clip.name]
        denoise = clip(denoise, **checked_options(f"clipping {settings.clip.name}", clip, settings.clip.options))
    return denoise


def network(model: Model, settings: Settings) -> Denoiser:
    """The model as `settings` want it evaluated: in tiles and in its dtype."""
    exact = next(model.parameters()).device.type == "cpu" if settings.exact is None else settings.exact
    denoise: Denoiser = tiled(model) if exact else model
    return denoise if settings.dtype == "float32" else in_dtype(denoise, DTYPES[settings.dtype])


def run_of(settings: Settings) -> samplers.Sampler:
    """The sampler with its options: (denoiser, z, grid, cond, noise=...) -> image, `noise` for stochastic ones."""
    run = samplers.registry[settings.sampler.name]
    options = checked_options(f"sampler {settings.sampler.name}", run, settings.sampler.options)
    return functools.partial(run, **options)


def network_calls(model: Model, settings: Settings, autoguided: bool = False) -> int:
    """Forward passes per image, both passes of guidance counted, by running the sampler around an empty network."""

    def empty(z: Image, logsnr: Level, cond: Cond) -> Denoised:
        return Denoised(
            torch.zeros_like(z), z, torch.zeros_like(z) if model.parameterisation.learned_variance else None
        )

    counted = guide.Counted(empty)
    denoise = chain(counted, model, settings, counted if autoguided else None)
    z = torch.zeros(1, model.card.config.channels, 1, 1)
    run_of(settings)(denoise, z, grid_of(model, settings), prompts.blank(model, 1))
    return counted.rows


def start_noise(model: Model, seeds: Sequence[int], settings: Settings) -> Image:
    """The standard normal noise from which each seed starts, (len(seeds), c, h, w) on the model's device."""
    config = model.card.config
    height, width = settings.size or (config.size, config.size)
    noise = draws.normal("sample", 0, list(seeds), (config.channels, height, width))
    return noise.to(next(model.parameters()).device)


@torch.no_grad()
def integrate(
    model: Model,
    z: Image,
    stops: Grid,
    seeds: Sequence[int],
    cond: Cond,
    settings: Settings,
    weak: Model | None = None,
    around: Callable[[Denoiser], Denoiser] | None = None,
) -> Image:
    """One batch from the state z at stops[0] through the sampler.

    Args:
        z: (b, c, h, w) on the model's device.
        stops: rising log-SNRs, of `grid_of` or one's own.
        seeds: of the sampler's own noise, one per image.
        weak: guides in place of the empty condition.
        around: wraps the guided and clipped denoiser once more.
    """
    denoise = chain(network(model, settings), model, settings, weak and network(weak, settings))
    run, numbers = run_of(settings), list(seeds)

    def noise(i: int, z: Image) -> Image:
        return draws.normal("sampler", 0, numbers, tuple(z.shape[1:]), draw=i).to(z)

    if "noise" in inspect.signature(run).parameters:
        run = functools.partial(run, noise=noise)
    return run(denoise if around is None else around(denoise), z, stops, cond.map(lambda t: t.to(z.device)))


def generate(model: Model, seeds: Sequence[int], cond: Cond, settings: Settings, weak: Model | None = None) -> Image:
    """Images from seeds under `settings`; see `sample`. `cond` holds one row per seed, on any device.

    weak: a weaker model to guide away from, in place of the empty condition (autoguidance).
    """
    stops = grid_of(model, settings)
    images = [start_noise(model, (), settings)]
    for start in range(0, len(seeds), settings.batch):
        part = slice(start, start + settings.batch)
        # At the grid's noisy end z is standard normal up to the image's trace, alpha(grid[0]).
        z = start_noise(model, seeds[part], settings)
        images.append(integrate(model, z, stops, seeds[part], cond.map(lambda t, p=part: t[p]), settings, weak))
    return torch.cat(images)


def open_model(source: str | Path) -> Model:
    """The averaged model of a run folder, a model folder, or a hub repository, in eval mode on the best device."""
    folder = Path(source)
    if not (folder / "model").exists() and any((folder / name).exists() for name in ("recipe.yaml", ".lock")):
        raise ValueError(f"{folder} is a run that has saved no model yet; the same train command goes on until it has")
    model = load_model(folder / "model" if (folder / "model").exists() else str(source))
    return model.eval().requires_grad_(False).to(own_device())


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
