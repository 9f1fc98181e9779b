"""Images of an .npz: encoded ones in a blob, or pixels in arrays of the usual names."""

from __future__ import annotations

import functools
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.core.npz_files import BOMB_BYTES, BOMB_RATIO, npz_names, read_npz
from mezzotint.data.decode import decode_image
from mezzotint.data.labels import read_labels
from mezzotint.data.sources import SPLITS, hash_parts, split_indices
from mezzotint.data.splits import choose_split, split_kinds

IMAGE_WORDS = frozenset(
    ["images", "image", "imgs", "img", "x", "data", "pixels", "pictures", "samples", "blob"]
)
LABEL_WORDS = frozenset(["labels", "label", "y", "targets", "target", "class"])
FORM = (
    "give uint8 images (n, h, w, c), (n, c, h, w) or (n, h, w) as arr_0, images or x, or as "
    "train_images and test_images, their labels as arr_1, labels or y; or {train,test}_blob, "
    "_offsets, _labels, classes"
)
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class NpzSource:
    """Arrays of an .npz: encoded images in one blob with offsets, or pixels.

    arrays: names of the arrays of images, which follow one another.
    rows: (n,) int, of the images, counted over all these arrays.
    """

    path: str
    modified_ns: int
    arrays: tuple[str, ...]
    rows: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Return the array and the row in it."""
        array, row = self._locate(i)
        prefix = array.removesuffix("blob") if array.endswith("_blob") else f"{array} "
        return f"row {row}" if array == "arr_0" else f"{prefix}row {row}"

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Return the opened image, or uint8 pixels (c, h, w)."""
        stored = self._stored(i)
        return decode_image(stored.tobytes()) if stored.ndim == 1 else _to_image(stored)

    def text(self, i: int) -> None:
        """Return None: there are no captions."""
        return None

    def identity(self) -> str:
        """Return the hash of all bytes, the split's rows and the labels."""
        arrays = _npz(self.path, self.modified_ns)
        labels = b"" if self.labels is None else self.labels.tobytes()
        pixels = (arrays[name].tobytes() for name in self.arrays)
        return hash_parts([*pixels, self.rows.tobytes(), labels])

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return the rows, and the bytes of their images."""
        sizes = [self._stored(i).nbytes for i in range(len(self))]
        return [self.name(i) for i in range(len(self))], np.array(sizes, np.int64)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the row's bytes."""
        return zlib.crc32(self._stored(i).tobytes())

    def _locate(self, i: int) -> tuple[str, int]:
        """Return the array of image i, and its row there."""
        arrays, row = _npz(self.path, self.modified_ns), int(self.rows[i])
        for name in self.arrays[:-1]:
            if row < (count := _count(arrays, name)):
                return name, row
            row -= count
        return self.arrays[-1], row

    def _stored(self, i: int) -> np.ndarray:
        """Return the bytes of image i (bytes,), encoded, or its pixels."""
        arrays = _npz(self.path, self.modified_ns)
        name, row = self._locate(i)
        if not name.endswith("_blob"):
            return arrays[name][row]
        first, last = arrays[_offsets(name)][row : row + 2]
        return arrays[name][first:last]


def _to_image(pixels: np.ndarray) -> Image.Image | np.ndarray:
    """Return one image of an array: uint8 (c, h, w), or an image for alpha or more than 8 bits."""
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8:
        kept = pixels if pixels.dtype == np.uint16 else pixels.astype(np.float32)
        return Image.fromarray(np.ascontiguousarray(kept))
    if pixels.ndim == 2:
        return np.ascontiguousarray(pixels[None])
    if pixels.shape[-1] == 4:
        return Image.fromarray(np.ascontiguousarray(pixels))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_pixels(pixels: np.ndarray, what: str) -> None:
    """Check that an array holds images; ValueError for another shape or type."""
    shape = pixels.shape
    grey = len(shape) == 3 or (len(shape) == 4 and 1 in (shape[1], shape[-1]))
    colour = len(shape) == 4 and (shape[-1] in (3, 4) or shape[1] in (3, 4))
    is_eight_bit = pixels.dtype == np.uint8
    if not ((grey and pixels.dtype.kind in "uf") or (colour and is_eight_bit)) or not pixels.size:
        advice = "" if is_eight_bit or not colour else "scale it to 0...255 and round it; "
        raise ValueError(f"{what} is {pixels.dtype} {shape}; {advice}{FORM}")


def _check_blob(blob: np.ndarray, offsets: np.ndarray, what: str) -> None:
    """Check that a blob and its offsets hold encoded images, one after another."""
    is_blob = blob.dtype == np.uint8 and blob.ndim == 1
    is_list = offsets.dtype.kind in "iu" and offsets.ndim == 1 and len(offsets) > 1
    # Unsigned numbers have no negative difference.
    rises = is_list and bool((offsets[1:] >= offsets[:-1]).all())
    if not (is_blob and rises and offsets[0] >= 0 and offsets[-1] <= len(blob)):
        raise ValueError(
            f"{what} is {blob.dtype} {blob.shape}, its offsets {offsets.dtype} {offsets.shape}; "
            "the blob is uint8 (bytes,), the offsets whole numbers (images + 1,) that rise from 0 "
            "to its length"
        )


def _read_classes(names: np.ndarray, path: Path) -> list[str]:
    """Return the names of the classes; ValueError for another shape than (classes,)."""
    if names.ndim != 1 or names.dtype.kind not in "SUiu":
        raise ValueError(
            f"classes of {path} is {names.dtype} {names.shape}; give text of shape (classes,)"
        )
    given = names.tolist()
    return [n.decode("utf-8", "replace") if isinstance(n, bytes) else str(n) for n in given]


@functools.lru_cache(maxsize=4)
def _npz(path: str, modified_ns: int) -> dict[str, np.ndarray]:
    names = npz_names(path)
    wanted = [name for name in names if _role(name)[0] or name == "classes"]
    wanted += [_offsets(name) for name in wanted if _offsets(name) in names]
    most = max(BOMB_BYTES, BOMB_RATIO * os.path.getsize(path))
    return read_npz(path, dict.fromkeys(wanted), max_bytes=most)


def _offsets(blob: str) -> str:
    return f"{blob.removesuffix('blob')}offsets"


def _count(arrays: Arrays, name: str) -> int:
    """Return the number of images in an array, or a blob."""
    return len(arrays[_offsets(name)]) - 1 if name.endswith("_blob") else len(arrays[name])


def _join_labels(
    path: Path, arrays: Arrays, splits: list[tuple[str | None, int]]
) -> np.ndarray | list[Any]:
    """Return the labels of splits that follow one another, None for each image of one without.

    Args:
        splits: name of the array of labels, and number of images.

    Errors: ValueError for another number of labels in a split, or rows of several shapes.
    """
    named = {name: (arrays[name], count) for name, count in splits if name is not None}
    for name, (labels, count) in named.items():
        if labels.ndim == 0 or len(labels) != count:
            found = f"{len(labels):,} labels" if labels.ndim else "one value"
            raise ValueError(
                f"{name} of {path} has {found} for {count:,} images; give one label an image"
            )
    if len({labels.shape[1:] for labels, _ in named.values()}) > 1:
        shapes = ", ".join(f"{name} {labels.shape}" for name, (labels, _) in named.items())
        raise ValueError(f"labels of {path} differ in shape: {shapes}; give them one shape")
    if len(named) == len(splits):
        return np.concatenate([labels for labels, _ in named.values()])
    return [
        label
        for name, count in splits
        for label in ([None] * count if name is None else arrays[name].tolist())
    ]


def _role(name: str) -> tuple[str, str]:
    """Return whether an array holds an "image" or a "label" each, or "", and its split or ""."""
    if name in ("arr_0", "arr_1"):
        return ("image" if name == "arr_0" else "label"), ""
    # "trainX": a word begins at a capital.
    words = [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    split = next((word for word in words if split_kinds([word])), "")
    last = next((word for word in reversed(words) if word != split), "")
    if last in IMAGE_WORDS:
        return "image", split
    return ("label" if last in LABEL_WORDS else ""), split


def _find_arrays(path: Path, arrays: Arrays) -> dict[str, tuple[str, str | None]]:
    """Return split -> the names of its arrays of images and of labels; "" for no split."""
    found: dict[str, tuple[str, str | None]] = {}
    for name in arrays:
        role, split = _role(name)
        if role != "image" or (name.endswith("_blob") and _offsets(name) not in arrays):
            continue
        if split in found:
            raise ValueError(
                f"{path} holds two arrays of images, {found[split][0]} and {name}; leave one out"
            )
        found[split] = name, None
    if not found:
        raise ValueError(f"{path} holds {', '.join(npz_names(path)) or 'no array'}; {FORM}")
    for name in arrays:
        role, split = _role(name)
        if role == "label" and split in found:
            images, other = found[split]
            if other is not None:
                raise ValueError(
                    f"{path} holds two arrays of labels, {other} and {name}; leave one out"
                )
            found[split] = images, name
    return found


def open_npz(path: Path, split: str | None) -> NpzSource:
    """Open the images of an .npz in one of three forms.

    Pixels: uint8 (n, h, w, c), (n, c, h, w) or (n, h, w), or grey of more bits, under a usual name
    (images, x_train, test_images, ...) with the labels beside them. ADM's sample batch: "arr_0"
    with optional labels "arr_1". Encoded: "train_blob", "train_offsets" (n + 1), "train_labels",
    the same for "test", and "classes".

    Args:
        split: of those in the arrays' names, or "all"; without names, every tenth image is a test
            image.
    """
    try:
        modified_ns = path.stat().st_mtime_ns
        arrays = _npz(str(path), modified_ns)
    except Exception as error:  # zip, pickle and header errors
        raise ValueError(f"{path} is not a readable .npz ({error}); {FORM}") from error
    found = _find_arrays(path, arrays)
    for images, _ in found.values():
        if images.endswith("_blob"):
            _check_blob(arrays[images], arrays[_offsets(images)], f"{images} of {path}")
        else:
            _check_pixels(arrays[images], f"{images} of {path}")
    counts = {name: _count(arrays, images) for name, (images, _) in found.items()}
    if set(counts) == {""}:
        if split is not None and split not in SPLITS:
            raise ValueError(f"{path} has no split {split!r}; choose one of {', '.join(SPLITS)}")
        chosen, rows = [""], split_indices(counts[""], split or "all", None)
    else:
        is_encoded = any(images.endswith("_blob") for images, _ in found.values())
        if split is None and (is_encoded or len(counts) == 1):
            split = "train" if "train" in counts else next(iter(counts))
        chosen = list(counts) if split == "all" else [choose_split(str(path), counts, split)]
        rows = np.arange(sum(counts[name] for name in chosen))
    names = tuple(found[name][0] for name in chosen)
    cells = [(found[name][1], counts[name]) for name in chosen]
    declared = _read_classes(arrays["classes"], path) if "classes" in arrays else None
    labels = label_names = note = None
    named = [(name, count) for name, count in cells if name is not None]
    if named:
        what = " and ".join(name for name, _ in named)
        given = _join_labels(path, arrays, cells)
        read = read_labels(given, len(given), f"{what} of {path}", declared)
        if read is not None:
            labels, label_names, note = read.indices[rows], read.names, read.note
    notes = (note,) if note else ()
    return NpzSource(str(path), modified_ns, names, rows, labels, label_names, notes)
