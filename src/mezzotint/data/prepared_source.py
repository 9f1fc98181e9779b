"""Folders that `mezzotint prepare` wrote: resized uint8 images, read through a memory map."""

from __future__ import annotations

import bisect
import functools
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.core.files import read_json
from mezzotint.core.json_values import check_fields
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.sources import hash_parts, split_indices

CARD = "mezzotint.json"  # of a prepared folder
CARD_KINDS = {
    **dict.fromkeys(("count", "channels", "size"), int),
    "crop": str,
    "label_names": list[str] | None,
    "fingerprint": str,
    "left_out": list[str],
}


@dataclass(frozen=True)
class PreparedSource:
    """A folder written by `mezzotint.data.prepare`, read through a memory map."""

    folder: str
    rows: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    shape: tuple[int, int, int]  # channels, height, width
    crop: str
    key: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Return the name of image i in its source."""
        return str(self._cell("name", i))

    def read(self, i: int) -> np.ndarray:
        """Return uint8 pixels (c, h, w), a view of the memory map."""
        starts, chunks = _pixels(self.folder, self.key)
        k = bisect.bisect_right(starts, self.rows[i]) - 1
        return chunks[k][self.rows[i] - starts[k]].reshape(self.shape)

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        return self._cell("text", i)

    def identity(self) -> str:
        """Return the hash of the content and of the split's rows."""
        return hash_parts([self.key, self.rows.tobytes()])

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return the names in the source that was prepared, and the bytes of the pixels."""
        names = _table(self.folder, self.key).column("name").take(self.rows).to_pylist()
        return list(map(str, names)), np.full(len(self), np.prod(self.shape), np.int64)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the pixels."""
        return zlib.crc32(self.read(i).tobytes())

    def _cell(self, column: str, i: int) -> Any:
        return _table(self.folder, self.key).column(column)[int(self.rows[i])].as_py()


@functools.lru_cache(maxsize=8)
def _table(folder: str, key: str) -> Any:
    """Map the rows of a prepared folder as an Arrow table; `key` changes if prepared again."""
    import pyarrow as pa

    parts = [
        pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        for path in sorted(Path(folder).glob("*.arrow"))
    ]
    return pa.concat_tables(parts)


@functools.lru_cache(maxsize=8)
def _pixels(folder: str, key: str) -> tuple[list[int], list[np.ndarray]]:
    """Return first rows and uint8 views (rows, row bytes) of all batches; 10 x Arrow's speed."""
    chunks = [
        np.frombuffer(chunk.buffers()[2], np.uint8).reshape(len(chunk), -1)
        for chunk in _table(folder, key).column("pixels").chunks
    ]
    return np.cumsum([0, *map(len, chunks)]).tolist()[:-1], chunks


def read_card(folder: Path) -> dict[str, Any]:
    """Read the card of a prepared folder; ValueError if it is damaged."""
    try:
        card = read_json(folder / CARD)
        if card.get("format") != 1:
            raise ValueError(f"format {card.get('format')}, this version reads format 1")
        check_fields(card, CARD_KINDS)
        return card
    except ValueError as error:
        raise ValueError(
            f"{folder / CARD} is damaged or foreign: {error}; prepare the folder again"
        ) from error


def open_prepared(folder: Path, split: str | None) -> PreparedSource:
    """Open a prepared folder, or its split "train" or "test" (every tenth)."""
    card = read_card(folder)
    try:
        table = _table(str(folder.resolve()), card["fingerprint"])
        if table.num_rows != card["count"]:
            raise ValueError(f"{table.num_rows} rows, its card has {card['count']}")
        row_bytes = {
            pixels.shape[1] for pixels in _pixels(str(folder.resolve()), card["fingerprint"])[1]
        }
        if card["size"] < 1 or row_bytes != {card["channels"] * card["size"] ** 2}:
            raise ValueError(f"images of {row_bytes} bytes, its card has another size")
        labels = (
            table.column("label").fill_null(NO_LABEL).to_numpy() if card["label_names"] else None
        )
        if labels is not None and labels.max(initial=NO_LABEL) >= len(card["label_names"]):
            raise ValueError(f"label {labels.max()} of {len(card['label_names'])} classes")
    except (OSError, ValueError, KeyError, IndexError) as error:  # ArrowInvalid is a ValueError
        raise ValueError(
            f"prepared folder {folder} is damaged: {error}; prepare it again"
        ) from error
    rows = split_indices(card["count"], split or "all", None)
    shape = (card["channels"], card["size"], card["size"])
    names = tuple(card["label_names"]) if card["label_names"] else None
    labels = None if labels is None else labels[rows].astype(np.int64)
    notes = tuple(f"left out when it was prepared: {name}" for name in card["left_out"])
    return PreparedSource(
        str(folder.resolve()), rows, labels, names, shape, card["crop"], card["fingerprint"], notes
    )
