"""Sources whose images are rows: Hugging Face datasets and prepared folders."""

from __future__ import annotations

import glob
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.core.paths import read_regular_file
from mezzotint.data.columns import (
    CAPTION_NAMES,
    CAPTION_SYNONYMS,
    FILE_NAMES,
    IMAGE_NAMES,
    SAMPLE_ROWS,
    Choice,
    Column,
    Columns,
    all_columns,
    caption_text,
    choose_label,
    given_column,
    named,
    nested_value,
)
from mezzotint.data.decode import MAX_FILE_BYTES, UnreadableImage, blame_file, decode_image
from mezzotint.data.labels import Labels, read_labels
from mezzotint.data.layout import Layout
from mezzotint.data.row_files import patched_webdataset
from mezzotint.data.sources import hash_parts, split_indices
from mezzotint.data.splits import choose_split, match_split


@dataclass(frozen=True)
class TableSource:
    """A Hugging Face dataset with a column of encoded images, or of paths to image files.

    folders: where a path starts. roots: resolved folders that hold all files a cell may name.
    caption: column of captions, or None; "json.caption" is within a column of mappings. layout:
    how the table was understood.
    """

    images: Any  # datasets.Dataset of one column, undecoded
    captions: Any  # datasets.Dataset of the column `caption`, or None
    caption: str | None
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    folders: tuple[str, ...]
    roots: tuple[str, ...]
    notes: tuple[str, ...] = ()
    layout: Layout = field(default_factory=Layout, repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        """Return the row number, and the file name if there is one."""
        path = (self._cell(i) or {}).get("path")
        return f"row {i}" + (f" ({os.path.basename(path)})" if path else "")

    def read(self, i: int) -> Image.Image:
        """Return the opened image."""
        cell = self._cell(i)
        if cell is None or (cell.get("bytes") is None and not cell.get("path")):
            raise UnreadableImage("an empty cell")
        data = cell.get("bytes")
        return decode_image(self._read_file(cell["path"]) if data is None else data)

    def _read_file(self, path: str) -> bytes:
        """Return a file of the dataset; no path out of it, no device or pipe."""
        try:
            for folder in self.folders:
                real = os.path.realpath(os.path.join(folder, path.replace("\\", "/")))
                if any(real.startswith(f"{root.rstrip('/')}/") for root in self.roots) and (
                    os.path.lexists(real)
                ):
                    return read_regular_file(real, MAX_FILE_BYTES)
        except OSError as error:
            raise blame_file(error, path[:200]) from error
        except ValueError as error:  # a null character, or no regular file
            raise UnreadableImage(f"{path[:200]!r} cannot be read: {error}") from error
        raise UnreadableImage(f"{path[:200]!r} names no file in the dataset's folder")

    def text(self, i: int) -> str | None:
        """Return the caption; the first if there are several."""
        if self.caption is None:
            return None
        return caption_text(nested_value(next(iter(self.captions[i].values())), self.caption))

    def identity(self) -> str:
        """Return the hash of every row's byte count and label; the bytes may be terabytes."""
        lengths = [self._lengths(start) for start in range(0, len(self), 4096)]
        labels = b"" if self.labels is None else self.labels.tobytes()
        return hash_parts([*(length.tobytes() for length in lengths), labels])

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return row numbers, and the bytes of the cells; -1 for a cell that names a file."""
        sizes = [self._lengths(start) for start in range(0, len(self), 4096)]
        return [f"row {i}" for i in range(len(self))], np.concatenate(sizes)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the cell's bytes, or of the file that it names."""
        cell = self._cell(i) or {}
        if cell.get("bytes") is not None:
            return zlib.crc32(cell["bytes"])
        return zlib.crc32(self._read_file(cell["path"])) if cell.get("path") else 0

    def _lengths(self, start: int) -> np.ndarray:
        import pyarrow.compute

        column = self.images.with_format("arrow")[start : start + 4096].column(0)
        call = pyarrow.compute.call_function
        # Each chunk by itself: in one array, large images overflow Arrow's 32-bit offsets.
        lengths = [call("binary_length", [chunk.field("bytes")]) for chunk in column.chunks]
        return np.concatenate(
            [
                call("coalesce", [length, -1]).to_numpy(zero_copy_only=False).astype(np.int64)
                for length in lengths
            ]
        )

    def _cell(self, i: int) -> dict[str, Any] | None:
        return next(iter(self.images[i].values()))


def table_source(
    dataset: Any,
    what: str,
    *,
    columns: Columns | None = None,
    others: Sequence[Any] = (),
    folders: Sequence[Path] = (),
    roots: Sequence[Path] = (),
) -> TableSource:
    """Wrap a `datasets.Dataset`; see `mezzotint.data.columns` for its choice of columns.

    Args:
        what: the dataset, for errors.
        columns: the columns to take: role -> name, "" for none.
        others: the other splits, whose labels are classes too.
        folders, roots: see `TableSource`; without them a cell of a path is never opened.
    """
    columns = columns or {}
    fields = all_columns(dataset.features)
    choice = _choose(dataset, fields, columns, what, has_files=bool(folders))
    from datasets import Image as ImageFeature

    images = dataset.select_columns([choice.image])
    images = images.cast_column(choice.image, ImageFeature(decode=False))
    caption, notes = choice.caption, [note for note in [choice.note()] if note]
    layout = Layout(columns=choice, notes=tuple(notes))
    labels = names = None
    if choice.label is not None:
        labels, names, note = read_label_column(dataset, others, choice.label, what) or (
            None,
            None,
            "",
        )
        notes += [note] if note else []
        if labels is None:
            notes.append(f"no labels: column {choice.label!r} is empty")
    return TableSource(
        images,
        None if caption is None else dataset.select_columns([fields[caption].top]),
        None if caption is None else fields[caption].key,
        labels,
        names,
        tuple(map(str, folders)),
        tuple(os.path.realpath(root) for root in roots),
        tuple(notes),
        layout,
    )


def _choose(
    dataset: Any, fields: Mapping[str, Column], columns: Columns, what: str, has_files: bool
) -> Choice:
    """Choose the columns of a table; ValueError if none holds images."""
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    def of_type(*types: str) -> list[str]:
        return [n for n, f in fields.items() if getattr(f.feature, "dtype", None) in types]

    typed = [name for name, f in fields.items() if isinstance(f.feature, ImageFeature)]
    binary = of_type("binary", "large_binary")
    binary += [n for n, f in fields.items() if isinstance(f.feature, dict) and "bytes" in f.feature]
    words = of_type("string", "large_string")
    images = [*named([*typed, *binary], IMAGE_NAMES), *typed]
    if not images and not named(words, IMAGE_NAMES):
        images = [name for name in binary if _holds_images(dataset, fields[name])]
        images = images if len(images) == 1 else []
    images += named(words, (*IMAGE_NAMES, *FILE_NAMES)) if has_files else []
    images = [name for name in dict.fromkeys(images) if name == fields[name].top]
    image = given_column(columns, "image", fields, what) or next(iter(images), None)
    if image is None or image != fields[image].top:
        raise ValueError(
            f"{what} has no column of images; columns: {', '.join(map(str, fields))[:400]}; name "
            "it 'image', or choose it with data.columns={image: NAME}"
        )

    def sample(name: str) -> list[Any]:
        return _cells(dataset.select(range(min(len(dataset), SAMPLE_ROWS))), fields[name])

    rest = [name for name in fields if name not in (image, *typed)]
    label = given_column(columns, "label", fields, what)
    classes: list[str] = []
    if label is None:
        known = [name for name in rest if isinstance(fields[name].feature, ClassLabel)]
        text = [name for name in words if name in rest]
        label, classes = choose_label(rest, known, text, sample)
    caption = given_column(columns, "caption", fields, what)
    captions = [*named(rest, CAPTION_NAMES), *named(rest, CAPTION_SYNONYMS)]
    if caption is None:
        caption = next((name for name in captions if name != label), None)
    used = {fields[name].top for name in (label, caption) if name and name == fields[name].top}
    more = {
        "image": [name for name in images if name != image and name not in words],
        "label": [name for name in classes if name != caption and fields[name].top not in used],
        "caption": [name for name in captions if name != label and fields[name].top not in used],
    }
    more = {role: [n for n in names if n not in (label, caption)] for role, names in more.items()}
    return Choice(image, label or None, caption or None, more)


def _holds_images(dataset: Any, column: Column) -> bool:
    """Return whether the first filled cell of a column of bytes is an image."""
    cell = next(filter(None, _cells(dataset.select(range(min(len(dataset), 100))), column)), b"")
    data = (cell["bytes"] or b"") if isinstance(cell, dict) else cell
    with suppress(UnreadableImage):
        return bool(decode_image(data))
    return False


def _cells(dataset: Any, column: Column) -> list[Any]:
    cells = dataset.select_columns([column.top])[:][column.top]
    return [nested_value(cell, column.key) for cell in cells]


def read_label_column(dataset: Any, others: Sequence[Any], column: str, what: str) -> Labels | None:
    """Return the labels of a `datasets.Dataset`; of others, the classes count too."""
    field = all_columns(dataset.features)[column]
    cells = _cells(dataset, field)
    more = [_cells(other, field) for other in others if field.top in other.features]
    cells += [cell for part in more for cell in part]
    names = getattr(field.feature, "names", None)
    where = f"column {column!r} of {what}"
    try:
        found = read_labels(cells, len(cells), where, names)
    except ValueError as error:
        raise ValueError(f"{error}; or leave labels out: data.columns={{label: ''}}") from None
    return found and found._replace(indices=found.indices[: len(dataset)])


def open_table(
    path: str,
    split: str | None,
    builder: str | None = None,
    files: Mapping[str, list[str]] | None = None,
    columns: Columns | None = None,
) -> TableSource:
    """Open a dataset by hub name or folder, or files by `builder`: parquet, arrow, webdataset.

    Args:
        files: of each split, for a builder; by default `path`, a file or pattern, is the only one.
        columns: see `table_source`.
    """
    import datasets

    exact = {name: [glob.escape(file) for file in of] for name, of in (files or {}).items()}
    pattern = glob.escape(path) if os.path.exists(path) else path
    on_disk = any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        with patched_webdataset():
            if builder is not None:
                parts = datasets.load_dataset(builder, data_files=exact or {"train": pattern})
            elif on_disk:
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
    split, chosen, others = _select_split(parts, split, path)
    folders, roots = _file_folders(Path(path), parts)
    source = table_source(
        chosen, path, columns=columns, others=others, folders=folders, roots=roots
    )
    kind = f"{builder} files" if builder else "Hugging Face dataset"
    layout = replace(source.layout, kind=kind, split=split, splits=_count_rows(parts))
    return replace(source, layout=layout)


def _count_rows(parts: Any) -> dict[str, int]:
    return {str(name): len(part) for name, part in parts.items()}


def _file_folders(path: Path, parts: Any) -> tuple[list[Path], list[Path]]:
    """Return the folders where the paths in cells start, and those that they may not leave."""
    if path.is_dir():
        return [path, path / "data"], [path]
    if path.is_file() or "*" in path.name:
        return [path.parent], [path.parent]
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    # The hub's files lie in the caches, which only `datasets` fills.
    caches = [Path(HF_HUB_CACHE), Path(config.HF_DATASETS_CACHE)]
    return caches, caches


def _select_split(parts: Any, split: str | None, what: str) -> tuple[str, Any, list[Any]]:
    """Return a split's name, the split, and the others.

    Every tenth row tests a dataset with a single split.
    """
    import datasets

    split = None if split is None else match_split(split, parts) or split
    if split is None and ("train" in parts or len(parts) == 1):
        split = "train" if "train" in parts else next(iter(parts))
    elif (
        len(parts) == 1 and split in ("train", "test") and (split == "train" or split not in parts)
    ):
        (rows,) = parts.values()
        other = _tenths(rows, "test" if split == "train" else "train")
        return split, _tenths(rows, split), [other]
    if split == "all" and "all" not in parts:
        return split, datasets.concatenate_datasets(list(parts.values())), []
    split = choose_split(what, _count_rows(parts), split)
    return split, parts[split], [part for name, part in parts.items() if name != split]


def _tenths(dataset: Any, split: str) -> Any:
    return dataset.select(split_indices(len(dataset), split, None))
