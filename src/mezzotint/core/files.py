"""Files: atomic writes, hashes, JSON, the cache folder, downloads with a pinned SHA-256."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mezzotint.core.progress import ProgressBar

CHUNK_BYTES = 1 << 20


# --- atomic writes -------------------------------------------------------------------------------
# Each writes to a name of its own beside the target, `.NAME.HOST.PID.partial`, flushes to disk, and
# renames. A reader sees the old content or the new one. What a killed process leaves is
# `.*.partial`.


def _partial_path(path: Path) -> Path:
    host = socket.gethostname().replace(".", "-")
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.partial")


def atomic_replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file with `write(temporary path)`, then give it its name."""
    partial = _partial_path(path)
    try:
        write(partial)
        fsync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file to write; it gets its name at the end of a block without error."""
    partial = _partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a file's whole content, text as UTF-8."""
    with atomic_open(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, removed at the end of the block unless it was renamed.

    Folders that killed processes of this machine left there for the same `path` are removed first.

    Errors: OSError, naming `path`, where the folder cannot be made.
    """
    path = path.absolute()
    partial = _partial_path(path)
    host = partial.name.split(".")[-3]
    for old in path.parent.glob(f".{glob.escape(path.name)}.{host}.*.partial"):
        pid = old.name.split(".")[-2]
        if old == partial or (pid.isdigit() and not _is_alive(int(pid))):
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
            os.replace(partial, path)
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
    """Return the JSON object in a file.

    Errors: ValueError, ending in `advice`, where there is no such file or no object in it.
    """
    try:
        values = json.loads(path.read_bytes())  # decoded with surrogatepass
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; {advice}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}; {advice}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; {advice}")
    return values


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; ValueError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


# --- the cache and downloads ---------------------------------------------------------------------


def cache_dir() -> Path:
    """Return $MEZZOTINT_CACHE, else mezzotint/ in $XDG_CACHE_HOME or ~/.cache, for downloads."""
    own = os.environ.get("MEZZOTINT_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mezzotint"


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
    sha256 = sha256_of_file(path)
    if sha256 != published.sha256:
        raise ValueError(
            f"{path} is not the published {published.name}: expected SHA-256 {published.sha256} "
            f"({published.bytes:,} bytes), found {sha256} ({path.stat().st_size:,} bytes). "
            f"Delete it and download {published.url} again"
        )
    return path


def locate_file(published: PublishedFile, path: str | Path | None = None) -> Path:
    """Return a checked local copy: `path`, or from our cache or torch hub's, or downloaded."""
    if path is not None:
        return check_sha256(Path(path), published)
    torch_home = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch"))
    for folder in (cache_dir(), torch_home / "hub" / "checkpoints"):
        if (folder / published.name).is_file():
            return check_sha256(folder / published.name, published)
    return download_file(published, cache_dir() / published.name)


def download_file(published: PublishedFile, target: Path) -> Path:
    """Download to `target`, with a progress bar; the file gets its name once its hash is right."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def fetch(partial: Path) -> None:
        with (
            urllib.request.urlopen(published.url, timeout=30) as answer,
            partial.open("wb") as file,
            ProgressBar(published.name, published.bytes, unit="bytes") as bar,
        ):
            while block := answer.read(CHUNK_BYTES):
                file.write(block)
                bar.advance(len(block))
        check_sha256(partial, published)

    try:
        atomic_replace(target, fetch)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ValueError(
            f"{published.name} ({published.bytes / 1e6:.0f} MB, {published.licence}) is needed and "
            f"could not be downloaded ({error}). Download {published.url} on a machine with a "
            f"network and put it at {target}, or give its path"
        ) from error
    return target


def format_bytes(count: int) -> str:
    """Return a number of bytes with its unit, e.g. "25 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 10_000:
            return f"{count} {unit}"
        count //= 1000
    return f"{count} GB"
