"""Sample images; each depends on its own seed, label and settings, whatever its batch."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from mezzotint.backbones import native_size
from mezzotint.core import rng
from mezzotint.core.fields import parse_options, shorten
from mezzotint.core.registry import Spec, check_options
from mezzotint.models import get_schedule
from mezzotint.process import guidance as guide
from mezzotint.process import samplers
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, Model, PerImage, Schedule
from mezzotint.process.prediction import check_consistency_row
from mezzotint.process.samplers import Grid, grids
from mezzotint.process.schedules import Table, invert
from mezzotint.sampling.conditioning import (
    Labels,
    Seeds,
    empty_condition,
    label_condition,
    list_items,
    list_seeds,
    null_condition,
    text_condition,
)
from mezzotint.sampling.denoisers import model_denoiser
from mezzotint.sampling.noise import NoiseAhead
from mezzotint.sampling.settings import CLIPS, Guidance, SamplingSettings, resolve_dtype
from mezzotint.sampling.tuned import read_tuned


@dataclass(frozen=True, kw_only=True)
class ImageGuidance:
    """What guides each image of a batch by itself; None takes what holds for all.

    peak: (b,) scale as DiT counts it, in place of the settings'.
    negative: (b,) texts that guide in place of the empty condition, as conditions.
    """

    peak: Tensor | None = None
    negative: Cond | None = None

    def __getitem__(self, rows: slice) -> ImageGuidance:
        """Return the guidance of some images of the batch."""
        peak = None if self.peak is None else self.peak[rows]
        negative = None if self.negative is None else self.negative[rows]
        return ImageGuidance(peak=peak, negative=negative)


def sample(
    model: Model,
    seeds: Seeds,
    label: Labels | None = None,
    text: str | Sequence[str] | Tensor | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | Sequence[float] | None = None,
    size: SupportsIndex | tuple[SupportsIndex, SupportsIndex] | None = None,
    negative_text: str | Sequence[str] | None = None,
) -> Image:
    """Sample one image per seed.

    Args:
        model: in eval mode, on any device.
        seeds: integers in [0, 2^63), of Python, numpy or torch, or `torch.Generator`s, from each of
            which one is drawn; one or several. An image depends on its own seed alone.
        label: class index or name of each image, or one for all; None is no class.
        text: for models with text conditioning: one prompt for all images, one per image, or token
            embeddings (b, t, d).
        sampler, steps: see `mezzotint.process.samplers`.
        guidance: classifier-free scale as DiT counts it, for all images or one per image; 1 is no
            guidance.
            Of sampler, steps and guidance, None takes the model's tuned setting (`mezzotint tune`),
            or else ddim, 50 steps and no guidance. Images without label and text are not guided.
        size: height and width of the network's input; one number for a square.
        negative_text: for guidance: one text for all images, or one per image, to guide away from
            in place of the empty caption.

    Returns:
        (number of seeds, c, h, w) float32: images in [-1, 1] of pixel models, latents of latent
        models.

    Errors: ValueError for an unknown sampler, a label out of range, guidance of an unconditional
        model, or a size that the network cannot take. FloatingPointError for samples that are not
        finite numbers.
    """
    if not isinstance(model, Model):
        raise ValueError(
            f"{model!r} is not a model; open one first: sample(load_model(folder_or_hub_name), ...)"
        )
    scales = [] if guidance is None else list_items(guidance)
    given = {
        "sampler": None if sampler is None else Spec(sampler),
        "steps": steps,
        "guidance": Guidance(scale=scales[0]) if scales else None,
        "size": None if size is None else _height_and_width(size),
    }
    tuned = read_tuned(model.info)
    own = {} if tuned is None else tuned.fields(guided=label is not None or text is not None)
    settings = SamplingSettings(**own | {k: v for k, v in given.items() if v is not None})
    listed = list_seeds(seeds)
    cond = replace(
        text_condition(model, text, len(listed)), label=label_condition(model, label, len(listed))
    )
    own = _own_guidance(model, scales, negative_text, len(listed))
    in_words = text is not None and not isinstance(text, Tensor)
    if own.negative is not None and (settings.guidance is None or not in_words):
        raise ValueError(
            "a negative text acts through guidance beside a text in words; give text and "
            "guidance=3, or so"
        )
    images = generate(model, listed, cond, settings, own=own)
    return images.clamp(-1, 1) if model.info.codec == "pixels" else images


def _own_guidance(
    model: Model, scales: Sequence[float], negative: str | Sequence[str] | None, count: int
) -> ImageGuidance:
    """Return what guides each of `count` images by itself; ValueError for another number."""
    peak = None
    if len(scales) > 1:
        if len(scales) != count:
            raise ValueError(
                f"{len(scales)} guidance scales for {count} seeds; give one, or one per seed"
            )
        peak = torch.tensor([Guidance(scale=s).peak for s in scales], dtype=torch.float64)
    if negative is None:
        return ImageGuidance(peak=peak)
    device = next(model.parameters()).device
    given = text_condition(model, negative, count).map(lambda t: t.to(device))
    return ImageGuidance(peak=peak, negative=given)


def _height_and_width(size: Any) -> tuple[int, int]:
    """Return the sides of one number or two, integers of Python, numpy or torch."""
    try:
        height, width = (size, size) if isinstance(size, SupportsIndex) else size
        return operator.index(height), operator.index(width)
    except (TypeError, ValueError):
        raise ValueError(
            f"size is {shorten(size)}; give a whole number, or (height, width)"
        ) from None


def generate(
    model: Model,
    seeds: Sequence[int],
    cond: Cond,
    settings: SamplingSettings,
    guide_model: Model | None = None,
    own: ImageGuidance | None = None,
) -> Image:
    """Sample one image per seed under `settings`, unclamped; see `sample`.

    Args:
        cond: one row per seed, on any device.
        guide_model: a weaker model that guides in place of the empty condition (autoguidance).
        own: what guides each image by itself.
    """
    strong = model_denoiser(model, settings)
    weak = None if guide_model is None else model_denoiser(guide_model, settings)

    def sample_batch(part: slice, z: Image, logsnr_steps: Grid) -> Image:
        denoise = build_denoiser(strong, model, settings, weak, own and own[part])
        return run_sampler(denoise, z, logsnr_steps, seeds[part], cond[part], settings)

    return sample_batches(sample_batch, model, seeds, settings)


def sample_batches(
    sample_batch: Callable[[slice, Image, Grid], Image],
    model: Model,
    seeds: Sequence[int],
    settings: SamplingSettings,
) -> Image:
    """Sample one image per seed, `settings.batch` images at a time.

    Args:
        sample_batch: (rows, their start noise, log-SNR steps) to images.
    """
    logsnr_steps = make_logsnr_steps(model, settings)
    images = [draw_start_noise(model, (), settings)]
    for start in range(0, len(seeds), settings.batch):
        part = slice(start, start + settings.batch)
        # At the noisy end z is standard normal, up to the image's trace of alpha(logsnr_steps[0]).
        z = draw_start_noise(model, seeds[part], settings)
        images.append(sample_batch(part, z, logsnr_steps))
    return torch.cat(images)


@torch.no_grad()
def run_sampler(
    denoise: Denoiser,
    z: Image,
    logsnr_steps: Grid,
    seeds: Sequence[int],
    cond: Cond,
    settings: SamplingSettings,
) -> Image:
    """Run the sampler on one batch, from the state z at logsnr_steps[0].

    Args:
        denoise: of `make_denoiser`, or a wrapper around it.
        z: (b, c, h, w) on the model's device.
        logsnr_steps: rising log-SNRs, of `make_logsnr_steps` or others.
        seeds: of the sampler's own noise, one per image.
        cond: one row per image, on any device.

    Errors: FloatingPointError for images that are not finite numbers.
    """
    run = get_sampler(settings)
    with NoiseAhead(seeds, tuple(z.shape[1:]), z.device) as noise:
        if "noise" in inspect.signature(run).parameters:
            run = functools.partial(run, noise=noise)
        images = run(denoise, z, logsnr_steps, cond.map(lambda t: t.to(z.device)))
    if not images.is_meta:  # which has no values
        check_finite(images, seeds, settings)
    return images


def check_finite(images: Image, seeds: Sequence[int], settings: SamplingSettings) -> None:
    """Raise FloatingPointError, naming the seeds, for images that are not finite numbers."""
    finite = images.isfinite().flatten(1).all(1).tolist()
    bad = [seed for seed, good in zip(seeds, finite, strict=True) if not good]
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if bad[8:] else "")
        dtype = resolve_dtype(settings.dtype, images.device)
        half = "" if dtype == "float32" else "dtype float32, "
        raise FloatingPointError(
            f"the samples of seed {shown} are not finite numbers (sampler {settings.sampler}, "
            f"{settings.steps} steps, dtype {dtype}); try {half}more steps, less guidance "
            "or another sampler; if no setting helps, the weights are damaged"
        )


def draw_start_noise(model: Model, seeds: Sequence[int], settings: SamplingSettings) -> Image:
    """Draw each seed's standard normal start, (len(seeds), c, h, w) on the model's device."""
    config = model.info.config
    height, width = settings.size or native_size(config)
    noise = rng.normal("sample", 0, list(seeds), (config.channels, height, width))
    return noise.to(next(model.parameters()).device)


def default_discretization(schedule: Schedule, name: str, sampler: Spec) -> Spec:
    """Return the discretization for settings that name none; `name` is the schedule's."""
    # EDM's sampling steps differ from its training distribution: Karras' (EDM eq. 5). Heun's method
    # steps in sigma = exp(-logsnr / 2). Steps even in u of a cosine would leave nearly all of that,
    # from 1800 to 20, to the first step.
    if sampler.name == "flow_heun":  # JiT's steps, of the same process
        options = {k: v for k, v in sampler.options.items() if k == "noise_scale"}
        return Spec("flow", options)
    if sampler.name == "consistency":
        return Spec("consistency")
    if name == "lognormal" or sampler.name == "heun":
        return Spec("karras")
    # A table's noisy end is finite; a continuous schedule may be infinite at u = 1.
    is_finite = isinstance(schedule, Table) or bool(
        schedule(torch.ones((), dtype=torch.float64)).isfinite()
    )
    return Spec("even") if is_finite else Spec("even", {"start": 0.999})


def get_discretization(model: Model, settings: SamplingSettings) -> Spec:
    """Return the discretization of the settings, or the default one."""
    return settings.discretization or default_discretization(
        get_schedule(model), model.info.schedule.name, settings.sampler
    )


def make_logsnr_steps(model: Model, settings: SamplingSettings) -> Tensor:
    """Return the rising log-SNRs between which the sampler steps, float64 (steps + 1,)."""
    schedule, spec = get_schedule(model), get_discretization(model, settings)
    build = grids.registry[spec.name]
    options = check_options(f"discretization {spec.name}", build, spec.options)
    options = parse_options("discretization.options.", build, options)
    return build(schedule, settings.steps, **options)


def get_sampler(settings: SamplingSettings) -> samplers.Sampler:
    """Return the sampler with its options: (denoiser, z, logsnr_steps, cond) -> image.

    Stochastic samplers also take `noise`.
    """
    run = samplers.registry[settings.sampler.name]
    options = check_options(f"sampler {settings.sampler.name}", run, settings.sampler.options)
    return functools.partial(run, **parse_options("sampler.options.", run, options))


def count_network_calls(model: Model, settings: SamplingSettings, autoguided: bool = False) -> int:
    """Return the forward passes per image, counting both passes of guidance.

    Runs the sampler around an empty network, so that settings it cannot use raise here.
    """

    def empty(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        learned = model.parameterisation.learned_variance
        return Denoised(torch.zeros_like(z), z, torch.zeros_like(z) if learned else None)

    counter = guide.CallCounter(empty)
    denoise = build_denoiser(counter, model, settings, counter if autoguided else None)
    z = torch.zeros(1, model.info.config.channels, 1, 1)
    get_sampler(settings)(denoise, z, make_logsnr_steps(model, settings), empty_condition(model, 1))
    return counter.rows


def make_denoiser(
    model: Model, settings: SamplingSettings, guide_model: Model | None = None
) -> Denoiser:
    """Return the denoiser of a model, or of two, as `settings` asks for it.

    Keep it for many batches: CUDA graphs are recorded once per denoiser and shape.
    """
    weak = None if guide_model is None else model_denoiser(guide_model, settings)
    return build_denoiser(model_denoiser(model, settings), model, settings, weak)


def build_denoiser(
    strong: Denoiser,
    model: Model,
    settings: SamplingSettings,
    weak: Denoiser | None = None,
    own: ImageGuidance | None = None,
) -> Denoiser:
    """Wrap a denoiser in guidance, then in clipping.

    Args:
        strong: evaluates `model`, whose info says what classes and schedule it has.
        weak: guides in place of the empty condition (autoguidance).
        own: what guides each image of the batch by itself; the denoiser is of that batch alone.
    """
    g, denoise, own = settings.guidance, strong, own or ImageGuidance()
    if settings.sampler.name == "consistency":
        check_consistency_row(model.parameterisation.kind, "sampler consistency")
    if weak is not None and g is None:
        raise ValueError("a guide model needs a guidance scale, e.g. 1.5")
    if g is not None and (g.peak != 1 or own.peak is not None):
        scale = guidance_scale(g, get_schedule(model), own.peak)
        channels = model.info.config.channels
        if g.channels is not None and not 1 <= g.channels <= channels:
            raise ValueError(f"{g.channels} guided channels; this model has {channels}")
        if weak is None:
            null = null_condition(model)
            if own.negative is not None:
                null = guide.negative_text(own.negative)
            denoise = guide.classifier_free(denoise, null, scale, g.channels)
        elif g.channels is not None:
            raise ValueError("autoguidance guides all channels; leave channels out")
        else:
            denoise = guide.autoguidance(denoise, weak, scale)
    if settings.clip is not None:
        clip, name = CLIPS[settings.clip.name], settings.clip.name
        denoise = clip(denoise, **check_options(f"clipping {name}", clip, settings.clip.options))
    return denoise


def guidance_scale(
    guidance: Guidance, schedule: Schedule, peak: Tensor | None = None
) -> guide.Scale:
    """Return the guidance scale as a function of log-SNR, as DiT counts it.

    Args:
        peak: (b,) scale of each image in place of the guidance's.

    Errors: ValueError for an interval outside the schedule, and for time "index" of a schedule that
        is not a table.
    """
    largest = guidance.peak if peak is None else peak
    scale = guide.dit_s(largest)
    if guidance.power is not None:
        time = _guidance_time(guidance.time or "u", schedule)
        scale = guide.power_cosine(largest, guidance.power, time)
    if guidance.low is None or guidance.high is None:
        return scale
    noisy, clean = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist()
    if guidance.high < noisy or guidance.low > clean:
        raise ValueError(
            f"the guidance interval {guidance.low:g}...{guidance.high:g} lies outside the schedule,"
            f" whose log-SNR runs from {noisy:.4g} (noise) to {clean:.4g} (clean)"
        )
    return guide.interval(scale, guidance.low, guidance.high)


def _guidance_time(name: str, schedule: Schedule) -> Callable[[Tensor], Tensor]:
    if name == "u":
        return lambda logsnr: invert(schedule, logsnr)
    if not isinstance(schedule, Table):
        raise ValueError(
            "time=index needs a discrete table (linear_ddpm, scaled_linear ...); leave it out for u"
        )
    return lambda logsnr: schedule.index(logsnr) / len(schedule)
