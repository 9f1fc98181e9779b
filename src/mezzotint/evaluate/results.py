"""Results of an evaluation as JSON: numbers, the protocol behind them, and their comparison."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint import __version__
from mezzotint.core.console import echo
from mezzotint.core.fields import parse
from mezzotint.core.files import atomic_write, is_special, read_json
from mezzotint.core.json_values import check_fields
from mezzotint.core.registry import suggest

if TYPE_CHECKING:
    from mezzotint.evaluate.image_source import ImageSource

FORMAT = 1

# Fields in which two comparable evaluations may differ: what is compared, and what has no effect on
# the expected value. All others must agree.
FREE_FIELDS = ("source", "training_images", "seeds", "code_version", "dtype", "tuned")

# Keys of what was measured, in evaluations and sweeps; all others say how.
MEASURED = ("value", "low", "high", "error", "std_over_splits", "x", "y", "y_error")
# Endings of the figures beside an evaluation and beside a sweep, with its name.
EVALUATION_FIGURES = (".copies.png",)
SWEEP_FIGURES = (".svg", ".png")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the evaluated images were made; None for what is unknown.

    source: model, folder or file. num_images: how many. code_version: of mezzotint.
    resolution: (height, width). seeds: as "0...49999". label_order: how labels were chosen.
    prompts: how many, and a hash of them. sampler, steps: of the sampler.
    network_calls: forward passes per image, guidance included.
    guidance: scale and interval. ema: which average of the weights.
    training_images: that the model had seen.
    dtype: of the network's arithmetic.
    uint8_rule: "round" or "truncate", see `mezzotint.data.transforms.to_uint8`.
    preprocessing: crop and resize applied to the images.
    tuned: which of these `mezzotint tune` chose, by what distance and reference.
    """

    source: str
    num_images: int
    code_version: str
    resolution: tuple[int, int] | None = None
    seeds: str | None = None
    label_order: str | None = None
    prompts: str | None = None
    sampler: str | None = None
    steps: int | None = None
    network_calls: int | None = None
    guidance: str | None = None
    ema: str | None = None
    training_images: int | None = None
    dtype: str | None = None
    uint8_rule: str | None = None
    preprocessing: str | None = None
    tuned: str | None = None


def make_protocol(source: ImageSource, resolution: tuple[int, int] | None) -> Protocol:
    """Return the protocol of a source's images; ValueError for metadata of unknown names."""
    own = {"source", "num_images", "code_version", "resolution"}
    known = {f.name for f in dataclasses.fields(Protocol)} - own
    for key in source.metadata:
        if key not in known:
            raise ValueError(f"{source.name} has metadata {key!r}; {suggest(key, known)}")
    return Protocol(
        source=source.name,
        num_images=source.num_images,
        code_version=__version__,
        resolution=resolution,
        **source.metadata,
    )


@dataclass(frozen=True, kw_only=True)
class Number:
    """One metric's value, with what it was computed on and against.

    metric: its printed name. features: a `FeatureSet.metadata` with its hash.
    reference: name and hash of the reference; None for metrics without one.
    low, high: an interval, with its `level` in settings. error: a standard error.
    settings: k, subset sizes, ...
    """

    metric: str
    value: float
    features: dict[str, Any]
    reference: dict[str, Any] | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A protocol and the numbers measured under it."""

    protocol: Protocol
    numbers: tuple[Number, ...]

    def __getitem__(self, metric: str) -> Number:
        """Return the number called `metric`; ValueError suggests similar names."""
        for number in self.numbers:
            if number.metric == metric:
                return number
        known = [number.metric for number in self.numbers]
        raise ValueError(f"no number {metric!r}; {suggest(metric, known)}")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; NaN becomes null."""
        values = {"mezzotint_evaluation": FORMAT, "protocol": dataclasses.asdict(self.protocol)}
        values["numbers"] = [dataclasses.asdict(number) for number in self.numbers]
        return _nan_to_none(values)

    def save(self, path: str | Path) -> None:
        """Write `to_json` atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _nan_to_none(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def _drop_measured(values: Any) -> Any:
    """Return JSON values without those that were measured."""
    if isinstance(values, dict):
        return {k: _drop_measured(v) for k, v in values.items() if k not in MEASURED}
    if isinstance(values, list | tuple):
        return [_drop_measured(v) for v in values]
    return values


def keep_other_numbers(path: Path, values: dict[str, Any]) -> None:
    """Rename an evaluation or a sweep at `path` of other settings, with its figures, and say so.

    One of the same settings stays: writing replaces it.

    Args:
        values: `to_json` of what will be written to `path`.
    """
    if is_special(path) or not path.is_file() or not path.stat().st_size:
        return
    if _drop_measured(read_json(path)) == _drop_measured(values):
        return
    figures = SWEEP_FIGURES if "mezzotint_sweep" in values else EVALUATION_FIGURES

    def parts(base: Path) -> list[Path]:
        return [base, *(base.with_suffix(suffix) for suffix in figures)]

    others = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in itertools.count(1))
    kept = next(other for other in others if not any(part.exists() for part in parts(other)))
    for part, other in zip(parts(path), parts(kept), strict=True):
        if part.is_file():
            part.rename(other)
    echo(f"! {path} held numbers of other settings; they are in {kept} now")


def load_evaluation(path: str | Path) -> Evaluation:
    """Read what `Evaluation.save` wrote; ValueError for any other file."""
    try:
        values = read_json(Path(path), "evaluate again")
        if values["mezzotint_evaluation"] != FORMAT:
            raise ValueError(
                f"format {values['mezzotint_evaluation']}, this version reads {FORMAT}"
            )
        check_fields(values, {"protocol": dict, "numbers": list[dict]})
        numbers = [
            {**n, "value": math.nan if n.get("value", 0) is None else n.get("value")}
            for n in values["numbers"]
        ]
        return parse(Evaluation, {"protocol": values["protocol"], "numbers": numbers}, "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an evaluation written by mezzotint ({error})") from error


@dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    conflicts: what must agree and does not, name -> the two values.
    differences: what may differ and does, name -> the two values.
    unknown: protocol fields that neither evaluation gives.
    rows: (metric, value of A, value of B) for the metrics that both have.
    """

    conflicts: dict[str, tuple[Any, Any]]
    differences: dict[str, tuple[Any, Any]]
    unknown: tuple[str, ...]
    rows: tuple[tuple[str, float, float], ...]


def compare(a: Evaluation, b: Evaluation, varying: Collection[str] = ()) -> Comparison:
    """Compare two evaluations field by field.

    Args:
        varying: protocol fields under study, e.g. ("guidance",); a difference in them is allowed.
    """
    names = [f.name for f in dataclasses.fields(Protocol)]
    for name in varying:
        if name not in names:
            raise ValueError(f"no protocol field {name!r}; {suggest(name, names)}")
    conflicts: dict[str, tuple[Any, Any]] = {}
    differences: dict[str, tuple[Any, Any]] = {}
    pairs = {name: (getattr(a.protocol, name), getattr(b.protocol, name)) for name in names}
    for name, (x, y) in pairs.items():
        if x != y:
            allowed = name in FREE_FIELDS or name in varying
            (differences if allowed else conflicts)[name] = x, y
    numbers_a, numbers_b = ({n.metric: n for n in e.numbers} for e in (a, b))
    shared = [metric for metric in numbers_a if metric in numbers_b]
    for metric in shared:
        for part in ("features", "reference", "settings"):
            x, y = (_identify(getattr(n[metric], part)) for n in (numbers_a, numbers_b))
            if x != y:
                conflicts[f"{metric}: {part}"] = x, y
    for metric in {*numbers_a, *numbers_b} - {*shared}:
        x, y = numbers_a.get(metric), numbers_b.get(metric)
        differences[metric] = x and x.value, y and y.value
    unknown = tuple(name for name, pair in pairs.items() if pair == (None, None))
    rows = tuple((m, numbers_a[m].value, numbers_b[m].value) for m in shared)
    return Comparison(conflicts, differences, unknown, rows)


def _identify(part: dict[str, Any] | None) -> Any:
    """Return the hashes if there are some, else how it was measured.

    A copy of a reference file is the same reference.
    """
    hashes = {k: v for k, v in (part or {}).items() if k.endswith("hash")}
    return (hashes["hash"] if [*hashes] == ["hash"] else hashes) or _drop_measured(part)


def require_comparable(a: Evaluation, b: Evaluation, varying: Collection[str] = ()) -> Comparison:
    """Return `compare(a, b, varying)`; ValueError names every conflict, if there are any."""
    comparison = compare(a, b, varying)
    if comparison.conflicts:
        lines = "\n".join(f"  {name}: {x} | {y}" for name, (x, y) in comparison.conflicts.items())
        raise ValueError(
            "these numbers are not comparable; the evaluations differ in\n"
            f"{lines}\nprint them with --anyway"
        )
    if not comparison.rows:
        raise ValueError("these evaluations have no metric in common")
    return comparison


def print_comparison(a: Evaluation, b: Evaluation, comparison: Comparison) -> None:
    """Print the shared metrics, in red if there are conflicts, and the fields that differ."""
    from rich.table import Table

    from mezzotint.core.console import open_console

    console, style = open_console(), "red" if comparison.conflicts else None
    table = Table("metric", a.protocol.source, b.protocol.source)
    for metric, x, y in comparison.rows:
        table.add_row(metric, f"{x:.6g}", f"{y:.6g}", style=style)
    console.print(table)
    for name, (x, y) in comparison.conflicts.items():
        console.print(f"not comparable: {name}: {x} | {y}", style="red")
    for name, (x, y) in comparison.differences.items():
        console.print(f"differs: {name}: {x} | {y}")
    if comparison.unknown:
        console.print(f"unknown for both: {', '.join(comparison.unknown)}")
