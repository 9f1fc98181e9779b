"""The card of an evaluation: how every number was made, as JSON; and what makes two of them comparable."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezzotint.core.registry import suggest

FORMAT = 1

# Lines in which two comparable evaluations may differ: what is being compared, and what should not matter. They are
# shown all the same. Everything else must agree.
FREE = ("source", "seeds", "code_version")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the judged images were made; None where nobody said.

    source: model, folder or file. n: images. seeds: as "0...49999". label_law: how labels were chosen. prompts: how
    many and the hash of their words. sampler, steps: of the sampler. network_calls: forward passes per image, guidance
    included. guidance: scale and interval in words. ema: which average of the weights. uint8_rule: "round" or
    "truncate", see `mezzotint.data.transforms.to_uint8`.
    resolution: (height, width). preprocessing: crop and resize done to the images. code_version: of mezzotint.
    """

    source: str
    n: int
    code_version: str
    resolution: tuple[int, int] | None = None
    seeds: str | None = None
    label_law: str | None = None
    prompts: str | None = None
    sampler: str | None = None
    steps: int | None = None
    network_calls: int | None = None
    guidance: str | None = None
    ema: str | None = None
    uint8_rule: str | None = None
    preprocessing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number: what it is called, its value, and what it was computed on and against.

    low, high: an interval, with its `level` in settings. error: a standard error. features: a `FeatureSet.card` with
    its hash. reference: name and hash of the reference, None for metrics without one. settings: k, subset sizes, ...
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
    """A protocol and the numbers under it."""

    protocol: Protocol
    numbers: tuple[Number, ...]

    def __getitem__(self, metric: str) -> Number:
        """The number called `metric`; ValueError lists near names."""
        for number in self.numbers:
            if number.metric == metric:
                return number
        raise ValueError(
            f"no number {metric!r}; {suggest(metric, [n.metric for n in self.numbers])}"
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values; NaN is written as null."""
        values = {"mezzotint_evaluation": FORMAT, "protocol": dataclasses.asdict(self.protocol)}
        values["numbers"] = [dataclasses.asdict(number) for number in self.numbers]
        return _without_nan(values)

    def save(self, path: str | Path) -> None:
        """Write `to_json`, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(
            json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
        part.replace(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and value != value else value


def load_evaluation(path: str | Path) -> Evaluation:
    """The Evaluation of a saved file; ValueError when it is damaged or of another format."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["mezzotint_evaluation"] != FORMAT:
            raise ValueError(
                f"format {values['mezzotint_evaluation']}, this version reads {FORMAT}"
            )
        protocol = dict(values["protocol"])
        if protocol.get("resolution") is not None:
            protocol["resolution"] = tuple(protocol["resolution"])
        numbers = [
            {**n, "value": float("nan") if n["value"] is None else n["value"]}
            for n in values["numbers"]
        ]
        return Evaluation(
            protocol=Protocol(**protocol), numbers=tuple(Number(**n) for n in numbers)
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no evaluation written by mezzotint ({error})") from error


@dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    different: lines that must agree and do not, name -> the two values. unstated: lines on which neither says
    anything. noted: lines that may differ and do. rows: (metric, value of A, value of B) for metrics that both have.
    """

    different: dict[str, tuple[Any, Any]]
    unstated: tuple[str, ...]
    noted: dict[str, tuple[Any, Any]]
    rows: tuple[tuple[str, float, float], ...]


def compare(a: Evaluation, b: Evaluation, varying: Collection[str] = ()) -> Comparison:
    """What two evaluations have in common.

    Args:
        varying: protocol lines that are the subject of the comparison, e.g. ("guidance",); they are noted only.
    """
    lines = [f.name for f in dataclasses.fields(Protocol)]
    for name in varying:
        if name not in lines:
            raise ValueError(f"no line {name!r} on a card; {suggest(name, lines)}")
    different: dict[str, tuple[Any, Any]] = {}
    noted: dict[str, tuple[Any, Any]] = {}
    for name in lines:
        pair = getattr(a.protocol, name), getattr(b.protocol, name)
        if pair[0] != pair[1]:
            (noted if name in FREE or name in varying else different)[name] = pair
    mine, theirs = ({n.metric: n for n in e.numbers} for e in (a, b))
    shared = [metric for metric in mine if metric in theirs]
    for metric in shared:
        for part in ("features", "reference", "settings"):
            pair = _essence(getattr(mine[metric], part)), _essence(getattr(theirs[metric], part))
            if pair[0] != pair[1]:
                different[f"{metric}: {part}"] = pair
    for metric in {*mine, *theirs} - {*shared}:
        noted[metric] = _value(mine.get(metric)), _value(theirs.get(metric))
    unstated = tuple(
        name
        for name in lines
        if getattr(a.protocol, name) is None and getattr(b.protocol, name) is None
    )
    return Comparison(
        different, unstated, noted, tuple((m, mine[m].value, theirs[m].value) for m in shared)
    )


def _value(number: Number | None) -> float | None:
    return None if number is None else number.value


def _essence(part: dict[str, Any] | None) -> Any:
    """A hash where there is one: two files of one reference are the same reference, whatever their names."""
    return part["hash"] if part and "hash" in part else part


def require_comparable(a: Evaluation, b: Evaluation, varying: Collection[str] = ()) -> Comparison:
    """`compare`, refused with a ValueError that lists the lines in which the cards differ."""
    found = compare(a, b, varying)
    if found.different:
        lines = "\n".join(f"  {name}: {x} | {y}" for name, (x, y) in found.different.items())
        raise ValueError(
            f"these numbers are not comparable; their cards differ in\n{lines}\nshow them with --anyway"
        )
    if not found.rows:
        raise ValueError("these evaluations have no metric in common")
    return found


def print_comparison(a: Evaluation, b: Evaluation, found: Comparison) -> None:
    """A table of the common metrics, red where the cards forbid the comparison, and the lines that differ."""
    from rich.console import Console
    from rich.table import Table

    console, style = Console(), "red" if found.different else None
    table = Table("metric", a.protocol.source, b.protocol.source)
    for metric, x, y in found.rows:
        table.add_row(metric, f"{x:.6g}", f"{y:.6g}", style=style)
    console.print(table)
    for kind, lines in (("not comparable", found.different), ("differs", found.noted)):
        for name, (x, y) in lines.items():
            console.print(
                f"{kind}: {name}: {x} | {y}",
                style="red" if kind == "not comparable" else None,
                markup=False,
            )
    if found.unstated:
        console.print(f"stated by neither: {', '.join(found.unstated)}", markup=False)
