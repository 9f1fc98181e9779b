"""Files: atomic writes, hashes, JSON, the cache folder, downloads with a pinned SHA-256."""

from __future__ import annotations

import errno
import glob
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from mezzotint.core.json_values import JSON_LIMIT, parse_json
from mezzotint.core.progress import ProgressBar

CHUNK_BYTES = 1 << 20


# --- atomic writes -------------------------------------------------------------------------------
# Each writes to a name of its own beside the target, `.NAME.HOST.PID.partial`, flushes to disk, and
# renames. A reader sees the old content or the new one. What a killed process leaves is
# `.*.partial`. A link is replaced, never followed; its target stays as it is. A device, a pipe, or
# a link to one is written to and replaced by nothing.

STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}


def _partial_path(path: Path) -> Path:
    host = socket.gethostname().replace(".", "-")
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.partial")


def _find_special(path: Path) -> str | int | None:
    """Return what to open where `path` leads to no regular file: its name, or our descriptor."""
    where = os.path.abspath(path)
    for _ in range(40):  # the kernel's limit of links
        if where in STREAMS:
            return STREAMS[where]
        if found := re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", where):
            return int(found[1])
        if not os.path.islink(where):
            break
        where = os.path.normpath(os.path.join(os.path.dirname(where), os.readlink(where)))
    try:
        mode = os.stat(where).st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else where


def is_special(path: Path) -> bool:
    """Return whether a path leads to a device, a pipe, a socket, or our own descriptor."""
    return _find_special(path) is not None


def _write_special(special: str | int, content: IO[bytes]) -> None:
    if isinstance(special, int):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # what was printed before comes first
    descriptor = os.dup(special) if isinstance(special, int) else os.open(special, os.O_WRONLY)
    with open(descriptor, "wb") as file:
        shutil.copyfileobj(content, file, CHUNK_BYTES)


def _create(partial: Path) -> int:
    """Create a file of our own, with the mode of the umask; never what somebody has put there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(partial, flags, 0o666)
    except FileExistsError:  # left by a killed process of the same number
        partial.unlink()
        return os.open(partial, flags, 0o666)


@contextmanager
def _naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Say in a system error that has no file name, or the partial one, what was being written."""
    try:
        yield
    except OSError as error:
        named = (error.filename, error.filename2)
        if error.errno is None or (named != (None, None) and str(partial) not in named):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "free some space" if full else "check the folder and its permissions"
        told = OSError(
            f"{path} cannot be written: {error.strerror}; {advice} or choose another place"
        )
        told.errno = error.errno
        raise told from error


def _discard(partial: Path) -> None:
    """Remove a partial file; where it could not be made, the first error is the one to tell."""
    with suppress(OSError):
        partial.unlink(missing_ok=True)


def atomic_replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file with `write(temporary path)`, then give it its name and the umask's mode."""
    special = _find_special(path)
    if special is not None:
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / path.name
            write(partial)
            with _naming(path), partial.open("rb") as file:
                _write_special(special, file)
        return
    partial = _partial_path(path)
    try:
        with _naming(path, partial):
            descriptor = _create(partial)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            write(partial)
            partial.chmod(mode)  # libraries that rename a file of theirs leave it private
            fsync_path(partial)
            partial.replace(path)
    finally:
        _discard(partial)


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file to write; it gets its name at the end of a block without error."""
    special = _find_special(path)
    if special is not None:
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            with _naming(path):
                _write_special(special, file)
        return
    partial = _partial_path(path)
    try:
        with _naming(path, partial):
            with open(_create(partial), "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        _discard(partial)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file's whole content, text as UTF-8."""
    with atomic_open(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def no_follow(path: str, flags: int) -> int:
    """Open a regular file: an `opener` for `open` that refuses links, pipes and devices.

    For files that keep their name: locks, and logs that grow.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    raise OSError(f"{path} is a link or no regular file, and is not written to; remove it")


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading; OSError at once for a folder, device, pipe or socket."""

    def opener(path: str, flags: int) -> int:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is a folder, device, pipe or socket, no file", path)

    return open(path, "rb", opener=opener)


def check_new_or_empty(folder: Path, what: str) -> None:
    """Raise ValueError where a folder holds files; hidden ones do not count."""
    names = sorted(os.listdir(folder)) if folder.exists() else []
    if others := [name for name in names if not name.startswith(".")]:
        more = " ..." if others[3:] else ""
        raise ValueError(
            f"{folder} is no {what} folder and holds [{', '.join(others[:3])}{more}]; give one "
            "that is new or empty"
        )


def check_replaceable(path: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Check that writing `path` destroys nothing of somebody else.

    Empty files, devices and pipes hold nothing.

    Args:
        is_ours: whether an existing file is `what`; a file that it cannot read is not.

    Errors: ValueError for a folder, and for any other file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if is_special(path) or not path.exists() or path.stat().st_size == 0:
        return
    try:
        ours = is_ours(path)
    except Exception:  # readers raise many types for a file that is not theirs
        ours = False
    if not ours:
        raise ValueError(
            f"{path} exists and is not {what} of mezzotint; remove it or choose another name"
        )


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, removed at the end of the block unless it was renamed.

    Folders that killed processes of this machine left there for the same `path` are removed first.

    Errors: OSError, naming `path`, where the folder cannot be made.
    """
    path = path.resolve()  # a link keeps leading to the folder
    if path.is_mount():
        raise ValueError(
            f"{path} is a disk of its own, and a folder gets its name when it is complete, which "
            "works within one disk; give a new folder inside it"
        )
    partial = _partial_path(path)
    host = partial.name.split(".")[-3]
    for old in path.parent.glob(f".{glob.escape(path.name)}.{host}.*.partial"):
        pid = old.name.split(".")[-2]
        if old == partial or (pid.isdigit() and not _is_alive(int(pid))):
            if old.is_symlink():
                old.unlink()
            shutil.rmtree(old, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}; give another folder") from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path, complete: str) -> Iterator[Path]:
    """Yield an empty folder to write in; it gets its name at the end of the block.

    Args:
        complete: a file of every finished folder. Where another process has finished `path` in the
            meantime, its folder stays and ours is dropped.
    """
    with partial_folder(path) as partial:
        yield partial
        for file in partial.rglob("*"):
            fsync_path(file)
        try:
            os.replace(partial, path.resolve())
        except OSError:
            if not (path / complete).is_file():
                raise


def fsync_path(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LEFTOVER_S = 3600.0  # an unfinished file of another machine that is older was left by a kill


def remove_partials(folder: Path) -> None:
    """Remove what killed processes left in a folder, and nothing that another one is writing.

    A process of another machine counts as killed after an hour.
    """
    host = socket.gethostname().replace(".", "-")
    for partial in folder.glob(".*.partial"):
        *_, owner, pid, _ = ("", "", *partial.name.split("."))
        with suppress(FileNotFoundError):
            if owner == host and pid.isdigit():
                is_left = int(pid) == os.getpid() or not _is_alive(int(pid))
            else:
                is_left = time.time() - partial.stat().st_mtime > LEFTOVER_S
            if is_left:
                partial.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


# --- JSON and hashes -----------------------------------------------------------------------------


def write_json(path: Path, values: dict[str, Any] | list[Any]) -> None:
    """Write JSON atomically, as UTF-8."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode("utf-8", "surrogatepass"))  # names of files may be any bytes


def read_json(path: Path, advice: str = "write it again") -> dict[str, Any]:
    """Return the JSON object in a file, with the checks of `parse_json`.

    Errors: ValueError, ending in `advice`, where there is no such file or no object in it.
    """
    try:
        with open_regular(path) as file:
            values = parse_json(file.read(JSON_LIMIT + 1))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {advice}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}; {advice}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; {advice}")
    return values


def expand_user(path: str | Path) -> Path:
    """Return the path with a leading ~ as the home folder; as it is where it exists by that name,
    or no such user does."""
    path = Path(path)
    try:
        return path if path.exists() else path.expanduser()
    except (RuntimeError, ValueError, OSError):  # no such user; a name that no file can have
        return path


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; ValueError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


# --- the cache and downloads ---------------------------------------------------------------------


def cache_dir() -> Path:
    """Return $MEZZOTINT_CACHE, else mezzotint/ in $XDG_CACHE_HOME or ~/.cache, for downloads."""
    own = os.environ.get("MEZZOTINT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint"


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A published file: its name and address, SHA-256 and size in bytes, and licence."""

    name: str
    url: str
    sha256: str
    bytes: int
    licence: str


def check_sha256(path: Path, published: PublishedFile) -> Path:
    """Return `path`; ValueError unless its bytes are the published ones."""
    if difference := _describe_difference(path, published):
        raise ValueError(
            f"{path} is not the published {published.name}: {difference}. Delete it and download "
            f"{published.url} again"
        )
    return path


def _describe_difference(path: Path, published: PublishedFile) -> str:
    """Return how a file's hash and size differ from the published ones; "" for the same hash."""
    if (sha256 := sha256_of_file(path)) == published.sha256:
        return ""
    return (
        f"expected SHA-256 {published.sha256} ({published.bytes:,} bytes), found {sha256} "
        f"({path.stat().st_size:,} bytes)"
    )


def locate_file(published: PublishedFile, path: str | Path | None = None) -> Path:
    """Return a checked local copy: `path`, or from our cache or torch hub's, or downloaded."""
    if path is not None:
        return check_sha256(Path(path), published)
    torch_home = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch")
    for folder in (cache_dir(), torch_home / "hub" / "checkpoints"):
        if (folder / published.name).is_file():
            return check_sha256(folder / published.name, published)
    return download_file(published, cache_dir() / published.name)


def _read_block(answer: Any) -> bytes:
    """Read on from a server; a connection that breaks is no fault of the disk."""
    try:
        return answer.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise urllib.error.URLError(error) from error


def download_file(published: PublishedFile, target: Path) -> Path:
    """Download to `target`, with a progress bar; the file gets its name once its hash is right.

    Errors: ValueError that says where to put the file, without a network or with HF_HUB_OFFLINE.
    """
    needed = f"{published.name} ({published.bytes / 1e6:.0f} MB, {published.licence}) is needed and"
    by_hand = (
        f"Download {published.url} on a machine with a network and put it at {target}, or give "
        "its path"
    )
    # The values that huggingface_hub takes for true.
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ValueError(f"{needed} HF_HUB_OFFLINE forbids to download it. {by_hand}")
    target.parent.mkdir(parents=True, exist_ok=True)

    def fetch(partial: Path) -> None:
        with (
            urllib.request.urlopen(published.url, timeout=30) as answer,
            partial.open("wb") as file,
            ProgressBar(published.name, published.bytes, unit="bytes") as bar,
        ):
            while block := _read_block(answer):
                file.write(block)
                bar.advance(len(block))
        if difference := _describe_difference(partial, published):
            raise ValueError(
                f"what came from {published.url} is not {published.name}: {difference}. Try "
                f"again, or put the file at {target}"
            )

    try:
        atomic_replace(target, fetch)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ValueError(f"{needed} could not be downloaded ({error}). {by_hand}") from error
    return target


def format_bytes(count: int) -> str:
    """Return a number of bytes with its unit, e.g. "25 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 10_000:
            return f"{count} {unit}"
        count //= 1000
    return f"{count} GB"
