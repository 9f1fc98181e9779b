"""What a search by `evaluate.tune` has measured: the file tune.json, and its tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mezzotint.core.fields import MOST_SEED, Range, parse
from mezzotint.core.files import check_replaceable, read_json, write_json
from mezzotint.evaluate.search import Candidate
from mezzotint.sampling.parse import to_plain
from mezzotint.sampling.settings import Guidance
from mezzotint.sampling.tuned import describe_guidance

FORMAT = 1

Count = Annotated[int, Range(1, 2**62)]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate's measurement.

    images: how many, of seeds first_seed, ... calls: network calls for an image.
    value: distance to the reference; infinite for samples that are not finite, null in JSON.
    low, high: 95 % interval of value - the default's, if it was computed.
    """

    candidate: Candidate
    guidance: Guidance | None = None
    images: Count
    first_seed: Annotated[int, Range(0, MOST_SEED)]
    calls: Count
    value: float = math.inf
    low: float | None = None
    high: float | None = None

    def describe(self) -> str:
        """Return the candidate in words."""
        width = self.candidate.width
        average = "" if width is None else f", EMA width {width:g}"
        return f"{describe_guidance(self.guidance)}{average}"


@dataclass(kw_only=True)
class TuneRecord:
    """The trials of a search and of its last comparison; the first is the default's.

    arguments: what decides every number, as JSON values.
    """

    path: Path
    arguments: dict[str, Any]
    search: list[Trial] = field(default_factory=list)
    comparison: list[Trial] = field(default_factory=list)

    @staticmethod
    def open(path: Path, arguments: dict[str, Any]) -> tuple[TuneRecord, list[str]]:
        """Return the record at `path` if it is of these arguments, else a new one; and messages.

        Errors: ValueError for a file of others, or a damaged one.
        """
        check_replaceable(path, lambda p: "mezzotint_tuning" in read_json(p), "a search")
        new = TuneRecord(path=path, arguments=arguments)
        if not path.exists():
            return new, []
        values = read_json(path, "remove it to begin again")
        old = values.get("arguments")
        if values.get("mezzotint_tuning") != FORMAT or not isinstance(old, dict):
            return new, [f"{path} is of another version; the search starts from the beginning"]
        changed = [k for k in {**old, **arguments} if old.get(k) != arguments.get(k)]
        if changed:
            return new, [
                f"{path} is of another {', '.join(changed)}; the search starts from the beginning"
            ]
        try:
            parts = {
                name: list(parse(tuple[Trial, ...], values.get(name), name))
                for name in ("search", "comparison")
            }
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; remove it to begin again") from None
        old_record = dataclasses.replace(new, **parts)
        done = len(old_record.search)
        return old_record, [f"{path}: {done} candidates are measured already"] if done else []

    def save(self) -> None:
        """Write the record atomically."""
        lists = {"search": self.search, "comparison": self.comparison}
        values = {name: [_to_json(trial) for trial in trials] for name, trials in lists.items()}
        write_json(self.path, {"mezzotint_tuning": FORMAT, "arguments": self.arguments, **values})

    def find(self, candidate: Candidate) -> Trial | None:
        """Return the candidate's trial of the search; None if it was not measured."""
        return next((t for t in self.search if t.candidate == candidate), None)

    @property
    def winner(self) -> Trial:
        """The smallest distance of the last comparison that is no luck, else the default.

        An interval that reaches 0 may be luck; without intervals the smallest distance wins.
        """
        default, *others = self.comparison
        better = [t for t in others if t.value < default.value and (t.high is None or t.high < 0)]
        return min(better, key=lambda trial: trial.value, default=default)

    @property
    def calls(self) -> int:
        """The network calls of all trials."""
        return sum(t.images * t.calls for t in (*self.search, *self.comparison))


def _to_json(trial: Trial) -> dict[str, Any]:
    values = to_plain(trial)
    if not math.isfinite(trial.value):
        del values["value"]
    return values


def print_record(record: TuneRecord) -> None:
    """Print the tables of the search and of the last comparison, the smallest distance first."""
    _print_trials("search", record.arguments["metric"], record.search, with_difference=False)
    _print_trials("last comparison, on fresh seeds", record.arguments["metric"], record.comparison)


def _print_trials(
    title: str, metric: str, trials: Sequence[Trial], with_difference: bool = True
) -> None:
    """Print trials as a table; the first is the default."""
    from rich.table import Table

    from mezzotint.core.console import open_console

    first = trials[0]
    columns = ["95 % of the difference from the default"] if with_difference else []
    table = Table(
        "settings", metric, *columns, "calls per image",
        title=f"{title}: {first.images:,} images each, seeds from {first.first_seed:,}",
    )  # fmt: skip
    for trial in sorted(trials, key=lambda t: t.value):
        spread = "" if trial.low is None else f"{trial.low:+.3g} to {trial.high:+.3g}"
        named = f"{trial.describe()}{' (the default)' if trial is first else ''}"
        cells = [spread] if with_difference else []
        table.add_row(named, f"{trial.value:.5g}", *cells, f"{trial.calls:,}")
    open_console().print(table)
