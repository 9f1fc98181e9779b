"""Folders that `mezzotint prepare` wrote: resized images, read through a memory map."""

from __future__ import annotations

import bisect
import functools
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mezzotint.core.files import read_json
from mezzotint.core.json_values import check_fields
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.prepared_forms import Form, get_form
from mezzotint.data.sources import hash_parts, split_indices
from mezzotint.data.transforms import UnreadableImage, to_array, to_mode

CARD = "mezzotint.json"  # of a prepared folder
CARD_KINDS = {
    **dict.fromkeys(("count", "channels", "size"), int),
    "crop": str,
    "label_names": list[str] | None,
    "fingerprint": str,
    "form": str,
    "left_out": list[str],
}


@dataclass(frozen=True)
class PreparedSource:
    """A folder written by `mezzotint.data.prepare`, read through a memory map.

    form: how the images are stored.
    """

    folder: str
    rows: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    shape: tuple[int, int, int]  # channels, height, width
    crop: str
    key: str
    form: Form
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Return the name of image i in its source."""
        return str(self._cell("name", i))

    def read(self, i: int) -> np.ndarray | Image.Image:
        """Return raw pixels as uint8 (c, h, w), a view of the memory map, else a Pillow image.

        Errors: `UnreadableImage` for bytes that are damaged.
        """
        return self.form.decode(self._stored(i), self.shape)

    def _stored(self, i: int) -> np.ndarray:
        """Return the stored bytes of image i as uint8, a view of the memory map."""
        starts, chunks = _pixels(self.folder, self.key)
        k = bisect.bisect_right(starts, self.rows[i]) - 1
        return chunks[k].row(int(self.rows[i]) - starts[k])

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        return self._cell("text", i)

    def identity(self) -> str:
        """Return the hash of the content and of the split's rows."""
        return hash_parts([self.key, self.rows.tobytes()])

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return the names in the source that was prepared, and the bytes of the pixels.

        Of a lossy form, the stored bytes.
        """
        names = _table(self.folder, self.key).column("name").take(self.rows).to_pylist()
        if self.form.is_lossless:
            num_bytes = np.full(len(self), np.prod(self.shape), np.int64)
        else:
            num_bytes = np.array([len(self._stored(i)) for i in range(len(self))], np.int64)
        return list(map(str, names)), num_bytes

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the pixels, so that lossless forms agree; of a lossy form's bytes.

        Another version of a lossy decoder may give other pixels.
        """
        if not self.form.is_lossless:
            return zlib.crc32(self._stored(i).tobytes())
        stored = self.read(i)
        is_array = isinstance(stored, np.ndarray)
        pixels = stored if is_array else to_array(to_mode(stored, self.shape[0]))
        return zlib.crc32(pixels.tobytes())

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


class _Chunk(NamedTuple):
    """Stored bytes of a record batch; row r is bytes ends[r] ... ends[r + 1]."""

    ends: np.ndarray
    stored: np.ndarray

    def row(self, r: int) -> np.ndarray:
        return self.stored[self.ends[r] : self.ends[r + 1]]


@functools.lru_cache(maxsize=8)
def _pixels(folder: str, key: str) -> tuple[list[int], list[_Chunk]]:
    """Return first rows and stored bytes of all batches, as views; 10 x Arrow's speed."""
    chunks = []
    for chunk in _table(folder, key).column("pixels").chunks:
        _, ends, stored = chunk.buffers()  # of Arrow's type binary: validity, int32 offsets, bytes
        ends = np.frombuffer(ends, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        chunks.append(_Chunk(ends, np.frombuffer(stored, np.uint8)))
    return np.cumsum([0, *(len(chunk.ends) - 1 for chunk in chunks)]).tolist()[:-1], chunks


def read_card(folder: Path) -> dict[str, Any]:
    """Read the card of a prepared folder; ValueError if it is damaged."""
    try:
        card = read_json(folder / CARD)
        if card.get("format") != 1:
            raise ValueError(f"format {card.get('format')}, this version reads format 1")
        card.setdefault("form", "raw")
        check_fields(card, CARD_KINDS)
        get_form(card["form"])
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
        _check_rows(card, _pixels(str(folder.resolve()), card["fingerprint"])[1])
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
    form = get_form(card["form"])
    notes = [form.note] if form.note else []
    notes += [f"left out when it was prepared: {name}" for name in card["left_out"]]
    return PreparedSource(
        str(folder.resolve()), rows, labels, names, shape, card["crop"], card["fingerprint"], form,
        tuple(notes),
    )  # fmt: skip


def _check_rows(card: dict[str, Any], chunks: list[_Chunk]) -> None:
    """Raise ValueError where rows do not lie in their bytes, or are no images of the card's."""
    for chunk in chunks:
        lengths = np.diff(chunk.ends)
        if lengths.min(initial=0) < 0 or not 0 <= chunk.ends[0] <= chunk.ends[-1] <= len(
            chunk.stored
        ):
            raise ValueError("rows reach beyond their bytes")
        if card["form"] == "raw" and set(lengths) != {card["channels"] * card["size"] ** 2}:
            raise ValueError(f"images of {set(lengths)} bytes, its card has another size")
    form, shape = get_form(card["form"]), (card["size"], card["size"])
    if card["size"] < 1 or card["channels"] not in (1, 3):
        raise ValueError(f"images of size {card['size']} and {card['channels']} channels")
    if not form.is_raw:
        with suppress(UnreadableImage):  # reading it for a batch reports the reason
            first = form.decode(chunks[0].row(0), shape)
            if isinstance(first, Image.Image) and first.size != shape:
                raise ValueError(f"images of {first.size} pixels, its card has another size")
