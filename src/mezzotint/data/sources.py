"""Where images come from: the `Source` interface, and image files in a folder or zip.

A source returns images as stored; `mezzotint.data.image_dataset` resizes them. Sources pickle by
path, not by content, and a worker process opens its own handles.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from mezzotint.core.paths import printable
from mezzotint.core.registry import suggest
from mezzotint.data.columns import Columns, caption_text
from mezzotint.data.decode import IMAGE, decode_image, describe_unread, image_kind
from mezzotint.data.labels import sort_classes
from mezzotint.data.layout import Layout, count_ignored
from mezzotint.data.side_files import choose_labels, labels_from_json, read_side_files
from mezzotint.data.side_tables import read_text
from mezzotint.data.splits import choose_split, common_folder, find_splits
from mezzotint.data.stores import Listing, Store, is_archive

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

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return the name of every image and its stored bytes, int64 (n,), without reading any.

        The names are the same wherever a copy of the source lies, in a folder or a zip.
        """
        ...

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of image i as stored; may raise `UnreadableImage` or OSError."""
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
    """Image files of a folder, zip or tar, with labels and captions.

    captions: by name, from tables. text_files: image -> file with its caption. layout: how the
    files were understood.
    """

    store: Store
    names: tuple[str, ...]
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    captions: dict[str, str] = field(repr=False)
    text_files: dict[str, str] = field(repr=False)
    notes: tuple[str, ...]
    key: str
    layout: Layout = field(default_factory=Layout, repr=False)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Return the relative file name, printable whatever its bytes are."""
        return printable(self.names[i])

    def read(self, i: int) -> Image.Image:
        """Return the opened image."""
        return decode_image(self.store.bytes(self.names[i]))

    def text(self, i: int) -> str | None:
        """Return the caption from a table, else from the image's own file, or None."""
        name = self.names[i]
        if name in self.captions or name not in self.text_files:
            return self.captions.get(name)
        return caption_text(read_text(self.store, self.text_files[name]))

    def identity(self) -> str:
        """Return the hash of names, sizes and labels."""
        return self.key

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return file names below the deepest common folder, and file sizes."""
        folders = [os.path.dirname(name) for name in (min(self.names), max(self.names))]
        start = len(os.path.join(os.path.commonpath(folders), ""))
        with ThreadPoolExecutor(16) as pool:
            sizes = list(pool.map(self.store.size, self.names))
        return [name[start:] for name in self.names], np.array(sizes, np.int64)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the file."""
        return self.store.checksum(self.names[i])


def open_files(
    store: Store,
    split: str | None,
    columns: Columns | None = None,
    *,
    below: str = "",
    listing: Listing | None = None,
) -> FileSource:
    """Open the images of a folder, zip or tar.

    Labels: `dataset.json` ({"labels": [[name, index], ...]}, and optionally "classes" and a list
    "test"), else metadata.* or labels.*, else the first folder below the common one, else any
    other table. Captions: a table, else a file of each image, see `mezzotint.data.side_files`.

    Args:
        split: where there are folders of splits (see `mezzotint.data.splits`) the name of one, or
            "all"; else "train", "test" or "all".
        below: folder within the store, ending in "/", or a split's name in its place; or "".
        listing: of the store, if it is known.
    """
    listing = listing or store.listing()
    if below and not any(name.startswith(below) for name in listing.sizes):
        split, below = below.rstrip("/"), ""
    sizes = {name: size for name, size in listing.sizes.items() if name.startswith(below)}
    where = f"{store.root}/{below}".rstrip("/")
    kinds = {name: image_kind(name, functools.partial(store.head, name)) for name in sizes}
    names = sorted(name for name, kind in kinds.items() if kind == IMAGE)
    if not names:
        raise ValueError(_describe_no_images(where, kinds, listing))
    base = common_folder(names)
    notes: list[str] = []
    test, origin, counts = None, "class folders", {}
    if f"{base}dataset.json" in sizes or "dataset.json" in sizes:
        prefix = base if f"{base}dataset.json" in sizes else ""
        names, labels, label_names, test = labels_from_json(store, prefix, names, notes)
        origin = f"{prefix}dataset.json"
        chosen = _choose_indices(where, names, split, test)
    elif splits := find_splits(names, base):
        counts = {name: len(images) for name, images in splits.items()}
        if split != "all" or "all" in splits:
            split = choose_split(where, counts, split)
            splits = {split: splits[split]}
        if outside := len(names) - sum(counts.values()):
            notes.append(f"{outside} images beside the folders of the splits were left out")
        names, base, labels, label_names = _open_splits(splits, notes)
        chosen = np.arange(len(names))
    else:
        paths = [name[len(base) :] for name in names]
        labels, label_names = _labels_from_folders(paths, notes)
        chosen = _choose_indices(where, names, split, test)
    images = [name for name, kind in kinds.items() if kind == IMAGE]
    side = read_side_files(store, sizes, sorted(images), columns)
    own = labels
    labels, label_names = choose_labels(side, names, labels, label_names, columns or {}, notes)
    read = side.files | {origin}
    others = {name: kind for name, kind in kinds.items() if kind != IMAGE and name not in read}
    ignored = _describe_others([name for name, kind in others.items() if kind is None])
    notes.extend([*_describe_unread(others), *ignored, *_describe_skipped(listing)])
    own_files = {f"{len(side.text_files):,} .txt or .caption": "caption"} if side.text_files else {}
    layout = Layout(
        kind=type(store).__name__.removesuffix("Store").lower(),
        split=split,
        splits=counts,
        labels=None if labels is None else origin if labels is own else side.label_place,
        side_files=side.tables | own_files,
        ignored=count_ignored(others, listing.skipped),
        notes=tuple(ignored),
    )
    names = [names[i] for i in chosen]
    labels = None if labels is None else labels[chosen]
    # Relative names: FOLDER:train and FOLDER/train are one data set.
    key = hash_parts(
        [f"{name.removeprefix(base)}\t{sizes[name]}" for name in names]
        + [b"" if labels is None else labels.tobytes()]
    )
    captions, texts = side.captions, side.text_files
    return FileSource(
        store, tuple(names), labels, label_names, captions, texts, tuple(notes), key, layout
    )


def _choose_indices(
    where: str, names: Sequence[str], split: str | None, test: np.ndarray | None
) -> np.ndarray:
    """Return the indices of "train", "test" or "all" of images that have no folders of splits."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"{where} has no split {split!r}; {suggest(split, SPLITS)}")
    chosen = split_indices(len(names), split or ("all" if test is None else "train"), test)
    if not len(chosen):
        raise ValueError(
            f"split {split!r} of {where} is empty: it holds {len(names)} images; try 'all'"
        )
    return chosen


def _open_splits(
    splits: dict[str, dict[str, str]], notes: list[str]
) -> tuple[list[str], str, np.ndarray | None, tuple[str, ...] | None]:
    """Return names, their common folder, labels and class names of the images of some splits."""
    paths: dict[str, str] = {}
    for images in splits.values():
        common = common_folder(list(images.values()))
        paths |= {image: path[len(common) :] for image, path in images.items()}
    names = sorted(paths)
    labels, label_names = _labels_from_folders([paths[name] for name in names], notes)
    return names, common_folder(names), labels, label_names


def _describe_no_images(where: str, kinds: dict[str, str | None], listing: Listing) -> str:
    """Return the message for a folder or archive without images."""
    others = ", ".join(printable(name) for name in sorted(kinds)[:3])
    content = f"{len(kinds)} files, none of them images ({others}, ...)" if kinds else "no files"
    found = "".join(f"; {note}" for note in (*_describe_unread(kinds), *_describe_skipped(listing)))
    archives = sorted(name for name in kinds if is_archive(PurePosixPath(name)))
    advice = "give a folder or zip of images (.png, .jpg, .webp, .tif, .bmp, .gif)"
    if archives:
        advice = f"give the archive itself, e.g. {where}/{printable(archives[0])}"
    return f"{where} holds {content}{found}; {advice}"


def _describe_unread(kinds: dict[str, str | None]) -> list[str]:
    """Return sentences on images of a kind that is not read; `kinds`: name -> `image_kind`."""
    return describe_unread(Counter(kind for kind in kinds.values() if kind not in (None, IMAGE)))


def _describe_others(names: Sequence[str]) -> list[str]:
    """Return a sentence on files that are no images, counted by suffix."""
    if not names:
        return []
    suffixes = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in names)
    counts = ", ".join(f"{count:,} {printable(s)}" for s, count in suffixes.most_common(5))
    return [
        f"{len(names):,} files that are not images were ignored: {counts} ({_first_names(names)})"
    ]


def _describe_skipped(listing: Listing) -> list[str]:
    """Return sentences on what is never opened."""
    return [
        f"{len(names):,} {kind} were left out ({_first_names(names)})"
        for kind, names in listing.skipped.items()
    ]


def _first_names(names: Sequence[str]) -> str:
    """Return the first three names for print."""
    more = ", ..." if len(names) > 3 else ""
    return ", ".join(printable(name) for name in sorted(names)[:3]) + more


def _labels_from_folders(
    paths: Sequence[str], notes: list[str]
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels and class names by the first folder of each path."""
    folders = [path.rpartition("/")[0].partition("/")[0] for path in paths]
    classes = sort_classes(set(folders) - {""})
    if not classes:
        return None, None
    if "" in folders:
        notes.append(
            f"no labels: {folders.count('')} images are outside the class folders "
            f"{', '.join(map(printable, classes[:4]))}"
        )
        return None, None
    notes += _describe_nested(paths, len(classes))
    index = {name: i for i, name in enumerate(classes)}
    labels = np.array([index[folder] for folder in folders], dtype=np.int64)
    return labels, tuple(map(printable, classes))


def _describe_nested(paths: Sequence[str], num_classes: int) -> list[str]:
    """Return a note where each class folder holds folders of the same names (fold1/ant, ...)."""
    below: dict[str, set[str]] = {}
    for path in paths:
        first, *rest = path.split("/")[:-1]
        below.setdefault(first, set()).update(rest[:1])
    inner = min(below.values(), key=len)
    if num_classes < 2 or len(inner) < 2 or any(folders != inner for folders in below.values()):
        return []
    first = printable(min(below))
    return [
        f"the classes are {num_classes:,} folders ({first}, ...) that all hold the folders "
        f"{', '.join(map(printable, sorted(inner)[:3]))}{', ...' if len(inner) > 3 else ''}; if "
        f"those are the classes, give one folder, e.g. {first}"
    ]
