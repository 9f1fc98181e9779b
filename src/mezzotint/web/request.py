"""What a visitor asks for, checked: a form becomes a `Job` and seeds, or one sentence that says why not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mezzotint.core.registry import Spec
from mezzotint.data.autoencoder import find_autoencoder as find_codec
from mezzotint.data.text_encoder import find_text_encoder
from mezzotint.process.denoiser import Model
from mezzotint.sampling import conditioning
from mezzotint.sampling.conditioning import label_condition, label_indices
from mezzotint.sampling.generate_images import SamplingJob
from mezzotint.sampling.protocols import parse_size
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.web.studio import Limits, Studio

IN_TURN, NO_CLASS = "every class in turn", "no class"
CURVES = ("constant", "power-cosine")
LARGEST_SEED = 2**62


@dataclass(frozen=True, kw_only=True)
class Request:
    """A form as it was filled in; any value may be of any type, since anyone can send anything over HTTP.

    model: name. label: class names or numbers, IN_TURN or NO_CLASS. prompts: one a line, taken in turn by seed.
    seeds: "3", "0-7", "1, 5, 9". guidance: as DiT counts it, 1 is none. curve: of CURVES; power: of the power-cosine.
    limited, low, high: guide only between these two log-SNRs. size: "", "64" or "48x64".
    """

    model: Any
    label: Any = IN_TURN
    prompts: Any = ""
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


def parse_number(what: str, value: Any, low: float, high: float) -> float:
    """A finite number between two bounds."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not low <= found <= high:
        raise ValueError(f"{what} {str(value)[:40]!r} must be a number from {low:g} to {high:g}")
    return found


def parse_integer(what: str, value: Any, low: int, high: int) -> int:
    """A whole number between two bounds."""
    found = parse_number(what, value, low, high)
    if found != int(found):
        raise ValueError(f"{what} {found:g} must be a whole number")
    return int(found)


def parse_seeds(text: Any, limits: Limits) -> list[int]:
    """The seeds of "3", "0-7" or "1, 5, 9", at most `limits.pictures`."""
    found: list[int] = []
    for part in re.split(r"[,\s]+", str(text)[:400].strip()):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
        if not match:
            raise ValueError(
                f"seeds {str(text)[:40]!r} are not whole numbers; write 3, or 0-7, or 1, 5, 9"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last > LARGEST_SEED:
            raise ValueError(f"seeds {part} must rise and stay below 2^62")
        if len(found) + last - first + 1 > limits.pictures:
            raise ValueError(f"seeds {part}: at most {limits.pictures} pictures at once")
        found += range(first, last + 1)
    return found


def parse_classes(model: Model, label: Any) -> tuple[int, ...]:
    """The classes to choose from, image i getting number i mod their count; empty for no class."""
    words = str(label if label is not None else "").strip()[:400]
    classes = model.info.config.num_classes
    if words in ("", IN_TURN):
        return tuple(range(classes))
    if words == NO_CLASS:
        return ()
    if not classes:
        raise ValueError("this model knows no classes; choose 'no class'")
    names = [words] if words in (model.info.labels or ()) else [w.strip() for w in words.split(",")]
    pool = label_indices(model, names)
    label_condition(model, pool, len(pool))
    return tuple(pool)


def parse_prompts(model: Model, text: Any, limits: Limits) -> tuple[str, ...]:
    """One prompt a line, at most `limits.pictures` of them and `limits.words` characters; none where all is blank.

    Errors: also for a model that reads none, and for a text encoder that is not on this machine.
    """
    words = str(text if text is not None else "")
    if len(words) > limits.words:
        raise ValueError(
            f"the prompts have {len(words):,} characters; at most {limits.words:,} are read here"
        )
    lines = tuple(line.strip() for line in words.splitlines() if line.strip())
    if len(lines) > limits.pictures:
        raise ValueError(
            f"{len(lines)} prompts, one a line; at most {limits.pictures}, one for each picture"
        )
    if lines:
        check_cached(
            "text encoder", conditioning.text_encoder_info(model)["encoder"], find_text_encoder
        )
    return lines


def check_cached(what: str, name: str, find: Callable[[str, bool], Path]) -> None:
    """ValueError where files that a model needs are not here; no visitor sets off their download."""
    try:
        find(name, False)
    except ValueError:
        raise ValueError(
            f"the {what} of this model, {name}, is not on this machine: fetch it (mezzotint prefetch {name}) or put "
            "its folder back"
        ) from None


def parse_guidance_fields(wish: Request) -> Guidance | None:
    """The guidance asked for; None where it is 1."""
    scale = parse_number("guidance", wish.guidance, 0, 30)
    if scale == 1:
        return None
    if wish.curve not in CURVES:
        raise ValueError(
            f"guidance curve {str(wish.curve)[:40]!r} must be one of {', '.join(CURVES)}"
        )
    low = high = None
    if wish.limited:
        low, high = (
            parse_number("log-SNR", wish.low, -30, 30),
            parse_number("log-SNR", wish.high, -30, 30),
        )
    power = parse_number("power", wish.power, 0.01, 20) if wish.curve == "power-cosine" else None
    return Guidance(scale=scale, power=power, low=low, high=high)


def parse_input_size(model: Model, text: Any, limits: Limits) -> tuple[int, int] | None:
    """(height, width) of the network's input; None is its own."""
    words = str(text if text is not None else "").strip()[:40]
    if not words:
        return None
    size, most = parse_size(words), limits.enlargement * model.info.config.size
    if max(size) > most:
        raise ValueError(
            f"size {words} is too large here; this model may be asked for up to {most}"
        )
    return size


def make_job(studio: Studio, wish: Request, decode: bool = True) -> SamplingJob:
    """The job that a wish describes; without `decode`, latents stay latents and need no autoencoder.

    Errors: ValueError for whatever is unknown, out of bounds, not on this machine or does not fit together.
    """
    model = studio.model(wish.model)
    pixels = model.info.codec == "pixels"
    if decode and not pixels:
        check_cached("autoencoder", model.info.codec, find_codec)
    settings = SamplingSettings(
        sampler=Spec(str(wish.sampler)[:40]),
        steps=parse_integer("steps", wish.steps, 1, studio.limits.steps),
        guidance=parse_guidance_fields(wish),
        size=parse_input_size(model, wish.size, studio.limits),
        batch=studio.limits.pictures,
    )
    return SamplingJob(
        model=model,
        settings=settings,
        classes=parse_classes(model, wish.label),
        prompts=parse_prompts(model, wish.prompts, studio.limits),
        codec=model.info.codec if decode or pixels else None,
    )


def with_guidance(job: SamplingJob, scale: float) -> SamplingJob:
    """The job with another guidance scale, on the same curve."""
    old = job.settings.guidance or Guidance(scale=1.0)
    new = None if scale == 1 else replace(old, scale=scale)
    return replace(job, settings=replace(job.settings, guidance=new))


def with_steps(job: SamplingJob, steps: int) -> SamplingJob:
    """The job with another number of steps."""
    return replace(job, settings=replace(job.settings, steps=steps))


def describe_settings(job: SamplingJob) -> str:
    """Settings as the line under a picture."""
    s, side = job.settings, job.model.info.config.size
    height, width = s.size or (side, side)
    guided = "" if s.guidance is None else f" · guidance {s.guidance.peak:g}"
    return f"{s.sampler.name} · {s.steps} steps{guided} · {width}×{height}"
