"""A model's own sampling settings, as `mezzotint tune` found them: read, checked and described.

They are the key `sampling` of `ModelInfo.extra`. A model of a stranger may say anything there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from mezzotint.core.fields import MOST_SEED, Checked, Range, parse, parse_options, shorten
from mezzotint.core.registry import Spec, check_options
from mezzotint.core.text import escape_markdown, last_component
from mezzotint.models import ModelInfo
from mezzotint.process import samplers
from mezzotint.process.guidance import interval
from mezzotint.sampling.parse import to_plain
from mezzotint.sampling.settings import Guidance

KEY = "sampling"  # of `ModelInfo.extra`
WIDTH = "EMA width"
FIELDS = ("sampler", "steps", "guidance", WIDTH)
NO_OPTIONS = ("denoise", "z", "grid", "cond", "noise")  # arguments of every sampler
# Log-SNR of an interval's end that leaves no step out; the studio's sliders end there.
OPEN_END = 20.0

Distance = Annotated[float, Range(-1e30, 1e30)]
Count = Annotated[int, Range(0, 2**62)]


@dataclass(frozen=True, kw_only=True)
class Measured(Checked):
    """What the last comparison of a search measured.

    metric: its printed name. value, default: of the tuned settings and of the plain default.
    low, high: 95 % interval of value - default, resampled in pairs; None if not computed.
    images: samples of each. first_seed: of them. calls: network calls of the whole search.
    reference, reference_hash: name and first digits of the SHA-256 of the reference.
    """

    prefix: ClassVar[str] = "measured."

    metric: str
    value: Distance
    default: Distance
    low: Distance | None = None
    high: Distance | None = None
    images: Count
    first_seed: Annotated[int, Range(0, MOST_SEED)]
    calls: Count
    reference: str
    reference_hash: str

    def __post_init__(self):
        super().__post_init__()
        if (self.low is None) != (self.high is None):
            raise ValueError("measured.low and measured.high are an interval; give both or neither")


@dataclass(frozen=True, kw_only=True)
class TunedSettings(Checked):
    """Sampling settings of a model, used where a user gives none.

    width: of the post-hoc average that the weights are; None for the average of training.
    source: SHA-256 of the weights in the run's model/ that were tuned; None outside a run.
    """

    sampler: Spec
    steps: Annotated[int, Range(1, 10_000)]
    guidance: Guidance | None = None
    width: Annotated[float, Range(0, 0.2887, above=True)] | None = None
    measured: Measured
    source: str | None = None

    def __post_init__(self):
        super().__post_init__()
        run = samplers.registry[self.sampler.name]
        check_options(f"sampler {self.sampler.name}", run, self.sampler.options)
        for name, value in self.sampler.options.items():
            if name in NO_OPTIONS or not isinstance(value, bool | int | float | str):
                raise ValueError(f"sampler option {shorten(name)} must be a number or text")
        options = parse_options("sampler.options.", run, self.sampler.options)
        object.__setattr__(self, "sampler", Spec(self.sampler.name, options))
        g = self.guidance
        if g is not None and g.low is not None and g.high is not None:
            interval(lambda logsnr: logsnr, g.low, g.high)  # raises for an empty one

    def fields(self, guided: bool) -> dict[str, Any]:
        """Return the fields of `SamplingSettings` that these replace.

        Args:
            guided: the images have labels or prompts, without which nothing is guided, and the
                guidance is classifier-free, as it was when it was tuned.
        """
        fields = {"sampler": self.sampler, "steps": self.steps}
        return {**fields, "guidance": self.guidance} if guided else fields


def read_tuned(info: ModelInfo) -> TunedSettings | None:
    """Return a model's tuned sampling settings; None if it was not tuned.

    Errors: ValueError for values of wrong types, out of range or of an unknown sampler.
    """
    if KEY not in info.extra:
        return None
    try:
        return parse(TunedSettings, info.extra[KEY], "")
    except ValueError as error:
        raise ValueError(
            f"the tuned sampling settings in the model's config.json (extra.{KEY}) are damaged: "
            f"{error}; bring the file back, or remove the key, and 'sha256' too"
        ) from None


def add_tuned(info: ModelInfo, tuned: TunedSettings) -> ModelInfo:
    """Return the info with these as its tuned settings."""
    return dataclasses.replace(info, extra={**info.extra, KEY: to_plain(tuned)})


def describe_guidance(guidance: Guidance | None) -> str:
    """Return e.g. "guidance 1.4 for log-SNR -3...5", or "no guidance"."""
    if guidance is None:
        return "no guidance"
    text = f"guidance {guidance.scale:g}"
    if guidance.low is None or guidance.high is None:
        return text
    if guidance.low <= -OPEN_END:
        return f"{text} for log-SNR up to {guidance.high:g}"
    if guidance.high >= OPEN_END:
        return f"{text} for log-SNR from {guidance.low:g}"
    return f"{text} for log-SNR {guidance.low:g}...{guidance.high:g}"


def describe_tuned(tuned: TunedSettings, fields: Collection[str] = FIELDS) -> str:
    """Return the settings in one line, those of `fields` only."""
    words = {
        "sampler": tuned.sampler.name,
        "steps": f"{tuned.steps} steps",
        "guidance": describe_guidance(tuned.guidance),
        WIDTH: None if tuned.width is None else f"{WIDTH} {tuned.width:g}",
    }
    return ", ".join(word for name, word in words.items() if name in fields and word)


def describe_measured(measured: Measured) -> str:
    """Return what the settings bought, in one line."""
    m = measured
    spread = "" if m.low is None else f" (95 % of the difference: {m.low:.3g} to {m.high:.3g})"
    return f"{m.metric} {m.value:.4g} instead of {m.default:.4g}{spread}, {m.images:,} images each"


def tuned_section(info: ModelInfo) -> list[str]:
    """Return the lines of a model card on the tuned settings; none for a model without."""
    tuned = read_tuned(info)
    if tuned is None:
        return []
    m = tuned.measured
    reference = last_component(m.reference)
    return [
        "## Sampling",
        "",
        f"Tuned settings, used where none are given: {escape_markdown(describe_tuned(tuned))}.",
        "",
        f"They gave {escape_markdown(describe_measured(m))}, against "
        f"{escape_markdown(reference)} ({escape_markdown(m.reference_hash[:16])}), on seeds from "
        f"{m.first_seed:,} that the search had not seen. The search took {m.calls:,} network calls "
        "(`mezzotint tune`).",
        "",
    ]
