"""Images of an .npz: encoded ones in a blob, or uint8 pixels."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mezzotint.core.npz_files import npz_names, read_npz
from mezzotint.data.decode import decode_image
from mezzotint.data.labels import read_labels
from mezzotint.data.sources import hash_parts, split_indices


@dataclass(frozen=True)
class NpzSource:
    """Arrays of an .npz: encoded images in one blob with offsets, or uint8 pixels.

    prefix: of the arrays' names, e.g. "train_".
    """

    path: str
    modified_ns: int
    prefix: str
    rows: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Return the row."""
        return f"{self.prefix}row {self.rows[i]}"

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Return the opened image, or uint8 pixels (c, h, w)."""
        arrays, row = _npz(self.path, self.modified_ns), int(self.rows[i])
        if "arr_0" in arrays:
            return np.ascontiguousarray(arrays["arr_0"][row].transpose(2, 0, 1))
        first, last = arrays[f"{self.prefix}offsets"][row : row + 2]
        return decode_image(arrays[f"{self.prefix}blob"][first:last].tobytes())

    def text(self, i: int) -> None:
        """Return None: there are no captions."""
        return None

    def identity(self) -> str:
        """Return the hash of all bytes, the split's rows and the labels."""
        arrays = _npz(self.path, self.modified_ns)
        name = "arr_0" if "arr_0" in arrays else f"{self.prefix}blob"
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hash_parts([arrays[name].tobytes(), self.rows.tobytes(), labels])

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return the rows, and the bytes of their images."""
        sizes = [self._stored(i).nbytes for i in range(len(self))]
        return [self.name(i) for i in range(len(self))], np.array(sizes, np.int64)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the row's bytes."""
        return zlib.crc32(self._stored(i).tobytes())

    def _stored(self, i: int) -> np.ndarray:
        """Return the bytes of image i, encoded, or its pixels."""
        arrays, row = _npz(self.path, self.modified_ns), int(self.rows[i])
        if "arr_0" in arrays:
            return arrays["arr_0"][row]
        first, last = arrays[f"{self.prefix}offsets"][row : row + 2]
        return arrays[f"{self.prefix}blob"][first:last]


@functools.lru_cache(maxsize=4)
def _npz(path: str, modified_ns: int) -> dict[str, np.ndarray]:
    return read_npz(path, npz_names(path))


def open_npz(path: Path, split: str | None) -> NpzSource:
    """Open the images of an .npz in one of two forms.

    Encoded: "train_blob", "train_offsets" (n + 1), "train_labels", the same for "test", and
    "classes". Or ADM's sample batch: "arr_0" uint8 (n, h, w, c) with optional labels "arr_1".
    """
    form = "give {train,test}_blob, _offsets, _labels, classes; or arr_0 as uint8 (n, h, w, c)"
    try:
        modified_ns = path.stat().st_mtime_ns
        arrays = _npz(str(path), modified_ns)
    except Exception as error:  # zip, pickle and header errors
        raise ValueError(f"{path} is not a readable .npz ({error}); {form}") from error
    if "arr_0" in arrays:
        pixels = arrays["arr_0"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
            raise ValueError(f"arr_0 of {path} is {pixels.dtype} {pixels.shape}; {form}")
        count, prefix = len(pixels), ""
        rows = split_indices(count, split or "all", None)
        labels = arrays.get("arr_1")
    else:
        prefix = f"{split or 'train'}_"
        if f"{prefix}blob" not in arrays or f"{prefix}offsets" not in arrays:
            raise ValueError(
                f"{path} holds {', '.join(arrays)}, but not {prefix}blob and {prefix}offsets; "
                f"{form}"
            )
        count = len(arrays[f"{prefix}offsets"]) - 1
        rows, labels = np.arange(count), arrays.get(f"{prefix}labels")
    if labels is None:
        return NpzSource(str(path), modified_ns, prefix, rows, None, None)
    declared = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    name = "arr_1" if "arr_0" in arrays else f"{prefix}labels"
    found = read_labels(labels, count, f"{name} of {path}", declared)
    if found is None:
        return NpzSource(str(path), modified_ns, prefix, rows, None, None)
    notes = (found.note,) if found.note else ()
    labels = found.indices[rows]
    return NpzSource(str(path), modified_ns, prefix, rows, labels, found.names, notes)
