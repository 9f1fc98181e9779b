"""Where pictures come from: each kind of source is a small class that reads sample i, undecoded things first.

A source knows nothing of the size asked for; `mezzotint.data.image_dataset` turns its pictures into pixels. Sources pickle by
path, never by content, so that a worker process opens its own handles.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import stat
import threading
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError

from mezzotint.data.transforms import UnreadableImage

SPLITS = ("train", "test", "all")
NO_LABEL = -1  # in `Source.labels`


@runtime_checkable
class Source(Protocol):
    """Samples by number, as they were stored."""

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """What each class is called; the number of classes is their count."""
        ...

    @property
    def labels(self) -> np.ndarray | None:
        """int64 (n,), NO_LABEL where a sample has none."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report should say of the whole."""
        ...

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """What a report calls sample i."""
        ...

    def read(self, i: int) -> Image.Image | np.ndarray:
        """The picture of sample i, or its uint8 (c, h, w) pixels where those are stored; may raise `Unreadable`."""
        ...

    def text(self, i: int) -> str | None:
        """The caption of sample i."""
        ...

    def identity(self) -> str:
        """Hex digest that changes when samples are added, removed, reordered or relabelled."""
        ...


def hash_parts(parts: Iterable[bytes | str]) -> str:
    """SHA-256 over length-prefixed parts, 32 hex digits."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:32]


def decode_image(data: bytes) -> Image.Image:
    """An opened, not yet loaded picture; `Unreadable` if no decoder knows the bytes."""
    if not data:
        raise UnreadableImage("no bytes")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # its own words hold an address in memory
        raise UnreadableImage("no picture that Pillow knows") from error
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def split_indices(count: int, split: str, stated: np.ndarray | None) -> np.ndarray:
    """Indices of the samples in `split` ("train", "test", "all").

    stated: bool (count,), True where the source itself declares a test sample; where it declares nothing, every tenth
    sample in name order is one.
    """
    test = np.arange(count) % 10 == 9 if stated is None else stated
    return np.flatnonzero({"train": ~test, "test": test, "all": np.ones(count, bool)}[split])


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Lower-case file suffixes that Pillow can open."""
    Image.init()
    known = {
        suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN
    }
    return frozenset(
        known
        - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf", ".eps", ".ps"}
    )


class FolderStore:
    """Bytes of the files below a folder, by relative name with forward slashes; links are followed, loops are not."""

    def __init__(self, root: Path):
        self.root = root

    def sizes(self) -> dict[str, int]:
        """File sizes in bytes by name, hidden files left out."""
        found: dict[str, int] = {}
        seen: set[str] = set()
        root = str(self.root)
        for folder, below, files in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            below[:] = [] if real in seen else [name for name in below if not name.startswith(".")]
            prefix = Path(os.path.relpath(folder, root)).as_posix() + "/" if folder != root else ""
            for name in [] if real in seen else files:
                status = _status(os.path.join(folder, name))
                if not name.startswith(".") and status is not None and stat.S_ISREG(status.st_mode):
                    found[prefix + name] = status.st_size
            seen.add(real)
        return found

    def bytes(self, name: str) -> bytes:
        """The content of one file."""
        return (self.root / name).read_bytes()


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:  # a link to nowhere
        return None


class ZipStore:
    """Bytes of the members of a zip, by name; read in place, never extracted to disk."""

    def __init__(self, root: Path):
        self.root = root
        self.modified_ns = root.stat().st_mtime_ns

    def sizes(self) -> dict[str, int]:
        """CRC-32 by name (as telling as a size, and free), folders and hidden members left out."""
        return {
            info.filename: info.CRC
            for info in self._handle().infolist()
            if not info.is_dir()
            and not any(
                part.startswith((".", "__MACOSX")) for part in PurePosixPath(info.filename).parts
            )
        }

    def bytes(self, name: str) -> bytes:
        """The content of one member; damage is an `Unreadable`."""
        try:
            return self._handle().read(name)
        except (
            zipfile.BadZipFile,
            RuntimeError,
            NotImplementedError,
            EOFError,
            OSError,
            zlib.error,
        ) as error:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error

    def _handle(self) -> zipfile.ZipFile:
        return _open_zip(str(self.root), self.modified_ns, os.getpid(), threading.get_ident())


# A handle of its own for every thread and process, which else share one file position.
@functools.lru_cache(maxsize=64)
def _open_zip(path: str, modified_ns: int, pid: int, thread: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(
            f"{path} is not a readable zip ({error}); give a zip of images or unpack it to a folder"
        ) from error


@dataclass(frozen=True)
class FileSource:
    """Image files of a folder or zip, with labels and captions found beside them."""

    store: FolderStore | ZipStore
    names: tuple[str, ...]
    labels: np.ndarray | None = field(repr=False)
    label_names: tuple[str, ...] | None
    captions: dict[str, str] = field(repr=False)  # by name, from metadata.jsonl
    beside: frozenset[str] = field(repr=False)  # names of .txt files
    notes: tuple[str, ...]
    key: str

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """The relative file name."""
        return self.names[i]

    def read(self, i: int) -> Image.Image:
        """The opened picture."""
        try:
            data = self.store.bytes(self.names[i])
        except OSError as error:
            raise UnreadableImage(f"{type(error).__name__}: {error.strerror}") from error
        return decode_image(data)

    def text(self, i: int) -> str | None:
        """From metadata.jsonl, else from the .txt of the same stem."""
        name = self.names[i]
        if name in self.captions:
            return self.captions[name]
        beside = str(PurePosixPath(name).with_suffix(".txt"))
        return (
            self.store.bytes(beside).decode("utf-8", "replace").strip()
            if beside in self.beside
            else None
        )

    def identity(self) -> str:
        """Names, sizes and labels."""
        return self.key


def open_files(store: FolderStore | ZipStore, split: str | None) -> FileSource:
    """The images of a folder or zip.

    Labels: `dataset.json` ({"labels": [[name, index], ...]}, and optionally "classes" and a list "test"), else the
    first folder below the common one. Captions: `metadata.jsonl` ({"file_name": ..., "text": ...}), else NAME.txt.
    """
    sizes = store.sizes()
    names = sorted(name for name in sizes if PurePosixPath(name).suffix.lower() in image_suffixes())
    if not names:
        others = ", ".join(sorted(sizes)[:3])
        held = f"{len(sizes)} files, none of them images ({others}, ...)" if sizes else "no files"
        raise ValueError(
            f"{store.root} holds {held}; give a folder or zip of images ({', '.join(_usual())})"
        )
    base = _common_folder(names)
    notes: list[str] = []
    test = None
    if f"{base}dataset.json" in sizes or "dataset.json" in sizes:
        prefix = base if f"{base}dataset.json" in sizes else ""
        names, labels, label_names, test = _labels_from_json(store, prefix, names, notes)
    else:
        labels, label_names = _labels_from_folders(store, base, names, notes)
    chosen = split_indices(len(names), split or ("all" if test is None else "train"), test)
    if not len(chosen):
        raise ValueError(
            f"split {split!r} of {store.root} is empty: it holds {len(names)} images; try 'all'"
        )
    others = len(sizes) - len(names)
    if others:
        notes.append(f"{others} files that are not images of this set were left alone")
    names = [names[i] for i in chosen]
    labels = None if labels is None else labels[chosen]
    key = hash_parts(
        [f"{name}\t{sizes[name]}" for name in names] + [b"" if labels is None else labels.tobytes()]
    )
    beside = frozenset(name for name in sizes if name.endswith(".txt"))
    captions = _captions(
        store, sorted(name for name in sizes if PurePosixPath(name).name == "metadata.jsonl")
    )
    return FileSource(store, tuple(names), labels, label_names, captions, beside, tuple(notes), key)


def _usual() -> tuple[str, ...]:
    return (".png", ".jpg", ".webp", ".tif", ".bmp", ".gif")


def _common_folder(names: Sequence[str]) -> str:
    """The folder that holds every name, as a prefix ending in "/" or empty: `zip -r` of a folder adds one level."""
    folders = [name.split("/")[:-1] for name in names]
    shared = takewhile(
        lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False)
    )
    return "".join(f"{part}/" for part, _ in shared)


def _labels_from_folders(
    store: FolderStore | ZipStore, base: str, names: Sequence[str], notes: list[str]
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    folders = [name[len(base) :].rpartition("/")[0].partition("/")[0] for name in names]
    classes = sorted(set(folders) - {""})
    if classes and set(classes) <= {"train", "test", "val", "valid", "validation"}:
        raise ValueError(
            f"{store.root} holds the splits {', '.join(classes)}; give one, as {store.root / base / classes[0]}"
        )
    if classes and "" in folders:
        notes.append(
            f"no labels: {folders.count('')} images lie beside the class folders {', '.join(classes[:4])}"
        )
        return None, None
    if not classes:
        return None, None
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[folder] for folder in folders], dtype=np.int64), tuple(classes)


def _labels_from_json(
    store: FolderStore | ZipStore, prefix: str, names: Sequence[str], notes: list[str]
) -> tuple[list[str], np.ndarray | None, tuple[str, ...] | None, np.ndarray | None]:
    where = f"{store.root}/{prefix}dataset.json"
    try:
        card = json.loads(store.bytes(f"{prefix}dataset.json"))
        given = [(prefix + str(name), int(label)) for name, label in card.get("labels") or []]
        listed = None if card.get("test") is None else {prefix + str(name) for name in card["test"]}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where} is not of the form {{"labels": [["name.png", 0], ...]}}: {error}'
        ) from error
    present = set(names)
    if not given:  # EDM writes "labels": null for an unlabelled set
        ordered, labels, label_names = list(names), None, None
    else:
        missing = [name for name, _ in given if name not in present]
        if missing:
            raise ValueError(
                f"{where} lists {len(missing)} files that are not there, first {missing[0]!r}"
            )
        given.sort()
        ordered = [name for name, _ in given]
        labels = np.array([label for _, label in given], dtype=np.int64)
        if len(set(ordered)) < len(ordered) or labels.min() < 0:
            raise ValueError(
                f"{where} lists a file twice or has a negative label; give each file one label from 0"
            )
        label_names = tuple(card.get("classes") or map(str, range(int(labels.max()) + 1)))
        if labels.max() >= len(label_names):
            raise ValueError(
                f"{where} has label {labels.max()} but only {len(label_names)} classes"
            )
        if len(present) > len(ordered):
            notes.append(
                f"{len(present) - len(ordered)} images that dataset.json does not list were left out"
            )
    test = None if listed is None else np.array([name in listed for name in ordered])
    return ordered, labels, label_names, test


def _captions(store: FolderStore | ZipStore, files: Sequence[str]) -> dict[str, str]:
    captions: dict[str, str] = {}
    for file in files:
        folder = file.rpartition("/")[0]
        for number, line in enumerate(store.bytes(file).decode("utf-8").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {}
                text = next(
                    (row[key] for key in ("text", "caption", "prompt") if row.get(key) is not None),
                    None,
                )
                if text is not None:
                    captions[f"{folder}/{row['file_name']}".lstrip("/")] = str(text)
            except (ValueError, KeyError, AttributeError) as error:
                form = '{"file_name": "a.png", "text": "..."}'
                raise ValueError(
                    f"{store.root}/{file} line {number} is not of the form {form}: {error!r}"
                ) from error
    return captions
