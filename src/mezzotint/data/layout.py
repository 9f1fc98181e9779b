"""How a folder, archive or table was understood, for `mezzotint doctor`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from mezzotint.core.paths import printable
from mezzotint.data.columns import Choice

LISTED = 3  # names of each kind


@dataclass(frozen=True)
class Layout:
    """What a source was taken for.

    kind: folder, zip, tar, parquet, ... split: the chosen one; None where there is no choice.
    splits: name -> its images. labels: where they come from, None without any.
    side_files: files of labels and captions -> what was taken. columns: of a table.
    ignored: kind -> number of files, and the first names. notes: of the source, those that say
    nothing else.
    """

    kind: str = ""
    split: str | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    labels: str | None = None
    side_files: Mapping[str, str] = field(default_factory=dict)
    columns: Choice | None = None
    ignored: Mapping[str, tuple[int, Sequence[str]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def count_ignored(
    others: Mapping[str, str | None], skipped: Mapping[str, Iterable[str]]
) -> dict[str, tuple[int, Sequence[str]]]:
    """Return the kinds of files that are not read: kind -> number, first names for print.

    Args:
        others: name -> suffix of an image that cannot be read, None for what is no image.
        skipped: kind -> names of what is never opened.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name, kind in others.items():
        suffix = kind or PurePosixPath(name).suffix.lower() or "no suffix"
        groups[printable(suffix)].append(name)
    for kind, names in skipped.items():
        groups[kind] += names
    return {
        kind: (len(names), [printable(name) for name in sorted(names)[:LISTED]])
        for kind, names in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))
    }
