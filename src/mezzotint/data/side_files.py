"""Files beside images that hold their labels and captions.

Tables: `metadata.csv`, `.jsonl` or `.parquet`, `labels.csv`, lists such as "a.png cat", and any
other file whose rows name images of the dataset. One file an image: `a.txt`, `a.caption`, `a.cls`.
A name in them is looked up among the images that were found; it never opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from mezzotint.data.columns import (
    CAPTION_NAMES,
    CAPTION_SYNONYMS,
    FILE_NAMES,
    LABEL_NAMES,
    Columns,
    caption_text,
    choose_label,
    named,
    shown,
)
from mezzotint.data.image_names import ImageNames, loose_key
from mezzotint.data.labels import NO_LABEL, Labels, read_labels
from mezzotint.data.side_tables import (
    TABLE_SUFFIXES,
    Store,
    Table,
    join_one_hot,
    parse_json,
    read_table,
    read_text,
)

CAPTION_SUFFIXES = (".txt", ".caption")
MAX_TABLES = 200  # that are read; others are counted
METADATA = "metadata"  # stem of a table whose errors are errors, not notes
DATASET_JSON = "dataset.json"


@dataclass
class SideFiles:
    """Labels and captions by image name, and what was read.

    captions: from tables. text_files: image -> its file with a caption. labels: image -> cell.
    label_place: where the labels are, for errors. is_metadata: they come before class folders.
    files: all that were understood. tables: those of many images -> what was taken.
    unknown: files that were not understood -> the reason. notes: sentences for the report.
    """

    captions: dict[str, str] = field(default_factory=dict)
    text_files: dict[str, str] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    label_place: str = ""
    is_metadata: bool = False
    files: set[str] = field(default_factory=set)
    tables: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def read_labels(self, names: Sequence[str]) -> Labels | None:
        """Return the labels of some images; the classes are those of all.

        Errors: ValueError where they are no classes.
        """
        try:
            found = read_labels(list(self.labels.values()), len(self.labels), self.label_place)
        except ValueError as error:
            raise ValueError(f"{error}; or leave labels out: data.columns={{label: ''}}") from None
        if found is None:
            return None
        index = dict(zip(self.labels, found.indices.tolist(), strict=True))
        indices = [index.get(name, NO_LABEL) for name in names]
        return found._replace(indices=np.array(indices, dtype=np.int64))

    def count_missing(self, names: Sequence[str], label: bool) -> list[str]:
        """Return a note for images that no row of a table names."""
        notes = []
        if label and (lost := sum(name not in self.labels for name in names)):
            notes.append(f"{lost:,} of {len(names):,} images have no label in {self.label_place}")
        bare = [n for n in names if n not in self.captions and n not in self.text_files]
        if self.captions and bare:
            notes.append(
                f"{len(bare):,} of {len(names):,} images have no caption, first {shown(bare[0])}"
            )
        return notes


def read_side_files(
    store: Store, files: Iterable[str], images: Sequence[str], columns: Columns | None = None
) -> SideFiles:
    """Read the labels and captions that lie beside images.

    The first file that names an image counts: metadata.*, then others by name; then the image's
    own file. Of several captions of an image, the first counts.

    Args:
        files: names of all files, images too.
        images: names of the images.
        columns: to take from tables: "label" and "caption" -> name, "" for none; "image" names the
            column of file names.

    Errors: ValueError, with the file, where a metadata.* cannot be read or a column is not there.
    """
    found, names, columns = SideFiles(), ImageNames(images), columns or {}
    taken = set(images)
    others = [name for name in files if name not in taken]
    _pair_files(store, others, images, found)
    tables = [name for name in others if _may_be_table(name) and name not in found.files]
    unknown = {role for role, column in columns.items() if column}
    tables.sort(key=lambda name: (PurePosixPath(name).stem.lower() != METADATA, name))
    for name in tables[MAX_TABLES:]:
        found.unknown[name] = f"more than {MAX_TABLES} such files; only the first are read"
    for name in tables[:MAX_TABLES]:
        table = _read(store, name, names, found)
        if table is not None:
            unknown -= {role for role in unknown if columns[role] in table.columns}
            _take(table, name, names, columns, found)
    for role in sorted(unknown):
        raise ValueError(
            f"data.columns.{role} is {columns[role]!r}, but no table beside the images of "
            f"{store.root} has it; read were: {', '.join(map(shown, tables)) or 'none'}"
        )
    if found.unknown:
        first = next(iter(found.unknown))
        found.notes.append(
            f"{len(found.unknown):,} files were not understood as labels or captions, first "
            f"{shown(first)}: {found.unknown[first]}"
        )
    if columns.get("caption") == "":
        found.captions, found.text_files = {}, {}
    return found


def _may_be_table(name: str) -> bool:
    path = PurePosixPath(name)
    words = path.stem.lower() in ("readme", "license", "licence", "notice", "requirements")
    return path.suffix.lower() in TABLE_SUFFIXES and path.name != DATASET_JSON and not words


def _pair_files(
    store: Store, others: Sequence[str], images: Sequence[str], found: SideFiles
) -> None:
    """Find the files that belong to one image each: a.txt, a.png.txt, a.caption, a.cls, a.json."""
    suffixes = (*CAPTION_SUFFIXES, ".cls", ".json")
    exact = {name for name in others if PurePosixPath(name).suffix.lower() in suffixes}
    lower = {loose_key(name): name for name in sorted(exact, reverse=True)}
    if not exact:
        return

    def partner(image: str, suffix: str) -> str | None:
        for base in (str(PurePosixPath(image).with_suffix("")), image):
            name = base + suffix
            if name in exact or loose_key(name) in lower:
                return name if name in exact else lower[loose_key(name)]
        return None

    for image in images:
        for suffix in CAPTION_SUFFIXES:
            if image not in found.text_files and (name := partner(image, suffix)):
                found.text_files[image] = name
        if name := partner(image, ".cls"):
            found.labels[image] = read_text(store, name).strip()
            found.files.add(name)
        if name := partner(image, ".json"):
            _take_json(store, name, image, found)
    found.files |= set(found.text_files.values())
    found.label_place = f"the .cls or .json files of {store.root}" if found.labels else ""


def _take_json(store: Store, name: str, image: str, found: SideFiles) -> None:
    """Take label and caption of one image from its own .json."""
    try:
        value = parse_json(read_text(store, name))
    except ValueError as error:
        found.unknown[name] = str(error)
        return
    found.files.add(name)
    if not isinstance(value, dict):
        return
    if labels := named(value, ("label", "labels", "cls", "class")):
        found.labels.setdefault(image, value[labels[0]])
    if image not in found.text_files and (
        captions := named(value, (*CAPTION_NAMES, *CAPTION_SYNONYMS))
    ):
        text = caption_text(value[captions[0]])
        found.captions |= {} if text is None else {image: text}


def _read(store: Store, name: str, names: ImageNames, found: SideFiles) -> Table | None:
    """Read a table; one that cannot be read is named in a note, metadata.* is an error."""
    folder = name.rpartition("/")[0]
    try:
        table = read_table(store, name, lambda cell: names.may_name(cell, folder))
        if table is not None:
            return table
        reason = "its rows name no images of this dataset"
    except ValueError as error:
        if PurePosixPath(name).stem.lower() == METADATA:
            raise
        reason = str(error).removeprefix(f"{store.root}/{name} ")
    found.unknown[name] = reason
    return None


def _take(table: Table, name: str, names: ImageNames, columns: Columns, found: SideFiles) -> None:
    """Take labels and captions from the rows of a table."""
    folder = name.rpartition("/")[0]
    files = _file_column(table, columns, names, folder)
    images = names.find_all(table.columns[files], folder)
    rest = [column for column in table.columns if column != files]
    if table.has_header and "label" not in columns and not named(rest, LABEL_NAMES):
        table, rest = join_one_hot(table, rest)
    found.notes += [f"{shown(name)}: {note}" for note in table.notes]
    words = [c for c in rest if any(isinstance(cell, str) for cell in table.columns[c][:100])]
    label = columns["label"] if columns.get("label", None) in ("", *rest) else None
    caption = columns["caption"] if columns.get("caption", None) in ("", *rest) else None
    more: list[str] = []
    captions: list[str] = []
    if table.has_header:
        captions = [*named(rest, CAPTION_NAMES), *named(rest, CAPTION_SYNONYMS)]
        if label is None:
            label, more = choose_label(rest, [], words, lambda c: table.columns[c][:10_000])
        if caption is None:
            captions = [column for column in captions if column != label]
            caption = next(iter(captions), None)
        else:
            captions = []
        more = [c for c in more if c != caption]
    elif rest and label is None and caption is None:
        label, caption = _role_without_header(name, rest[0], table)
    found.files.add(name)
    found.tables[name] = f"label {shown(label or None)}, caption {shown(caption or None)}"
    _describe(name, images, table.columns[files], more, label, caption, found)
    kept = [caption] if caption else []
    for column in dict.fromkeys(kept + captions):  # rows may differ in keys
        for image, cell in zip(images, table.columns[column], strict=True):
            text = None if image is None or image in found.captions else caption_text(cell)
            if image is not None and text is not None:
                found.captions[image] = text
    if label and (not found.label_place or found.label_place.startswith("the .cls")):
        found.label_place = f"column {label!r} of {name}" if table.has_header else name
        stem = PurePosixPath(name).stem.lower()
        found.is_metadata = stem.startswith((METADATA, "label")) or "label" in columns
        for image, cell in zip(images, table.columns[label], strict=True):
            if image is not None:
                found.labels.setdefault(image, cell)


def _file_column(table: Table, columns: Columns, names: ImageNames, folder: str) -> str:
    """Return the column that names images: the chosen one, else of the usual name, else any."""
    if columns.get("image") in table.columns:
        return columns["image"]
    order = [*named(table.columns, FILE_NAMES), *table.columns]

    def hits(column: str) -> int:
        return sum(names.may_name(cell, folder) for cell in table.columns[column][:1000])

    return max(dict.fromkeys(order), key=hits)


def _role_without_header(name: str, column: str, table: Table) -> tuple[str | None, str | None]:
    """Return (label, caption) of a list without a header: by the file's name, else by its words."""
    stem = PurePosixPath(name).stem.lower()
    if re.search("caption|prompt|text|description", stem):
        return None, column
    if "label" in stem or "class" in stem:
        return column, None
    cells = table.columns[column]
    return (
        (column, None) if len(set(map(str, cells))) <= max(2, len(cells) // 2) else (None, column)
    )


def _describe(
    name: str,
    images: Sequence[str | None],
    cells: Sequence[Any],
    more: Sequence[str],
    label: str | None,
    caption: str | None,
    found: SideFiles,
) -> None:
    """Add notes on rows without an image, on repeated rows, and on other columns of classes."""
    lost = [str(cell)[:80] for cell, image in zip(cells, images, strict=True) if image is None]
    if lost:
        found.notes.append(
            f"{len(lost):,} of {len(images):,} rows of {shown(name)} name no image of this "
            f"dataset, first {lost[0]!r}"
        )
    repeated = len(images) - len(lost) - len({image for image in images if image is not None})
    if repeated:
        found.notes.append(
            f"{repeated:,} rows of {shown(name)} repeat an image; its first row counts"
        )
    if not label and not caption:
        found.notes.append(
            f"{shown(name)} names images, but no column of labels or captions was found; "
            "choose with data.columns={label: ..., caption: ...}"
        )
    if more:
        found.notes.append(
            f"{shown(name)}: label {shown(label or None)}; not used: "
            f"{', '.join(map(shown, more))}; choose with data.columns={{label: ...}}"
        )


def choose_labels(
    side: SideFiles,
    names: Sequence[str],
    labels: np.ndarray | None,
    label_names: tuple[str, ...] | None,
    columns: Columns,
    notes: list[str],
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels and class names of images: from metadata.*, else the given ones, else others.

    Args:
        labels, label_names: by dataset.json or by folders, or None.
        notes: get what was read and what is missing.
    """
    notes += side.notes
    if columns.get("label") == "":
        notes += side.count_missing(names, False)
        return None, None
    if not side.labels or (labels is not None and not side.is_metadata):
        if side.labels:
            notes.append(
                f"labels are the folders'; those of {side.label_place} are not used (choose them "
                "with data.columns={label: ...})"
            )
        notes += side.count_missing(names, False)
        return labels, label_names
    found = side.read_labels(names)
    if found is None:
        return labels, label_names
    if labels is not None:
        notes.append(f"labels are those of {side.label_place}, not of the folders")
    notes += [found.note] if found.note else []
    notes += side.count_missing(names, True)
    return found.indices, found.names


def labels_from_json(
    store: Store, prefix: str, names: Sequence[str], notes: list[str]
) -> tuple[list[str], np.ndarray | None, tuple[str, ...] | None, np.ndarray | None]:
    """Return image names, labels, class names and test images of dataset.json; add to `notes`.

    Its form: {"labels": [[name, label], ...]}, optionally with "classes" and a list "test".
    """
    where = f"{store.root}/{prefix}{DATASET_JSON}"
    found, folder = ImageNames(names), prefix.rstrip("/")

    def resolve(name: object) -> str:
        return found.find(name, folder) or prefix + str(name)

    try:
        card = parse_json(read_text(store, f"{prefix}{DATASET_JSON}"))
        given = [(resolve(name), label) for name, label in card.get("labels") or []]
        listed = None if card.get("test") is None else {resolve(name) for name in card["test"]}
        classes = card.get("classes")
        if not isinstance(classes, list | None):
            raise ValueError(f"classes are {str(classes)[:80]!r}; give a list of names")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where} is not of the form {{"labels": [["name.png", 0], ...]}}: {error}'
        ) from error
    present = set(names)
    if not given:  # EDM writes "labels": null for an unlabelled set
        ordered, labels, label_names = list(names), None, None
    else:
        missing = [name for name, _ in given if name not in present]
        if missing:
            raise ValueError(
                f"{where} lists {len(missing)} files that do not exist, first {missing[0]!r}"
            )
        given.sort(key=lambda pair: pair[0])
        ordered = [name for name, _ in given]
        if len(set(ordered)) < len(ordered):
            raise ValueError(f"{where} lists a file twice; give each file one label")
        found_labels = read_labels(
            [label for _, label in given],
            len(given),
            where,
            None if classes is None else [str(name) for name in classes],
        )
        labels, label_names = (None, None) if found_labels is None else found_labels[:2]
        notes += [found_labels.note] if found_labels and found_labels.note else []
        if len(present) > len(ordered):
            notes.append(
                f"{len(present) - len(ordered)} images are not in dataset.json and were left out"
            )
    test = None if listed is None else np.array([name in listed for name in ordered])
    return ordered, labels, label_names, test
