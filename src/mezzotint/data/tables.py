"""Sources whose samples are rows: Hugging Face data sets, our own prepared folders, and .npz arrays."""

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
from mezzotint.data.sources import NO_LABEL, decode_image, hash_parts, split_indices
from mezzotint.data.transforms import UnreadableImage

CARD = "mezzotint.json"  # beside the Arrow files of a prepared folder
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
        """The name it had where it came from."""
        return str(self._cell("name", i))

    def read(self, i: int) -> np.ndarray:
        """uint8 (c, h, w), a view of the map."""
        starts, chunks = _pixels(self.folder, self.key)
        k = bisect.bisect_right(starts, self.rows[i]) - 1
        return chunks[k][self.rows[i] - starts[k]].reshape(self.shape)

    def text(self, i: int) -> str | None:
        """Its caption."""
        return self._cell("text", i)

    def identity(self) -> str:
        """Of the content written, and of the rows chosen."""
        return hash_parts([self.key, self.rows.tobytes()])

    def _cell(self, column: str, i: int) -> Any:
        return _table(self.folder, self.key).column(column)[int(self.rows[i])].as_py()


@functools.lru_cache(maxsize=8)
def _table(folder: str, key: str) -> Any:
    """The rows of a prepared folder as one memory-mapped Arrow table; `key` tells apart what was prepared again."""
    import pyarrow as pa

    parts = [
        pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        for path in sorted(Path(folder).glob("*.arrow"))
    ]
    return pa.concat_tables(parts)


@functools.lru_cache(maxsize=8)
def _pixels(folder: str, key: str) -> tuple[list[int], list[np.ndarray]]:
    """First row, and uint8 (rows, bytes of a row) view, of every record batch: ten times faster than asking Arrow."""
    chunks = [
        np.frombuffer(chunk.buffers()[2], np.uint8).reshape(len(chunk), -1)
        for chunk in _table(folder, key).column("pixels").chunks
    ]
    return np.cumsum([0, *map(len, chunks)]).tolist()[:-1], chunks


def read_card(folder: Path) -> dict[str, Any]:
    """What `prepare` wrote of itself; ValueError if it is damaged."""
    try:
        card = read_json(folder / CARD)
        if card["format"] != 1:
            raise ValueError(f"format {card['format']}, and this version reads format 1")
        if missing := CARD_KEYS - card.keys():
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        return card
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CARD} is damaged or foreign: {error!r}; prepare the folder again"
        ) from error


def open_prepared(folder: Path, split: str | None) -> PreparedSource:
    """A folder of `prepare`, or its part "train" or "test" (every tenth)."""
    card = read_card(folder)
    try:
        table = _table(str(folder.resolve()), card["fingerprint"])
        if table.num_rows != card["count"]:
            raise ValueError(f"{table.num_rows} rows, but its card says {card['count']}")
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
    """A Hugging Face data set with a column of encoded pictures."""

    pictures: Any  # datasets.Dataset of one column, undecoded
    captions: Any  # datasets.Dataset of one column, or None
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, i: int) -> str:
        """The row, and its file if it has one."""
        path = (self._cell(i) or {}).get("path")
        return f"row {i}" + (f" ({os.path.basename(path)})" if path else "")

    def read(self, i: int) -> Image.Image:
        """The opened picture."""
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
        """The caption column's cell; the first, if it holds several."""
        cell = None if self.captions is None else next(iter(self.captions[i].values()))
        return (cell[0] if cell else None) if isinstance(cell, list) else cell

    def identity(self) -> str:
        """Of the number of bytes and the label of every row: the bytes themselves may be terabytes."""
        lengths = [self._lengths(start) for start in range(0, len(self), 4096)]
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hash_parts([*(length.tobytes() for length in lengths), labels])

    def _lengths(self, start: int) -> np.ndarray:
        import pyarrow.compute

        column = self.pictures.with_format("arrow")[start : start + 4096].column(0).combine_chunks()
        call = pyarrow.compute.call_function
        lengths = call("binary_length", [column.field("bytes")])
        return call("coalesce", [lengths, -1]).to_numpy(zero_copy_only=False).astype(np.int64)

    def _cell(self, i: int) -> dict[str, Any] | None:
        return next(iter(self.pictures[i].values()))


def _column(
    features: Mapping[str, Any], kinds: tuple[type, ...], names: tuple[str, ...]
) -> str | None:
    """The first column of a telling type, else of a telling name."""
    typed = [name for name, feature in features.items() if isinstance(feature, kinds)]
    return next((name for name in [*typed, *names] if name in features), None)


def table_source(dataset: Any, what: str) -> TableSource:
    """A `datasets.Dataset` as a source; the columns are found by type, then by usual names."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    features = dataset.features
    image = _column(features, (ImageFeature,), IMAGE_COLUMNS)
    if image is None:
        raise ValueError(
            f"{what} has no column of images; columns: {', '.join(features)}; name it 'image'"
        )
    pictures = dataset.select_columns([image]).cast_column(image, ImageFeature(decode=False))
    caption = _column(features, (), TEXT_COLUMNS)
    captions = None if caption is None else dataset.select_columns([caption])
    label = _column(features, (ClassLabel,), LABEL_COLUMNS)
    labels, names = (None, None) if label is None else _labels(dataset, label, what)
    return TableSource(pictures, captions, labels, names)


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
            f"column {column!r} of {what} is no class: {error}; give whole numbers or words"
        ) from error
    if isinstance(feature, ClassLabel):
        return labels, tuple(feature.names)
    if labels.min() < NO_LABEL:
        raise ValueError(f"column {column!r} of {what} holds the negative label {labels.min()}")
    return labels, tuple(map(str, range(int(labels.max()) + 1)))


def open_table(path: str, split: str | None, builder: str | None = None) -> TableSource:
    """A data set by hub name or folder, or the files `path` read by `builder` ("parquet", "arrow", "webdataset")."""
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
            f"{path!r} cannot be opened as a data set ({type(error).__name__}: {str(error).splitlines()[0]}); give a "
            "folder or zip of images, parquet files, or a data set of the hub as OWNER/NAME"
        ) from error
    return table_source(_part(parts, split, path), path)


def _part(parts: Any, split: str | None, what: str) -> Any:
    """The split asked for; every tenth row is the test part of a data set that has one split alone."""
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
    """Arrays of an .npz: encoded pictures in one blob with offsets, or uint8 pixels."""

    path: str
    modified_ns: int
    part: str  # prefix of the arrays' names
    rows: np.ndarray = field(repr=False)
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, i: int) -> str:
        """Its row."""
        return f"{self.part}row {self.rows[i]}"

    def read(self, i: int) -> Image.Image | np.ndarray:
        """The opened picture, or uint8 (c, h, w)."""
        arrays, row = _npz(self.path, self.modified_ns), int(self.rows[i])
        if "arr_0" in arrays:
            return np.ascontiguousarray(arrays["arr_0"][row].transpose(2, 0, 1))
        first, last = arrays[f"{self.part}offsets"][row : row + 2]
        return decode_image(arrays[f"{self.part}blob"][first:last].tobytes())

    def text(self, i: int) -> None:
        """No captions."""
        return None

    def identity(self) -> str:
        """Of all bytes, the rows chosen and the labels."""
        arrays = _npz(self.path, self.modified_ns)
        name = "arr_0" if "arr_0" in arrays else f"{self.part}blob"
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hash_parts([arrays[name].tobytes(), self.rows.tobytes(), labels])


@functools.lru_cache(maxsize=4)
def _npz(path: str, modified_ns: int) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def open_npz(path: Path, split: str | None) -> NpzSource:
    """Pictures of an .npz in one of two forms.

    Encoded: "train_blob", "train_offsets" (n + 1), "train_labels", the same for "test", and "classes". Or ADM's sample
    batch: "arr_0" uint8 (n, h, w, c) with optional labels "arr_1".
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
        rows, part = split_indices(len(pixels), split or "all", None), ""
        labels = arrays.get("arr_1")
    else:
        part = f"{split or 'train'}_"
        if f"{part}blob" not in arrays or f"{part}offsets" not in arrays:
            raise ValueError(
                f"{path} holds {', '.join(arrays)}, no {part}blob and {part}offsets; {form}"
            )
        rows, labels = np.arange(len(arrays[f"{part}offsets"]) - 1), arrays.get(f"{part}labels")
    if labels is None:
        return NpzSource(str(path), modified_ns, part, rows, None, None)
    labels = labels[rows].astype(np.int64)
    names = map(str, arrays["classes"] if "classes" in arrays else range(int(labels.max()) + 1))
    return NpzSource(str(path), modified_ns, part, rows, labels, tuple(names))
