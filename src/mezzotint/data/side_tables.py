"""Tables beside images, as any program or system writes them: CSV, JSON Lines, lists, parquet."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from mezzotint.core.text import escape_name
from mezzotint.data.decode import UnreadableImage

MAX_TABLE_BYTES = 512 << 20  # of one table, unpacked
JSON_LINES = (".jsonl", ".ndjson")
LISTS = (".txt", ".lst", ".list")
SEPARATED = (".csv", ".tsv")
TABLE_SUFFIXES = (*SEPARATED, *JSON_LINES, *LISTS, ".parquet", ".json")
# UTF-32's mark starts with UTF-16's, so it comes first.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

Names = Callable[[Any], bool]  # whether a cell names an image of the dataset


@runtime_checkable
class Store(Protocol):
    """Files by name: a folder or an archive."""

    root: Path

    def bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        ...


@dataclass(frozen=True)
class Table:
    """Columns of equal length by name. notes: sentences for the report."""

    columns: Mapping[str, Sequence[Any]]
    has_header: bool = True
    notes: tuple[str, ...] = ()


def decode_text(data: bytes) -> str:
    """Return text in any encoding that Windows writes: UTF-8, UTF-16 or cp1252.

    Errors: ValueError for bytes that are no text.
    """
    return _decode(data)[0]


def _decode(data: bytes) -> tuple[str, str]:
    """Return text, see `decode_text`, and its encoding."""
    encodings = [name for mark, name in MARKS.items() if data.startswith(mark)][:1]
    encodings = encodings or _utf16_without_mark(data) or ["utf-8", "cp1252"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, encoding
        break
    raise ValueError("is no text in UTF-8, UTF-16 or Windows-1252")


def _utf16_without_mark(data: bytes) -> list[str]:
    """Return the kind of UTF-16 in which every other byte, or a quarter of them, is zero."""
    zeros = [data[parity::2].count(0) for parity in (0, 1)]
    if len(data) % 2 or min(zeros) or 8 * max(zeros) < len(data):
        return []
    return ["utf-16-le" if zeros[1] else "utf-16-be"]


def read_text(store: Store, name: str) -> str:
    """Return the text of a file; ValueError names a file that cannot be read or is no text."""
    return _read_encoded(store, name)[0]


def _read_encoded(store: Store, name: str) -> tuple[str, str]:
    """Return the text of a file, see `read_text`, and its encoding."""
    try:
        return _decode(store.bytes(name))
    except (UnreadableImage, OSError) as error:
        raise ValueError(f"{store.root}/{name} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{store.root}/{name} {error}; save it as UTF-8") from error


def parse_json(text: str) -> Any:
    """Return a JSON value; ValueError also for one nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_table(store: Store, name: str, is_image: Names) -> Table | None:
    """Read a table whose rows name images; None if they name none.

    Args:
        is_image: tells whether a cell names an image.

    Errors: ValueError that names the file, and the line where one is wrong.
    """
    suffix, where = PurePosixPath(name).suffix.lower(), f"{store.root}/{name}"
    encoding = ""
    if suffix == ".parquet":
        table = _read_parquet(store, name)
    else:
        text, encoding = _read_encoded(store, name)
        if len(text) > MAX_TABLE_BYTES:
            raise ValueError(f"{where} has {len(text):,} characters; split it into several files")
        if suffix in JSON_LINES:
            table = _read_json_lines(text, where)
        elif suffix == ".json":
            table = _read_json(text, where)
        else:
            table = _read_separated(text, where, is_image, spaces=suffix in LISTS)
            return table and _note_encoding(table, encoding)
    table = table and _note_encoding(table, encoding)
    if table is None or not any(_hits(cells, is_image) for cells in table.columns.values()):
        return table if PurePosixPath(name).stem.lower() == "metadata" and table else None
    return table


def _note_encoding(table: Table, encoding: str) -> Table:
    """Add a note where the encoding is a guess: bytes of any 8-bit code page are cp1252."""
    if encoding != "cp1252":
        return table
    note = "it is not UTF-8 and was read as Windows-1252; save it as UTF-8 if texts look wrong"
    return replace(table, notes=(*table.notes, note))


def _hits(cells: Sequence[Any], is_image: Names) -> int:
    return sum(map(is_image, cells[:1000]))


def _read_json_lines(text: str, where: str) -> Table | None:
    """Read one mapping a line. Lines end at "\\n" alone: JSON may hold other separators."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{where} line {number} is not of the form {FORM}: {error}") from error
        if row is not None and not isinstance(row, dict):
            raise ValueError(f"{where} line {number} is not of the form {FORM}")
        rows += [] if row is None else [row]
    return _from_rows(rows)


SEPARATOR = re.compile(r'"?sep=(.)"?\r?\n')  # Excel's first line of a CSV
FORM = '{"file_name": "a.png", "text": "..."}'


def _read_json(text: str, where: str) -> Table | None:
    """Read a list of mappings, or a mapping from image names to a label, caption or mapping."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if isinstance(value, dict):
        items = list(value.items())
        if all(isinstance(cell, dict) for cell in value.values()):
            return _from_rows([{**cell, "file_name": name} for name, cell in items])
        columns = {
            "file_name": [name for name, _ in items],
            "column 2": [cell for _, cell in items],
        }
        return Table(columns, has_header=False) if items else None
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        return _from_rows(value)
    return None


def _from_rows(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return rows of any keys as columns."""
    keys = dict.fromkeys(key for row in rows for key in row)
    if len(keys) > 1000:  # rows that share no keys are no table
        return None
    return Table({key: [row.get(key) for row in rows] for key in keys}) if keys else None


def _read_separated(text: str, where: str, is_image: Names, spaces: bool) -> Table | None:
    """Read CSV with any usual separator, with or without a header, or a list "name label"."""
    separators = [",", ";", "\t", "|"]
    if stated := SEPARATOR.match(text):
        separators, text = [stated[1]], text[stated.end() :]
    for separator in separators:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
        except csv.Error as error:
            raise ValueError(f"{where} is no CSV: {error}") from error
        rows = [row for row in rows if any(row)]
        if (table := _from_cells(rows, is_image, separator)) is not None:
            return table
    if not spaces:
        return None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    # A label is one word; a caption is what follows the name.
    for split in (lambda line: line.rsplit(None, 1), lambda line: line.split(None, 1)):
        if (table := _from_cells(list(map(split, lines)), is_image)) is not None:
            return table
    return None


def _from_cells(
    rows: Sequence[Sequence[str]], is_image: Names, separator: str = ""
) -> Table | None:
    """Return rows as columns if one of them names images in at least one of two rows.

    What a row has beyond the header belongs to its last cell: text with an unquoted separator.
    """
    width = max(map(len, rows), default=0)
    if width < 2 or width > 1000:
        return None
    sample = rows[:200]
    hits = [sum(len(row) > k and is_image(row[k]) for row in sample) for k in range(width)]
    header = [cell.strip() for cell in rows[0]]
    has_header = not any(map(is_image, rows[0])) and len(set(header)) == len(header)
    known = has_header and any(name.lower() in HEADERS for name in header)
    if not known and 2 * max(hits) < len(sample) - has_header:
        return None
    if max(hits) == 0 and not known:
        return None
    body, notes = rows[1:] if has_header else rows, ()
    width_given = len(header) if has_header and separator else width
    if longer := sum(any(row[width_given:]) for row in body):
        last = width_given - 1
        body = [
            [*row[:last], separator.join(row[last:])] if any(row[width_given:]) else row
            for row in body
        ]
        notes = (
            f"{longer:,} of {len(body):,} rows have more cells than the header; the rest was "
            f"joined to the last one; put text that holds {separator!r} in quotes",
        )
    keys = header if has_header else [f"column {k + 1}" for k in range(width)]
    keys += [f"column {k + 1}" for k in range(len(keys), width)]
    columns = {
        key: [row[k] if len(row) > k else None for row in body] for k, key in enumerate(keys)
    }
    return Table(columns, has_header, notes) if body else None


HEADERS = ("file_name", "filename", "file", "image", "image_path", "path", "image_id", "filepath")


BITS = {"0": False, "0.0": False, "False": False, "1": True, "1.0": True, "True": True}


def join_one_hot(table: Table, candidates: Sequence[str]) -> tuple[Table, list[str]]:
    """Return a table, and its candidates, with columns of zeros and ones as one column "label".

    Each row has a single 1, and the columns' names are the classes; other tables stay as they are.
    """

    def is_binary(name: str) -> bool:
        return all(str(cell).strip() in BITS for cell in table.columns[name])

    classes = [name for name in candidates if is_binary(name)]
    rows = zip(*(table.columns[name] for name in classes), strict=True)
    ones = [
        [name for name, cell in zip(classes, row, strict=True) if BITS[str(cell).strip()]]
        for row in rows
    ]
    if len(classes) < 2 or any(len(names) != 1 for names in ones):
        return table, list(candidates)
    rest = [name for name in table.columns if name not in classes]
    columns = {name: table.columns[name] for name in rest}
    note = f"the labels are its columns {classes[0]!r} ... {classes[-1]!r}, one-hot"
    joined = {**columns, "label": [names[0] for names in ones]}
    table = replace(table, columns=joined, notes=(*table.notes, note))
    return table, [*(name for name in candidates if name in rest), "label"]


def _read_parquet(store: Store, name: str) -> Table:
    """Read the columns of a parquet file, without those that hold bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{store.root}/{name}"
    try:
        file = pq.ParquetFile(pa.BufferReader(store.bytes(name)))
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > MAX_TABLE_BYTES:
            raise ValueError("it unpacks to too many bytes; split it into several files")
        kept = [f.name for f in file.schema_arrow if not pa.types.is_binary(f.type)]
        table = file.read(columns=kept)
    except UnreadableImage as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{where} is no readable parquet file: {error}") from error
    columns: dict[str, list[Any]] = {}
    notes: list[str] = []
    for key in table.column_names:
        try:
            columns[key] = table.column(key).to_pylist()
        except Exception as error:  # of several types, e.g. for a date beyond the year 9999
            notes.append(f"column {escape_name(key)!r} of {where} was left out: {error}")
    return Table(columns, notes=tuple(notes))
