"""Form validation: a form becomes a sampling job and seeds, or a message."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.backbones import native_size
from mezzotint.core.registry import Spec
from mezzotint.data.autoencoder import find_autoencoder
from mezzotint.data.text_encoder import find_text_encoder
from mezzotint.process.denoiser import Model
from mezzotint.sampling import conditioning
from mezzotint.sampling.conditioning import label_condition, label_indices
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.parse import parse_size
from mezzotint.sampling.prompts import Prompt, make_prompts, read_row
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.sampling.tuned import TunedSettings, read_tuned
from mezzotint.web.studio import Limits, Studio

ALL_CLASSES, NO_CLASS = "every class in turn", "no class"
CURVES = ("constant", "power-cosine")
LARGEST_SEED = 2**62


@dataclass(frozen=True, kw_only=True)
class Request:
    """A form as filled in. Anyone can send anything over HTTP, so any value may have any type.

    model: name.
    label: class names or numbers, ALL_CLASSES or NO_CLASS.
    prompts: one a line, used in turn by seed; a line {"text": ..., "guidance": 3} is a row as in a
        file of prompts (`read_prompts`), without a size.
    negative: words to guide away from.
    seeds: "3", "0-7" or "1, 5, 9".
    guidance: scale as DiT counts it; 1 is none.
    curve: one of CURVES. power: exponent of the power-cosine.
    limited, low, high: guide only between these two log-SNRs.
    size: "", "64" or "48x64", height first.
    """

    model: Any
    label: Any = ALL_CLASSES
    prompts: Any = ""
    negative: Any = ""
    seeds: Any = "0"
    steps: Any = 50
    sampler: Any = "ddim"
    guidance: Any = 1.0
    curve: Any = "constant"
    power: Any = 4.0
    limited: Any = False
    low: Any = -5.0
    high: Any = 5.0
    size: Any = ""


def parse_number(name: str, value: Any, low: float, high: float) -> float:
    """Return a number in [low, high]; ValueError names the field otherwise."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{name} {str(value)[:40]!r} must be a number from {low:g} to {high:g}")
    return number


def parse_integer(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number in [low, high]; ValueError names the field otherwise."""
    number = parse_number(name, value, low, high)
    if number != int(number):
        raise ValueError(f"{name} {number:g} must be a whole number")
    return int(number)


def parse_text(name: str, value: Any, chars: int = 400) -> str:
    """Return what a text field holds, without outer space; ValueError for another type.

    Args:
        chars: at most; the rest is cut off.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise ValueError(f"{name} {str(value)[:40]!r} must be text")
    return "" if value is None else str(value)[:chars].strip()


def parse_seed(value: Any) -> int:
    """Return one seed from a number field."""
    return parse_integer("seed", value, 0, 2**53)  # larger ones are not exact in a browser


def parse_seeds(text: Any, limits: Limits) -> list[int]:
    """Return the seeds of "3", "0-7" or "1, 5, 9", at most `limits.images`."""
    seeds: list[int] = []
    for part in re.split(r"[,\s]+", parse_text("seeds", text)):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        if not match:
            raise ValueError(
                f"seeds {str(text)[:40]!r} are not whole numbers; write 3, or 0-7, or 1, 5, 9"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last > LARGEST_SEED:
            raise ValueError(f"seeds {part} must rise and stay below 2^62")
        if len(seeds) + last - first + 1 > limits.images:
            raise ValueError(f"seeds {part}: at most {limits.images} images at once")
        seeds += range(first, last + 1)
    return seeds


def parse_classes(model: Model, label: Any) -> tuple[int, ...]:
    """Return the classes to choose from; image i gets number i mod their count, none if empty."""
    text = parse_text("class", label)
    num_classes = model.info.config.num_classes
    if text in ("", ALL_CLASSES):
        return tuple(range(num_classes))
    if text == NO_CLASS:
        return ()
    if not num_classes:
        raise ValueError("this model knows no classes; choose 'no class'")
    # A class name may contain a comma.
    is_name = text in (model.info.labels or ())
    names = [text] if is_name else [name.strip() for name in text.split(",")]
    classes = label_indices(model, names)
    label_condition(model, classes, len(classes))
    return tuple(classes)


def parse_prompts(
    model: Model, text: Any, negative: Any, guided: bool, limits: Limits
) -> tuple[Prompt, ...]:
    """Return one prompt a line, without blank lines; at most `limits.images` of them.

    Args:
        negative: words for prompts without negative words of their own. guided: whether guidance,
            through which they act, is on.

    Errors: ValueError also for a model without text conditioning, and for a text encoder that is
        not on this machine.
    """
    text = parse_text("prompts", text, limits.prompt_chars + 1)
    if len(text) > limits.prompt_chars:
        raise ValueError(
            f"the prompts are too long; at most {limits.prompt_chars:,} characters fit"
        )
    negative = parse_text("negative text", negative, limits.prompt_chars)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    prompts = make_prompts([_parse_prompt(line) for line in lines], negative or None)
    if negative and not prompts:
        raise ValueError("a negative text needs prompts; write one, or empty the negative text")
    if len(prompts) > limits.images:
        raise ValueError(
            f"{len(prompts)} prompts, one a line; at most {limits.images}, one for each image"
        )
    if any(p.negative and p.guidance is None for p in prompts) and not guided:
        raise ValueError("a negative text acts through guidance; set it to 3, or so")
    if prompts:
        name = conditioning.text_encoder_info(model)["encoder"]
        check_cached("text encoder", name, find_text_encoder)
    return prompts


def _parse_prompt(line: str) -> Prompt:
    """Return a line as a prompt, or as a row of a file of prompts if it begins like one."""
    prompt = read_row(line) if line.startswith("{") else Prompt(text=line)
    if prompt.size is not None:
        raise ValueError(f"{line[:60]!r}: all images here have one size; leave size out")
    return prompt


def check_cached(kind: str, name: str, find: Callable[[str, bool], Path]) -> None:
    """Check that files a model needs are on this machine; no request starts a download."""
    try:
        find(name, False)
    except ValueError:
        raise ValueError(
            f"the {kind} of this model, {name}, is not on this machine; "
            f"run `mezzotint download {name}` or put its folder back"
        ) from None


def parse_guidance_fields(request: Request) -> Guidance | None:
    """Return the guidance of a form; None if its scale is 1."""
    scale = parse_number("guidance", request.guidance, 0, 30)
    if scale == 1:
        return None
    if request.curve not in CURVES:
        raise ValueError(
            f"guidance curve {str(request.curve)[:40]!r} must be one of {', '.join(CURVES)}"
        )
    low = high = power = None
    if request.limited:
        low = parse_number("log-SNR", request.low, -30, 30)
        high = parse_number("log-SNR", request.high, -30, 30)
    if request.curve == "power-cosine":
        power = parse_number("power", request.power, 0.01, 20)
    return Guidance(scale=scale, power=power, low=low, high=high)


def parse_input_size(model: Model, text: Any, limits: Limits) -> tuple[int, int] | None:
    """Return (height, width) of the network's input; None is its own."""
    text = parse_text("size", text, 40)
    if not text:
        return None
    size, largest = parse_size(text), limits.enlargement * max(native_size(model.info.config))
    if max(size) > largest:
        raise ValueError(f"size {text} is too large here; this model allows up to {largest}")
    return size


def form_defaults(studio: Studio, name: object) -> dict[str, Any]:
    """Return the sampling fields of a form as they begin: the model's tuned settings, or ours."""
    fields = {"sampler": "ddim", "steps": 30, "guidance": 1.0, "curve": CURVES[0], "power": 4.0}
    fields |= {"limited": False, "low": -3.0, "high": 5.0}
    tuned = find_tuned_settings(studio, name)
    if tuned is None:
        return fields
    fields |= {"sampler": tuned.sampler.name, "steps": min(tuned.steps, studio.limits.steps)}
    if (g := tuned.guidance) is not None:
        fields |= {"guidance": g.peak}
        fields |= {} if g.power is None else {"curve": CURVES[1], "power": g.power}
        fields |= {} if g.low is None else {"limited": True, "low": g.low, "high": g.high}
    return fields


def find_tuned_settings(studio: Studio, name: object) -> TunedSettings | None:
    """Return the tuned settings of a model by name; None without, and for damaged ones."""
    if not isinstance(name, str) or name not in studio.models:
        return None
    try:
        return read_tuned(studio.model(name).info)
    except ValueError:
        return None


def make_job(studio: Studio, request: Request, decode: bool = True) -> SamplingJob:
    """Return the job that a request describes.

    Args:
        decode: False keeps latents, and needs no autoencoder.

    Errors: ValueError for a value that is unknown, out of bounds, not on this machine or does not
        fit the others.
    """
    model = studio.model(request.model)
    pixels = model.info.codec == "pixels"
    if decode and not pixels:
        check_cached("autoencoder", model.info.codec, find_autoencoder)
    sampler = Spec(parse_text("sampler", request.sampler, 40))
    tuned = find_tuned_settings(studio, request.model)
    if tuned is not None and tuned.sampler.name == sampler.name:
        sampler = tuned.sampler  # with its options, for which the form has no fields
    settings = SamplingSettings(
        sampler=sampler,
        steps=parse_integer("steps", request.steps, 1, studio.limits.steps),
        guidance=parse_guidance_fields(request),
        size=parse_input_size(model, request.size, studio.limits),
        batch=studio.limits.images,
    )
    return SamplingJob(
        model=model,
        settings=settings,
        classes=parse_classes(model, request.label),
        prompts=parse_prompts(
            model, request.prompts, request.negative, settings.guidance is not None, studio.limits
        ),
        codec=model.info.codec if decode or pixels else None,
    )


def with_guidance(job: SamplingJob, scale: float) -> SamplingJob:
    """Return the job with another guidance scale on the same curve."""
    guidance = job.settings.guidance or Guidance(scale=1.0)
    new = None if scale == 1 else replace(guidance, scale=scale)
    prompts = tuple(replace(prompt, guidance=None) for prompt in job.prompts)
    return replace(job, settings=replace(job.settings, guidance=new), prompts=prompts)


def with_steps(job: SamplingJob, steps: int) -> SamplingJob:
    """Return the job with another number of steps."""
    return replace(job, settings=replace(job.settings, steps=steps))


def describe_settings(job: SamplingJob) -> str:
    """Return the settings as the line under an image."""
    settings = job.settings
    height, width = settings.size or native_size(job.model.info.config)
    guidance = settings.guidance
    guided = "" if guidance is None else f" · guidance {guidance.peak:g}"
    return f"{settings.sampler.name} · {settings.steps} steps{guided} · {width}×{height}"
