"""Which columns of a table hold images, labels and captions: by name first, then by type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mezzotint.core.registry import suggest
from mezzotint.data.labels import read_labels

ROLES = ("image", "label", "caption")
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes")
FILE_NAMES = (
    "file_name", "filename", "file", "image_path", "img_path", "path", "file_path", "filepath",
    "image_file", "image_name", "image_id", "image", "img", "picture", "photo", "name", "id",
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "cls", "class", "fine_label")
LABEL_SYNONYMS = (
    "class_name", "class_label", "label_name", "category", "category_name", "species", "breed",
    "target", "y", "class_id", "label_id", "category_id", "diagnosis", "genre", "style",
)  # fmt: skip
CAPTION_NAMES = ("text", "caption", "captions", "prompt", "txt")
CAPTION_SYNONYMS = (
    "description",
    "title",
    "alt_text",
    "alt",
    "sentence",
    "sentences",
    "raw",
    "comment",
)
# Columns of words that repeat and are no classes.
NOT_CLASSES = ("split", "license", "licence", "source", "language", "lang", "url", "format", "mode")
PLAIN_CLASSES = 100  # up to which the words of a column of any name may be classes
SAMPLE_ROWS = 10_000  # which are looked at to find classes

Columns = Mapping[str, str]  # role -> name of its column, "" for none


@dataclass(frozen=True)
class Choice:
    """The columns in use, None for none, and the others that may hold the same."""

    image: str
    label: str | None
    caption: str | None
    others: Mapping[str, Sequence[str]]

    def note(self) -> str | None:
        """Return the sentence for the report; None for usual names and nothing else to choose."""
        used = {"image": self.image, "label": self.label, "caption": self.caption}
        others = {role: names for role, names in self.others.items() if names}
        usual = (*IMAGE_NAMES[:2], *LABEL_NAMES, *CAPTION_NAMES, FILE_NAMES[0], None)
        if not others and all(name in usual for name in used.values()):
            return None
        words = ", ".join(f"{role} {shown(name)}" for role, name in used.items())
        if not others:
            return f"columns: {words}"
        more = "; ".join(
            f"{role} {', '.join(map(shown, names[:8]))}{' ...' if names[8:] else ''}"
            for role, names in others.items()
        )
        return (
            f"columns: {words}; not used, though they may hold the same: {more}; "
            "choose with data.columns={image: ..., label: ..., caption: ...}"
        )


class Column(NamedTuple):
    """A column: the one that it is in, its key in cells of that, see `nested_value`, its type."""

    top: str
    key: str
    feature: Any


def all_columns(features: Mapping[str, Any]) -> dict[str, Column]:
    """Return the columns, and as "json.label" the values within columns of mappings."""
    fields = {name: Column(name, name, feature) for name, feature in features.items()}
    for name, feature in features.items():
        if isinstance(feature, dict) and "bytes" not in feature:
            fields |= {
                f"{name}.{key}": Column(name, f"{name}\0{key}", inner)
                for key, inner in feature.items()
                if f"{name}.{key}" not in fields
            }
    return fields


def nested_value(cell: Any, column: str) -> Any:
    """Return the value of a column such as "json.label" in a cell of its first part."""
    for key in column.split("\0")[1:]:
        cell = cell.get(key) if isinstance(cell, dict) else None
    return cell


def shown(name: str | None) -> str:
    """Return a column's name for print."""
    return "none" if name is None else repr(name[:80])


def parse_columns(assignments: Iterable[str]) -> dict[str, str]:
    """Parse "label=species" and the like; an empty name is no column.

    Errors: ValueError for another form or role.
    """
    columns = {}
    for assignment in assignments:
        role, equals, name = assignment.partition("=")
        if not equals or role not in ROLES:
            raise ValueError(
                f"{assignment!r} chooses no column; write image=NAME, label=NAME or caption=NAME"
            )
        columns[role] = name
    return columns


def check_columns(columns: Columns | None) -> None:
    """Raise ValueError for a role that is none, or a name that is no text."""
    for role, name in (columns or {}).items():
        if role not in ROLES or not isinstance(name, str):
            raise ValueError(
                f"columns has {role!r}: {name!r}; allowed: names for {', '.join(ROLES)}"
            )


def named(columns: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Return the columns of these names, best first; upper case counts where no exact name does.

    The last part of a nested column's name counts, e.g. "json.label".
    """

    def rank(column: str) -> tuple[int, bool, bool] | None:
        last = column.rpartition(".")[2]
        if last.lower() not in wanted:
            return None
        return wanted.index(last.lower()), "." in column, last not in wanted

    ranked = [(rank(column), column) for column in columns]
    return [column for _, column in sorted((r, c) for r, c in ranked if r is not None)]


def given_column(columns: Columns, role: str, known: Iterable[str], what: str) -> str | None:
    """Return the column chosen for a role, "" for none, or None if nothing was chosen.

    Errors: ValueError for a column that is not there.
    """
    name = columns.get(role)
    known = list(known)
    if name and name not in known:
        raise ValueError(
            f"data.columns.{role} is {name!r}, which is no column of {what}; {suggest(name, known)}"
        )
    return name


def choose_label(
    candidates: Sequence[str],
    typed: Sequence[str],
    words: Sequence[str],
    sample: Callable[[str], Sequence[Any]],
) -> tuple[str | None, list[str]]:
    """Return the column of classes and the other candidates.

    A column of a usual name is taken; else the only one whose type says so; else the only one whose
    name or repeated words do.

    Args:
        candidates: columns that may hold classes.
        typed: those whose type is a class.
        words: those that hold text.
        sample: returns the first cells of a column.
    """
    usual = named(candidates, LABEL_NAMES)
    synonyms = named(candidates, LABEL_SYNONYMS)
    plain = [name for name in synonyms if _is_plain(sample(name), few=None)]
    if not synonyms:
        skipped = (*NOT_CLASSES, *FILE_NAMES, *CAPTION_NAMES, *CAPTION_SYNONYMS)
        left = [name for name in words if not named([name], skipped) and not name.startswith("__")]
        plain = [name for name in left if _is_plain(sample(name), few=PLAIN_CLASSES)]
    every = list(dict.fromkeys([*usual, *typed, *synonyms, *plain]))
    chosen = usual[:1] or _only(typed) or ([] if typed else _only(plain))
    if chosen and chosen[0] in plain and len(synonyms) > 1:
        chosen = []
    return next(iter(chosen), None), [name for name in every if name not in chosen]


def _only(names: Sequence[str]) -> list[str]:
    return list(names) if len(names) == 1 else []


def _is_plain(cells: Sequence[Any], few: int | None) -> bool:
    """Return whether the values repeat as classes do."""
    try:
        found = read_labels(cells, len(cells), "")
    except ValueError:
        return False
    labelled = 0 if found is None else int((found.indices >= 0).sum())
    return found is not None and 2 <= len(found.names) <= min(few or labelled, labelled // 2)


def caption_text(cell: Any) -> str | None:
    """Return a caption of any type as text; None for an empty one.

    The first of a list counts; of a mapping, the usual name's or the first text.
    """
    while isinstance(cell, list | tuple | dict | np.ndarray):
        if isinstance(cell, dict):
            best = named(map(str, cell), (*CAPTION_NAMES, *CAPTION_SYNONYMS))
            cell = [cell[key] for key in best] + [v for v in cell.values() if isinstance(v, str)]
        cell = next((value for value in cell if value is not None and not _is_empty(value)), None)
    if isinstance(cell, bytes | bytearray):
        try:
            cell = cell.decode("utf-8-sig")
        except UnicodeDecodeError:
            cell = cell.decode("cp1252", "replace")
    if cell is None or cell != cell:  # NaN is no caption
        return None
    # Arrow takes no lone surrogates.
    return str(cell).strip().encode("utf-8", "replace").decode() or None


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | bytes | list | tuple | dict) and not value
