"""Sources whose images are rows: Hugging Face datasets, prepared folders, and .npz arrays."""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.core.files import read_json
from mezzotint.core.npz_files import npz_names, read_npz
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.sources import decode_image, hash_parts, split_indices
from mezzotint.data.transforms import UnreadableImage

CARD = "mezzotint.json"  # of a prepared folder
CARD_KEYS = {"count", "channels", "size", "crop", "label_names", "fingerprint", "left_out"}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "txt")


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
        if card["format"] != 1:
            raise ValueError(f"format {card['format']}, this version reads format 1")
        if missing := CARD_KEYS - card.keys():
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        return card
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CARD} is damaged or foreign: {error!r}; prepare the folder again"
        ) from error


def open_prepared(folder: Path, split: str | None) -> PreparedSource:
    """Open a prepared folder, or its split "train" or "test" (every tenth)."""
    card = read_card(folder)
    try:
        table = _table(str(folder.resolve()), card["fingerprint"])
        if table.num_rows != card["count"]:
            raise ValueError(f"{table.num_rows} rows, its card has {card['count']}")
        labels = (
            table.column("label").fill_null(NO_LABEL).to_numpy() if card["label_names"] else None
        )
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


@dataclass(frozen=True)
class TableSource:
    """A Hugging Face dataset with a column of encoded images."""

    images: Any  # datasets.Dataset of one column, undecoded
    captions: Any  # datasets.Dataset of one column, or None
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Return the row number, and the file name if there is one."""
        path = (self._cell(i) or {}).get("path")
        return f"row {i}" + (f" ({os.path.basename(path)})" if path else "")

    def read(self, i: int) -> Image.Image:
        """Return the opened image."""
        cell = self._cell(i)
        if cell is None:
            raise UnreadableImage("an empty cell")
        if cell.get("bytes") is not None:
            return decode_image(cell["bytes"])
        try:
            return decode_image(Path(cell["path"]).read_bytes())
        except OSError as error:
            raise UnreadableImage(f"{type(error).__name__}: {error.strerror}") from error

    def text(self, i: int) -> str | None:
        """Return the caption; the first if there are several."""
        cell = None if self.captions is None else next(iter(self.captions[i].values()))
        return (cell[0] if cell else None) if isinstance(cell, list) else cell

    def identity(self) -> str:
        """Return the hash of every row's byte count and label; the bytes may be terabytes."""
        lengths = [self._lengths(start) for start in range(0, len(self), 4096)]
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hash_parts([*(length.tobytes() for length in lengths), labels])

    def _lengths(self, start: int) -> np.ndarray:
        import pyarrow.compute

        column = self.images.with_format("arrow")[start : start + 4096].column(0).combine_chunks()
        call = pyarrow.compute.call_function
        lengths = call("binary_length", [column.field("bytes")])
        return call("coalesce", [lengths, -1]).to_numpy(zero_copy_only=False).astype(np.int64)

    def _cell(self, i: int) -> dict[str, Any] | None:
        return next(iter(self.images[i].values()))


def _column(
    features: Mapping[str, Any], kinds: tuple[type, ...], names: tuple[str, ...]
) -> str | None:
    """Find the first column of one of these types, else of one of these names."""
    typed = [name for name, feature in features.items() if isinstance(feature, kinds)]
    return next((name for name in [*typed, *names] if name in features), None)


def table_source(dataset: Any, what: str) -> TableSource:
    """Wrap a `datasets.Dataset`; its columns are found by type, then by usual names."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = dataset.features
    image = _column(features, (ImageFeature,), IMAGE_COLUMNS)
    if image is None:
        raise ValueError(
            f"{what} has no column of images; columns: {', '.join(features)}; name it 'image'"
        )
    images = dataset.select_columns([image]).cast_column(image, ImageFeature(decode=False))
    caption = _column(features, (), TEXT_COLUMNS)
    captions = None if caption is None else dataset.select_columns([caption])
    label = _column(features, (ClassLabel,), LABEL_COLUMNS)
    labels, names = (None, None) if label is None else _labels(dataset, label, what)
    return TableSource(images, captions, labels, names)


def _labels(dataset: Any, column: str, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    from datasets import ClassLabel

    cells = dataset.select_columns([column])[:][column]
    feature = dataset.features[column]
    if any(isinstance(cell, str) for cell in cells):
        names = tuple(sorted({cell for cell in cells if cell is not None}))
        index = {name: i for i, name in enumerate(names)}
        return np.array([NO_LABEL if c is None else index[c] for c in cells], dtype=np.int64), names
    try:
        labels = np.array([NO_LABEL if c is None else int(c) for c in cells], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {column!r} of {what} holds no classes: {error}; give whole numbers or words"
        ) from error
    if isinstance(feature, ClassLabel):
        return labels, tuple(feature.names)
    if labels.min() < NO_LABEL:
        raise ValueError(f"column {column!r} of {what} holds the negative label {labels.min()}")
    return labels, tuple(map(str, range(int(labels.max()) + 1)))


def open_table(path: str, split: str | None, builder: str | None = None) -> TableSource:
    """Open a dataset by hub name or folder, or files by `builder`: parquet, arrow, webdataset."""
    import datasets

    try:
        if builder is not None:
            parts = datasets.load_dataset(builder, data_files={"train": path})
        elif (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
            parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
        else:
            parts = datasets.load_dataset(path)
    except Exception as error:  # the hub, the network and every builder raise their own
        raise ValueError(
            f"{path!r} cannot be opened as a dataset ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); give a folder or zip of images, parquet files, or a "
            "Hugging Face dataset as OWNER/NAME"
        ) from error
    return table_source(_select_split(parts, split, path), path)


def _select_split(parts: Any, split: str | None, what: str) -> Any:
    """Return a split; every tenth row is the test split of a dataset with a single split."""
    import datasets

    if split in parts:
        return (
            _tenths(parts[split], split) if split == "train" and len(parts) == 1 else parts[split]
        )
    if split is None and ("train" in parts or len(parts) == 1):
        return parts["train"] if "train" in parts else next(iter(parts.values()))
    if split == "all":
        return datasets.concatenate_datasets(list(parts.values()))
    if split in ("train", "test") and len(parts) == 1:
        return _tenths(next(iter(parts.values())), split)
    raise ValueError(f"{what} has no split {split!r}; it has {', '.join(parts)}")


def _tenths(dataset: Any, split: str) -> Any:
    return dataset.select(split_indices(len(dataset), split, None))


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
        rows, prefix = split_indices(len(pixels), split or "all", None), ""
        labels = arrays.get("arr_1")
    else:
        prefix = f"{split or 'train'}_"
        if f"{prefix}blob" not in arrays or f"{prefix}offsets" not in arrays:
            raise ValueError(
                f"{path} holds {', '.join(arrays)}, but not {prefix}blob and {prefix}offsets; "
                f"{form}"
            )
        rows, labels = np.arange(len(arrays[f"{prefix}offsets"]) - 1), arrays.get(f"{prefix}labels")
    if labels is None:
        return NpzSource(str(path), modified_ns, prefix, rows, None, None)
    labels = labels[rows].astype(np.int64)
    names = map(str, arrays["classes"] if "classes" in arrays else range(int(labels.max()) + 1))
    return NpzSource(str(path), modified_ns, prefix, rows, labels, tuple(names))
