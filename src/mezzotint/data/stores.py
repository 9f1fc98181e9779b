"""Files of a folder, a zip or a tar, by name.

Nothing is extracted, and no name leads out of the folder or archive: a link that leaves it, a
device, a pipe, and a member named /etc/x or ../x are left out and counted.
"""

from __future__ import annotations

import builtins
import bz2
import contextlib
import fcntl
import functools
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import threading
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Any, Protocol, runtime_checkable

from mezzotint.core.files import CHUNK_BYTES, atomic_replace, cache_dir
from mezzotint.core.paths import read_regular_file
from mezzotint.core.progress import ProgressBar
from mezzotint.data.decode import HEAD_BYTES, PASSING, UnreadableImage, blame_file

MAX_FILE_BYTES = 1 << 30  # of one file: the largest image that Pillow opens, uncompressed, 16 bits
# Above BOMB_BYTES, what unpacks to more than BOMB_RATIO times its size is no set of images.
BOMB_BYTES, BOMB_RATIO = 64 << 20, 100
SPARE_BYTES = 1 << 30  # of the disk, left free when an archive is unpacked
ZIP_SUFFIXES = (".zip",)
TAR_SUFFIXES = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz")
# First bytes of a compressed tar -> its decompressor.
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
ZSTD = b"\x28\xb5\x2f\xfd"
# What a damaged zip may raise.
DAMAGE = (
    zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError
)  # fmt: skip
OUTSIDE, SPECIAL = "links that lead out of the data set", "devices, pipes and sockets"
BROKEN, CLOSED = "broken links", "folders that cannot be read"
LINKS, ESCAPES = "links", "names that lead out of the archive"
REPEATED, TOO_LARGE = "names that repeat", "files too large for an image"


@dataclass
class Listing:
    """Names with forward slashes -> a number that changes with the content (bytes, or a CRC-32).

    skipped: kind -> names of what is never opened, e.g. devices.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@runtime_checkable
class Store(Protocol):
    """Files by name; pickles by path, not by content."""

    root: Path

    def listing(self) -> Listing:
        """Return the regular files, without hidden ones, and what was left out."""
        ...

    def bytes(self, name: str) -> bytes:
        """Return the content of a listed file; `UnreadableImage` if it is damaged or too large."""
        ...

    def head(self, name: str) -> builtins.bytes:
        """Return the first HEAD_BYTES bytes of a listed file, b"" if it cannot be read."""
        ...

    def size(self, name: str) -> int:
        """Return the bytes of a listed file; 0 where it is gone."""
        ...

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a listed file's content; `UnreadableImage` as `bytes`."""
        ...


def is_archive(path: PurePath) -> bool:
    """Return whether `path` is named as a zip or tar."""
    return path.name.lower().endswith((*ZIP_SUFFIXES, *TAR_SUFFIXES))


def find_store(path: Path) -> tuple[Store, str] | None:
    """Open a folder, zip or tar, or the archive of a path into one, such as set.zip/train.

    Returns:
        The store, and the folder in it, ending in "/", or "" for all; None for any other path.

    Errors: ValueError for an archive that cannot be read.
    """
    if path.is_dir():
        return FolderStore(path), ""
    for archive in (path, *path.parents):
        if archive.is_file() and is_archive(archive):
            is_zip = archive.name.lower().endswith(ZIP_SUFFIXES)
            below = "" if archive == path else f"{path.relative_to(archive).as_posix()}/"
            return (ZipStore if is_zip else TarStore)(archive), below
    return None


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


class FolderStore:
    """Files below a folder, by relative name.

    Links are followed within the folder; within the whole cached repository if it is a snapshot in
    the cache of the Hugging Face hub, whose files are links.
    """

    def __init__(self, root: Path):
        self.root = root

    def listing(self) -> Listing:
        """Return file sizes in bytes, see `Store`; a folder with two names is listed once."""
        listing, seen = Listing(), set[str]()
        inside = _boundary(self.root)
        folders, linked = [""], []
        while folders or linked:
            prefix = folders.pop() if folders else linked.pop()  # links last: real names win
            real = os.path.realpath(self.root / prefix)
            if real in seen:
                continue
            seen.add(real)
            try:
                entries = sorted(os.scandir(self.root / prefix), key=lambda entry: entry.name)
            except OSError as error:
                blame_file(error, str(self.root / prefix))
                listing.skipped[CLOSED].append(prefix or str(self.root))
                continue
            for entry in entries:
                name = prefix + entry.name
                if _is_hidden(entry.name):
                    continue
                if entry.is_symlink() and not f"{os.path.realpath(entry.path)}/".startswith(inside):
                    listing.skipped[OUTSIDE].append(name)
                    continue
                try:
                    status = entry.stat()
                except OSError as error:
                    blame_file(error, str(self.root / name))
                    listing.skipped[BROKEN].append(name)
                    continue
                if stat.S_ISDIR(status.st_mode):
                    (linked if entry.is_symlink() else folders).append(f"{name}/")
                elif stat.S_ISREG(status.st_mode):
                    listing.sizes[name] = status.st_size
                else:
                    listing.skipped[SPECIAL].append(name)
        return listing

    def bytes(self, name: str) -> bytes:
        """Return the content of a file, see `Store`."""
        try:
            return read_regular_file(self.root / name, MAX_FILE_BYTES)
        except OSError as error:
            raise blame_file(error, str(self.root / name)) from error
        except ValueError as error:
            raise UnreadableImage(str(error)) from error

    def head(self, name: str) -> builtins.bytes:
        """Return the first bytes of a file, see `Store`."""
        try:
            return read_regular_file(self.root / name, MAX_FILE_BYTES, HEAD_BYTES)
        except (OSError, ValueError) as error:
            blame_file(error, str(self.root / name))  # raises where it is not the file's fault
            return b""

    def size(self, name: str) -> int:
        """Return the bytes of a file's content; 0 where it is gone."""
        try:
            return os.stat(self.root / name).st_size
        except OSError:
            return 0

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a file's content."""
        return zlib.crc32(self.bytes(name))


def _boundary(root: Path) -> str:
    """Return the folder that links may not leave, resolved, ending in a slash."""
    real = Path(os.path.realpath(root))
    for folder in (real, *real.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith("datasets--"):
            return f"{folder.parent}/"
    return f"{str(real).rstrip('/')}/"


def _safe_name(name: str) -> str | None:
    """Return a member's name with forward slashes, without "./"; None if it leads elsewhere."""
    parts = name.replace("\\", "/").split("/")
    is_absolute = parts[0] == "" or (len(parts[0]) == 2 and parts[0][1] == ":")
    if is_absolute or ".." in parts:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


class _Members:
    """Builds the listing of an archive: safe names -> where their content is."""

    def __init__(self) -> None:
        self.listing = Listing()
        self.places: dict[str, Any] = {}

    def add(self, stored_name: str, number: int, place: object, problem: str | None) -> None:
        """Add a member; `problem` is the kind of those that are left out."""
        name = _safe_name(stored_name)
        if name is None:
            problem = problem or ESCAPES
        elif not name or _is_hidden(name):
            return
        if problem is None and name in self.places:
            self.listing.skipped[REPEATED].append(stored_name)  # the last one counts
        if problem is not None or name is None:
            self.listing.skipped[problem or ESCAPES].append(stored_name)
            return
        self.listing.sizes[name], self.places[name] = number, place


class ZipStore:
    """Members of a zip, by name; read in place."""

    def __init__(self, root: Path):
        self.root = root
        self.modified_ns = root.stat().st_mtime_ns

    def listing(self) -> Listing:
        """Return CRC-32 by name, see `Store`."""
        return self._members().listing

    def bytes(self, name: str) -> bytes:
        """Return the content of a member, see `Store`."""
        try:
            return self._handle().read(self._members().places[name])
        except DAMAGE as error:
            raise blame_file(error, f"{self.root}/{name}") from error

    def head(self, name: str) -> builtins.bytes:
        """Return the first bytes of a member, see `Store`."""
        try:
            with self._handle().open(self._members().places[name]) as file:
                return file.read(HEAD_BYTES)
        except DAMAGE:
            return b""

    def size(self, name: str) -> int:
        """Return the bytes of a member's content."""
        return self._members().places[name].file_size

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a member's content, which the zip lists."""
        return self._members().places[name].CRC

    def _handle(self) -> zipfile.ZipFile:
        return _open_zip(str(self.root), self.modified_ns, os.getpid(), threading.get_ident())

    def _members(self) -> _Members:
        return _zip_members(str(self.root), self.modified_ns)


class _ZipHandle(zipfile.ZipFile):
    """A zip with a file position of its own, and the directory of another handle.

    To read the directory of a million members takes half a minute and 0.7 GB.
    """

    def __init__(self, path: str, directory: zipfile.ZipFile):
        self._directory = directory
        super().__init__(path)

    def _RealGetContents(self) -> None:
        self.start_dir = self._directory.start_dir
        self.filelist, self.NameToInfo = self._directory.filelist, self._directory.NameToInfo


# One handle per thread and process: they would share one file position, and wait for one another.
@functools.lru_cache(maxsize=64)
def _open_zip(path: str, modified_ns: int, pid: int, thread: int) -> zipfile.ZipFile:
    return _ZipHandle(path, _read_zip(path, modified_ns))


@functools.lru_cache(maxsize=8)
def _read_zip(path: str, modified_ns: int) -> zipfile.ZipFile:
    """Open a zip for its directory; its file position is of no thread."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in PASSING:
            raise  # no fault of the zip: `bytes` says so
        raise ValueError(
            f"{path} is not a readable zip ({error}); give a zip of images or unpack it to a folder"
        ) from error


@functools.lru_cache(maxsize=8)
def _zip_members(path: str, modified_ns: int) -> _Members:
    members = _Members()
    for info in _read_zip(path, modified_ns).infolist():
        mode = info.external_attr >> 16
        kind = stat.S_IFMT(mode) if info.create_system == 3 else 0  # 3: made on Unix
        is_bomb = info.file_size > max(BOMB_BYTES, BOMB_RATIO * info.compress_size)
        if info.is_dir() or info.filename.endswith("\\"):
            continue
        if kind == stat.S_IFLNK:
            problem = LINKS
        elif kind not in (0, stat.S_IFREG):
            problem = SPECIAL
        else:
            problem = TOO_LARGE if is_bomb or info.file_size > MAX_FILE_BYTES else None
        members.add(info.filename, info.CRC, info, problem)
    return members


class TarStore:
    """Members of a tar, by name; read in place.

    A compressed tar has no random access. It is decompressed once, to one file in the cache
    (`archives/` in `mezzotint.core.files.cache_dir`).
    """

    def __init__(self, root: Path):
        self.root = root
        self.plain = _plain_tar(root)
        self.modified_ns = self.plain.stat().st_mtime_ns

    def listing(self) -> Listing:
        """Return sizes in bytes by name, see `Store`."""
        return _tar_members(str(self.plain), str(self.root), self.modified_ns).listing

    def bytes(self, name: str) -> bytes:
        """Return the content of a member, see `Store`."""
        size = self._place(name)[1]
        data = self._read(name, size)
        if len(data) != size:
            raise UnreadableImage(f"the archive ends {size - len(data)} bytes too early")
        return data

    def head(self, name: str) -> builtins.bytes:
        """Return the first bytes of a member, see `Store`."""
        return self._read(name, HEAD_BYTES)

    def size(self, name: str) -> int:
        """Return the bytes of a member's content."""
        return self._place(name)[1]

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a member's content."""
        return zlib.crc32(self.bytes(name))

    def _place(self, name: str) -> tuple[int, int]:
        return _tar_members(str(self.plain), str(self.root), self.modified_ns).places[name]

    def _read(self, name: str, most: int) -> builtins.bytes:
        start, size = self._place(name)
        descriptor = _descriptor(str(self.plain), self.modified_ns, os.getpid())
        return os.pread(descriptor, min(size, most), start)


@functools.lru_cache(maxsize=64)
def _descriptor(path: str, modified_ns: int, pid: int) -> int:
    """Return a file descriptor for `os.pread`, which threads may share; it stays open."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@functools.lru_cache(maxsize=8)
def _tar_members(path: str, shown: str, modified_ns: int) -> _Members:
    members, end = _Members(), os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                place, problem = (info.offset_data, info.size), None
                if info.size < 0:  # the next member would be one that was read before
                    raise tarfile.ReadError(f"the size of {info.name} is negative")
                if info.isdir():
                    continue
                if info.islnk():  # a second name of an earlier member
                    place = members.places.get(_safe_name(info.linkname) or "")
                    problem = LINKS if place is None else None
                elif info.issym():
                    problem = LINKS
                elif not info.isreg() or info.issparse():
                    problem = SPECIAL
                elif info.offset_data + info.size > end:
                    raise tarfile.ReadError(f"it ends within {info.name}")
                elif info.size > MAX_FILE_BYTES:
                    problem = TOO_LARGE
                members.add(info.name, place[1] if place else 0, place, problem)
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{shown} is not a readable tar ({error}); copy it again, or unpack it to a folder"
        ) from error
    return members


def _plain_tar(path: Path) -> Path:
    """Return the tar itself, or where it lies decompressed."""
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(ZSTD):
        raise ValueError(f"{path} is compressed by zstd; unpack it: tar --zstd -xf {path}")
    opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        return path
    status, folder = path.stat(), cache_dir() / "archives"
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    plain = folder / f"{key}-{status.st_size}-{status.st_mtime_ns}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / f".{key}.lock"):  # one of several processes unpacks, the others wait
        if not plain.is_file():
            for old in folder.glob(f"{key}-*.tar"):  # of an earlier state of this archive
                old.unlink()
            atomic_replace(plain, lambda partial: _decompress(path, opener, partial))
    return plain


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _decompress(path: Path, opener: Callable[[IO[bytes]], Any], target: Path) -> None:
    """Decompress a file; ValueError if it is damaged, a bomb, or too large for the disk."""
    total, written = path.stat().st_size, 0
    with (
        path.open("rb") as raw,
        target.open("wb") as file,
        ProgressBar(f"decompressing {path.name}", total, unit="bytes") as bar,
    ):
        try:
            stream = opener(raw)
            while block := stream.read(CHUNK_BYTES):
                written += len(block)
                if written > max(BOMB_BYTES, BOMB_RATIO * raw.tell()):
                    raise ValueError(
                        f"{path} unpacks to more than {BOMB_RATIO} times its size, which images "
                        "never do; unpack it yourself if you trust it"
                    )
                if shutil.disk_usage(target.parent).free < SPARE_BYTES:
                    raise ValueError(
                        f"the disk of {target.parent} is too small to decompress {path}; set "
                        "MEZZOTINT_CACHE to a folder on another disk, or unpack it there"
                    )
                file.write(block)
                bar.advance(raw.tell() - bar.done)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ValueError(
                f"{path} is damaged or cannot be decompressed ({error}); copy it again"
            ) from error
