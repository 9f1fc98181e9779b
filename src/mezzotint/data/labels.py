"""Class labels: the classes that labels of any kind stand for, their order, and their numbers."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from mezzotint.core.registry import suggest

NO_LABEL = -1  # in `Labels.indices`
FEW_CLASSES = 1000  # up to which every image may have a class of its own
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
WRITTEN_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})(\.[0-9]{0,99})?")  # "007" is a name
NULLS = ("nan", "null", "none", "na", "n/a")  # beside numbers; elsewhere "none" may be a class
ADVICE = "give each image the name of a class, or its number from 0"

Cell = bool | int | float | str | None


class Labels(NamedTuple):
    """Class indices, int64 (n,), NO_LABEL for an image without one, and the classes' names.

    note: a sentence for the report where the values are not the indices, or "".
    """

    indices: np.ndarray
    names: tuple[str, ...]
    note: str = ""


def sort_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names in order: by value if all are numbers ("2" before "10"), else by name."""
    distinct = set(names)
    if all(NUMBER.fullmatch(name) for name in distinct):
        return tuple(sorted(distinct, key=lambda name: (Decimal(name), name)))
    return tuple(sorted(distinct))


def find_class(label: str, names: Sequence[str] | None) -> int:
    """Return the index of a class given as text: the class of this name, else of this index.

    Errors: ValueError with similar names. Where classes are named by numbers that are not their
        indices, a number that is no name is an error too.
    """
    names = names or ()
    if label in names:
        return names.index(label)
    is_index = label.isascii() and label.isdigit() and len(label) < 10
    ids = bool(names) and all(NUMBER.fullmatch(name) for name in names)
    if is_index and (not ids or list(names) == [str(i) for i in range(len(names))]):
        return int(label)
    advice = suggest(label, names) if names else "this model has no label names"
    raise ValueError(f"unknown label {label!r}; {advice}")


def read_labels(
    cells: Any, count: int, what: str, names: Sequence[str] | None = None
) -> Labels | None:
    """Return the classes that `cells` stand for; None where no image has a label.

    Whole numbers that are nearly all of 0 ... n-1 are class indices; of other values, the
    different ones are the classes, in order. Memory depends on the number of cells alone.

    Args:
        cells: one an image, an array or a list: numbers, names, booleans, bytes, one-hot rows,
            lists of one. None, NaN, "" and -1 are no label.
        count: number of images.
        what: the labels' place, for errors.
        names: of classes 0 ... n-1, where the source has them.

    Errors: ValueError for another number of cells, and for values that are no classes.
    """
    if isinstance(cells, np.ndarray):
        cells = _array_cells(cells, what)
    if len(cells) != count:
        raise ValueError(
            f"{what} has {len(cells):,} labels for {count:,} images; give one label an image"
        )
    cells, length = _one_hot_to_index([_unwrap(cell) for cell in cells], what)
    if names is None and length:
        names = [str(i) for i in range(length)]
    plain = [_to_plain(cell, what) for cell in cells]
    if names is not None:
        return Labels(_declared(plain, list(names), what), tuple(names))
    plain = _parse_numbers(plain)
    plain = [None if type(cell) is int and cell == NO_LABEL else cell for cell in plain]
    kinds = {type(cell) for cell in plain if cell is not None}
    if not kinds:
        return None
    if kinds == {int}:
        return _whole_numbers(plain, what)
    if kinds <= {int, float}:
        return _distinct(plain, sorted, what, few=0)
    if kinds == {bool}:
        return _distinct(plain, sorted, what)
    plain = [None if cell is None else class_name(cell) for cell in plain]
    return _distinct(plain, sort_classes, what)


def class_name(cell: Cell) -> str:
    """Return a value as the name of a class: 2.0 as "2", True as "true"."""
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() else repr(cell)
    return str(cell)


def _array_cells(array: np.ndarray, what: str) -> list[Any]:
    """Return one cell an image of an array (n,), (n, 1) or one-hot (n, k)."""
    if array.dtype.kind not in "biufSUM" or array.ndim not in (1, 2):
        raise ValueError(
            f"{what} is {array.dtype} {array.shape}; labels are numbers or text of shape (n,), "
            "(n, 1), or one-hot (n, k)"
        )
    if array.ndim == 1 or array.shape[1] == 1:
        array = array.reshape(-1)
        return array.astype(str).tolist() if array.dtype.kind == "M" else array.tolist()
    return list(array)


def _unwrap(cell: Any) -> Any:
    """Return the one element of a list or array, None for an empty one, else the cell."""
    while _is_row(cell) and len(cell) < 2:
        cell = next(iter(cell), None)
    return cell.item() if isinstance(cell, np.generic) else cell


def _one_hot_to_index(cells: list[Any], what: str) -> tuple[list[Any], int]:
    """Return cells with one-hot rows replaced by their class, and the length of the rows or 0."""
    rows = [cell for cell in cells if _is_row(cell)]
    if not rows:
        return cells, 0
    others = any(cell is not None and not _is_row(cell) for cell in cells)
    try:
        if others or len({len(row) for row in rows}) > 1:
            raise ValueError
        matrix = np.array(rows)
        if matrix.ndim != 2 or matrix.dtype.kind not in "biuf" or not np.isin(matrix, (0, 1)).all():
            raise ValueError
        sums = matrix.astype(bool).sum(axis=1)
        if sums.max() > 1:
            raise ValueError
    except (ValueError, TypeError):
        first = str(list(rows[0])[:8])[:80]
        raise ValueError(
            f"{what} holds lists that are no classes, first {first}; a list is one value, or "
            f"one-hot: as many zeros as classes, and a single 1; {ADVICE}"
        ) from None
    found = iter(np.where(sums == 0, NO_LABEL, matrix.argmax(axis=1)).tolist())
    return [next(found) if _is_row(cell) else None for cell in cells], matrix.shape[1]


def _is_row(cell: Any) -> bool:
    return isinstance(cell, list | tuple) or (isinstance(cell, np.ndarray) and cell.ndim > 0)


def _to_plain(cell: Any, what: str) -> Cell:
    """Return a cell as a number, a name, or None for no label."""
    if isinstance(cell, bytes | bytearray):
        try:
            cell = cell.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{what} holds bytes that are no text; {ADVICE}") from None
    if isinstance(cell, str):
        # Arrow and JSON take no lone surrogates.
        return cell.strip().encode("utf-8", "replace").decode() or None
    if cell is None or isinstance(cell, bool | int):
        return cell
    if isinstance(cell, float | Decimal):
        if cell != cell:
            return None
        if math.isinf(cell):
            raise ValueError(f"{what} holds {cell}, which is no class; {ADVICE}")
        return int(cell) if cell == int(cell) else float(cell)
    if isinstance(cell, datetime.date | datetime.time | datetime.timedelta):
        return str(cell)
    raise ValueError(f"{what} holds a {type(cell).__name__}, which is no class; {ADVICE}")


def _parse_numbers(plain: list[Cell]) -> list[Cell]:
    """Return numbers where all cells are numbers written as text, as in CSV."""
    words = [cell for cell in plain if cell is not None]
    if not all(isinstance(word, str) for word in words):
        return plain
    numbers = [bool(WRITTEN_NUMBER.fullmatch(str(word))) for word in words]
    nulls = [str(word).lower() in NULLS for word in words]
    if not any(numbers) or not all(a or b for a, b in zip(numbers, nulls, strict=True)):
        return plain

    def parse(word: Cell) -> Cell:
        if word is None or str(word).lower() in NULLS:
            return None
        value = Decimal(str(word))
        return int(value) if value == value.to_integral_value() else float(value)

    return [parse(word) for word in plain]


def _declared(plain: list[Cell], names: list[str], what: str) -> np.ndarray:
    """Return the indices of cells in declared classes: by name, else by number."""
    index = {name: i for i, name in enumerate(names)}

    def find(cell: Cell) -> int:
        if cell is None or cell == NO_LABEL:
            return NO_LABEL
        if isinstance(cell, str) and cell in index:
            return index[cell]
        number = int(cell) if isinstance(cell, bool | int) or _is_index(cell) else NO_LABEL
        if not 0 <= number < len(names):
            raise ValueError(
                f"{what} has label {str(cell)[:80]} but only {len(names)} classes; {ADVICE}"
            )
        return number

    return np.array([find(cell) for cell in plain], dtype=np.int64)


def _is_index(cell: Cell) -> bool:
    return isinstance(cell, str) and cell.isascii() and cell.isdigit() and len(cell) < 10


def _whole_numbers(plain: list[Any], what: str) -> Labels:
    values = sorted({cell for cell in plain if cell is not None})
    if values[0] < 0:
        raise ValueError(f"{what} holds the negative label {values[0]}; {ADVICE}")
    # A class may have no image in this split: a third of 0 ... n-1 may be missing.
    if values[0] == 0 and 2 * (values[-1] + 1) <= 3 * len(values):
        _check_count(plain, len(values), what, FEW_CLASSES)
        indices = np.array([NO_LABEL if cell is None else cell for cell in plain], dtype=np.int64)
        return Labels(indices, tuple(map(str, range(values[-1] + 1))))
    found = _distinct(plain, sorted, what)
    return found._replace(
        note=f"{what}: {len(values):,} classes are the different numbers {values[0]} ... "
        f"{values[-1]}, in order; they are not 0 ... n-1"
    )


def _distinct(
    plain: list[Any], order: Callable[..., Iterable[Any]], what: str, few: int = FEW_CLASSES
) -> Labels:
    """Return labels whose classes are the different values."""
    values = list(order({cell for cell in plain if cell is not None}))
    _check_count(plain, len(values), what, few)
    index = {value: i for i, value in enumerate(values)}
    indices = np.array([NO_LABEL if c is None else index[c] for c in plain], dtype=np.int64)
    return Labels(indices, tuple(class_name(value) for value in values))


def _check_count(plain: list[Any], distinct: int, what: str, few: int) -> None:
    """Raise ValueError for values that hardly repeat: fractions, or more than a few others."""
    labelled = sum(cell is not None for cell in plain)
    if distinct > max(few, labelled // 2):
        example = next(cell for cell in plain if cell is not None)
        raise ValueError(
            f"{what} holds {distinct:,} different values in {labelled:,} images, first "
            f"{str(example)[:80]!r}: these are no classes; {ADVICE}"
        )
