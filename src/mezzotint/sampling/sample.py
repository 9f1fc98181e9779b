"""Seeds to images: image i is a function of its own seed, label and settings, whatever it is batched with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mezzotint.core import rng
from mezzotint.core.registry import Spec, check_options
from mezzotint.models import get_schedule
from mezzotint.process import guidance as guide
from mezzotint.process import samplers
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, Model, PerImage, Schedule
from mezzotint.process.samplers import Grid, grids
from mezzotint.process.schedules import Table, invert
from mezzotint.sampling import conditioning
from mezzotint.sampling.conditioning import label_condition, text_condition
from mezzotint.sampling.settings import CLIPS, DTYPES, Guidance, SamplingSettings


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
        raise ValueError(
            f"{model!r} is no model; open one first: sample(load_model(folder_or_hub_name), ...)"
        )
    square = (size, size) if isinstance(size, int) else size
    guided = None if guidance is None else Guidance(scale=guidance)
    settings = SamplingSettings(sampler=Spec(sampler), steps=steps, guidance=guided, size=square)
    cond = replace(
        text_condition(model, text, len(seeds)), label=label_condition(model, label, len(seeds))
    )
    images = generate(model, list(seeds), cond, settings)
    return images.clamp(-1, 1) if model.info.codec == "pixels" else images


def default_discretization(schedule: Schedule, name: str, sampler: str) -> Spec:
    """The grid when none is asked for; `name` is the schedule's."""
    # EDM samples where it was not trained evenly: Karras' grid (EDM eq. 5). Its sampler steps in sigma = exp(-logsnr /
    # 2), of which a grid even in u of a cosine would take nearly all, 1800 to 20, in its first step.
    if name == "lognormal" or sampler == "heun":
        return Spec("karras")
    # A table's noisy end is finite; a continuous schedule may be infinite at u = 1.
    ends = isinstance(schedule, Table) or bool(
        schedule(torch.ones((), dtype=torch.float64)).isfinite()
    )
    return Spec("even") if ends else Spec("even", {"start": 0.999})


def make_logsnr_steps(model: Model, settings: SamplingSettings) -> Tensor:
    """The rising log-SNRs at which the sampler stops."""
    schedule = get_schedule(model)
    spec = settings.discretization or default_discretization(
        schedule, model.info.schedule.name, settings.sampler.name
    )
    build = grids.registry[spec.name]
    return build(
        schedule,
        settings.steps,
        **check_options(f"discretization {spec.name}", build, spec.options),
    )


TILE = 4  # images; larger is a little faster for many images and slower for one


def batched_by_tile(denoise: Denoiser, size: int = TILE) -> Denoiser:
    """The same denoiser called with exactly `size` images at a time, the last tile filled up by repetition.

    Matrix kernels choose their blocking, and with it their rounding, by the shape of the whole call; with one shape
    for every call an image's bytes do not depend on what it is batched with.
    """

    def each(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        tiles = []
        for start in range(0, len(z), size):
            rows = torch.arange(start, start + size).clamp(max=len(z) - 1)
            there = rows.to(z.device)
            tiles.append(
                denoise(
                    z[there],
                    logsnr[rows.to(logsnr.device)],
                    cond.map(lambda t, rows=there: t[rows]),
                )
            )
        x, eps, var = zip(*tiles, strict=True)
        learned = None if var[0] is None else torch.cat(var)[: len(z)]
        return Denoised(torch.cat(x)[: len(z)], torch.cat(eps)[: len(z)], learned)

    return each


def guidance_scale(guidance: Guidance, schedule: Schedule) -> guide.Scale:
    """The guidance scale as a function of log-SNR, in DiT's unit.

    Errors: ValueError for an interval outside the schedule, and for time "index" of a schedule that is no table.
    """
    scale = guide.dit_s(guidance.peak)
    if guidance.power is not None:
        scale = guide.power_cosine(
            guidance.peak, guidance.power, _time(guidance.time or "u", schedule)
        )
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
        raise ValueError(
            "time=index needs a discrete table (linear_ddpm, scaled_linear ...); leave it out for u"
        )
    return lambda logsnr: schedule.index(logsnr) / len(schedule)


def autocast_denoiser(denoise: Denoiser, dtype: torch.dtype) -> Denoiser:
    """The denoiser with its matrix products in another dtype (autocast)."""

    def cast(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        with torch.autocast(z.device.type, dtype):
            return denoise(z, logsnr, cond)

    return cast


def build_denoiser(
    strong: Denoiser, model: Model, settings: SamplingSettings, weak: Denoiser | None = None
) -> Denoiser:
    """The network as a sampler sees it: guided, then clipped.

    Args:
        strong: evaluates `model`, whose card says what classes and schedule it has.
        weak: guides in place of the empty condition (autoguidance).
    """
    g, denoise = settings.guidance, strong
    if weak is not None and g is None:
        raise ValueError("a guide needs a guidance scale, e.g. 1.5")
    if g is not None and g.peak != 1:
        scale, channels = guidance_scale(g, get_schedule(model)), model.info.config.channels
        if g.channels is not None and not 1 <= g.channels <= channels:
            raise ValueError(f"{g.channels} guided channels; this model has {channels}")
        if weak is None:
            denoise = guide.classifier_free(
                denoise, conditioning.null_condition(model), scale, g.channels
            )
        elif g.channels is not None:
            raise ValueError("autoguidance guides all channels; leave channels out")
        else:
            denoise = guide.autoguidance(denoise, weak, scale)
    if settings.clip is not None:
        clip = CLIPS[settings.clip.name]
        denoise = clip(
            denoise, **check_options(f"clipping {settings.clip.name}", clip, settings.clip.options)
        )
    return denoise


def model_denoiser(model: Model, settings: SamplingSettings) -> Denoiser:
    """The model as `settings` want it evaluated: in tiles and in its dtype."""
    exact = (
        next(model.parameters()).device.type == "cpu" if settings.exact is None else settings.exact
    )
    denoise: Denoiser = batched_by_tile(model) if exact else model
    return (
        denoise
        if settings.dtype == "float32"
        else autocast_denoiser(denoise, DTYPES[settings.dtype])
    )


def get_sampler(settings: SamplingSettings) -> samplers.Sampler:
    """The sampler with its options: (denoiser, z, grid, cond, noise=...) -> image, `noise` for stochastic ones."""
    run = samplers.registry[settings.sampler.name]
    options = check_options(f"sampler {settings.sampler.name}", run, settings.sampler.options)
    return functools.partial(run, **options)


def count_network_calls(model: Model, settings: SamplingSettings, autoguided: bool = False) -> int:
    """Forward passes per image, both passes of guidance counted, by running the sampler around an empty network."""

    def empty(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        return Denoised(
            torch.zeros_like(z),
            z,
            torch.zeros_like(z) if model.parameterisation.learned_variance else None,
        )

    counted = guide.CallCounter(empty)
    denoise = build_denoiser(counted, model, settings, counted if autoguided else None)
    z = torch.zeros(1, model.info.config.channels, 1, 1)
    get_sampler(settings)(
        denoise, z, make_logsnr_steps(model, settings), conditioning.empty_condition(model, 1)
    )
    return counted.rows


def draw_start_noise(model: Model, seeds: Sequence[int], settings: SamplingSettings) -> Image:
    """The standard normal noise from which each seed starts, (len(seeds), c, h, w) on the model's device."""
    config = model.info.config
    height, width = settings.size or (config.size, config.size)
    noise = rng.normal("sample", 0, list(seeds), (config.channels, height, width))
    return noise.to(next(model.parameters()).device)


@torch.no_grad()
def integrate(
    model: Model,
    z: Image,
    stops: Grid,
    seeds: Sequence[int],
    cond: Cond,
    settings: SamplingSettings,
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
    denoise = build_denoiser(
        model_denoiser(model, settings), model, settings, weak and model_denoiser(weak, settings)
    )
    run = get_sampler(settings)

    def noise(i: int, z: Image) -> Image:
        return rng.normal("sampler", 0, list(seeds), tuple(z.shape[1:]), draw=i).to(z)

    if "noise" in inspect.signature(run).parameters:
        run = functools.partial(run, noise=noise)
    return run(
        denoise if around is None else around(denoise), z, stops, cond.map(lambda t: t.to(z.device))
    )


def generate(
    model: Model,
    seeds: Sequence[int],
    cond: Cond,
    settings: SamplingSettings,
    weak: Model | None = None,
) -> Image:
    """Images from seeds under `settings`; see `sample`. `cond` holds one row per seed, on any device.

    weak: a weaker model to guide away from, in place of the empty condition (autoguidance).
    """
    stops = make_logsnr_steps(model, settings)
    images = [draw_start_noise(model, (), settings)]
    for start in range(0, len(seeds), settings.batch):
        part = slice(start, start + settings.batch)
        # At the grid's noisy end z is standard normal up to the image's trace, alpha(grid[0]).
        z = draw_start_noise(model, seeds[part], settings)
        images.append(
            integrate(
                model, z, stops, seeds[part], cond.map(lambda t, p=part: t[p]), settings, weak
            )
        )
    return torch.cat(images)
