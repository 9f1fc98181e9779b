"""Where images come from: the `Source` interface, and image files in a folder or zip.

A source returns images as stored; `mezzotint.data.image_dataset` resizes them. Sources pickle by
path, not by content, and a worker process opens its own handles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from mezzotint.data.columns import Columns
from mezzotint.data.decode import UnreadableImage, decode_image, image_suffixes
from mezzotint.data.labels import sort_classes
from mezzotint.data.side_files import labels_from_json, read_captions
from mezzotint.data.stores import FolderStore, ZipStore

SPLITS = ("train", "test", "all")


@runtime_checkable
class Source(Protocol):
    """Images by index, as stored, with labels and captions."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes, None for a source without labels."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """Class indices, int64 (n,), -1 for an image without one."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for reports, e.g. about files that were left out."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """Return the name of image i in reports."""
        ...

    def read(self, i: int) -> Image.Image | np.ndarray:
        """Return image i, or its pixels (c, h, w) if stored so; may raise `UnreadableImage`."""
        ...

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        ...

    def identity(self) -> str:
        """Return a hash that changes when images are added, removed, reordered or relabelled."""
        ...


def hash_parts(parts: Iterable[bytes | str]) -> str:
    """Return the SHA-256 of length-prefixed parts, 32 hexadecimal digits of it."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:32]


def split_indices(count: int, split: str, is_test: np.ndarray | None) -> np.ndarray:
    """Return the indices of the images in `split` ("train", "test", "all").

    Args:
        is_test: bool (count,), the test images of a source that has a test split; without one,
        every
            tenth image is a test image.
    """
    test = np.arange(count) % 10 == 9 if is_test is None else is_test
    return np.flatnonzero({"train": ~test, "test": test, "all": np.ones(count, bool)}[split])


@dataclass(frozen=True)
class FileSource:
    """Image files of a folder or zip, with labels and captions.

    captions: by name, from metadata.jsonl. text_files: names of .txt files.
    """

    store: FolderStore | ZipStore
    names: tuple[str, ...]
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    captions: dict[str, str] = field(repr=False)
    text_files: frozenset[str] = field(repr=False)
    notes: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Return the relative file name."""
        return self.names[i]

    def read(self, i: int) -> Image.Image:
        """Return the opened image."""
        try:
            data = self.store.bytes(self.names[i])
        except OSError as error:
            raise UnreadableImage(f"{type(error).__name__}: {error.strerror}") from error
        return decode_image(data)

    def text(self, i: int) -> str | None:
        """Return the caption from metadata.jsonl, else from NAME.txt, or None."""
        name = self.names[i]
        if name in self.captions:
            return self.captions[name]
        text_file = str(PurePosixPath(name).with_suffix(".txt"))
        if text_file not in self.text_files:
            return None
        return self.store.bytes(text_file).decode("utf-8", "replace").strip()

    def identity(self) -> str:
        """Return the hash of names, sizes and labels."""
        return self.key


def open_files(
    store: FolderStore | ZipStore, split: str | None, columns: Columns | None = None
) -> FileSource:
    """Open the images of a folder or zip.

    Labels: `dataset.json` ({"labels": [[name, index], ...]}, and optionally "classes" and a list
    "test"), else the first folder below the common one. Captions: `metadata.jsonl`
    ({"file_name": ..., "text": ...}), else NAME.txt.
    """
    sizes = store.sizes()
    names = sorted(name for name in sizes if PurePosixPath(name).suffix.lower() in image_suffixes())
    if not names:
        others = ", ".join(sorted(sizes)[:3])
        content = (
            f"{len(sizes)} files, none of them images ({others}, ...)" if sizes else "no files"
        )
        raise ValueError(
            f"{store.root} holds {content}; give a folder or zip of images (.png, .jpg, .webp, "
            ".tif, .bmp, .gif)"
        )
    base = _common_folder(names)
    notes: list[str] = []
    test = None
    if f"{base}dataset.json" in sizes or "dataset.json" in sizes:
        prefix = base if f"{base}dataset.json" in sizes else ""
        names, labels, label_names, test = labels_from_json(store, prefix, names, notes)
    else:
        labels, label_names = _labels_from_folders(store, base, names, notes)
    chosen = split_indices(len(names), split or ("all" if test is None else "train"), test)
    if not len(chosen):
        raise ValueError(
            f"split {split!r} of {store.root} is empty: it holds {len(names)} images; try 'all'"
        )
    others = len(sizes) - len(names)
    if others:
        notes.append(f"{others} files that are not images of this dataset were ignored")
    names = [names[i] for i in chosen]
    labels = None if labels is None else labels[chosen]
    key = hash_parts(
        [f"{name}\t{sizes[name]}" for name in names] + [b"" if labels is None else labels.tobytes()]
    )
    text_files = frozenset(name for name in sizes if name.endswith(".txt"))
    metadata = sorted(name for name in sizes if PurePosixPath(name).name == "metadata.jsonl")
    captions = read_captions(store, metadata)
    return FileSource(
        store, tuple(names), labels, label_names, captions, text_files, tuple(notes), key
    )


def _common_folder(names: Sequence[str]) -> str:
    """Return the deepest folder of all names, as a prefix ending in "/", or ""."""
    # `zip -r` of a folder adds one level.
    folders = [name.split("/")[:-1] for name in names]
    shared = takewhile(
        lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False)
    )
    return "".join(f"{part}/" for part, _ in shared)


def _labels_from_folders(
    store: FolderStore | ZipStore, base: str, names: Sequence[str], notes: list[str]
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    folders = [name[len(base) :].rpartition("/")[0].partition("/")[0] for name in names]
    classes = sort_classes(set(folders) - {""})
    if classes and set(classes) <= {"train", "test", "val", "valid", "validation"}:
        raise ValueError(
            f"{store.root} holds the splits {', '.join(classes)}; give one of them, e.g. "
            f"{store.root / base / classes[0]}"
        )
    if classes and "" in folders:
        notes.append(
            f"no labels: {folders.count('')} images are outside the class folders "
            f"{', '.join(classes[:4])}"
        )
        return None, None
    if not classes:
        return None, None
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[folder] for folder in folders], dtype=np.int64), classes
