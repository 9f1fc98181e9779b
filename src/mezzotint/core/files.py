"""Files: atomic writes, hashes, JSON, the cache, downloads with a pinned SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A published file: where it is, what its bytes must be, under which licence."""

    name: str
    url: str
    sha256: str
    bytes: int
    licence: str


def sha256_of_file(path: str | Path) -> str:
    """Hex SHA-256 of a file; ValueError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def check_sha256(path: Path, weights: PublishedFile) -> Path:
    """`path`, after a ValueError unless its bytes are those published."""
    found = sha256_of_file(path)
    if found != weights.sha256:
        size = path.stat().st_size
        raise ValueError(
            f"{path} is not the published {weights.name}: expected SHA-256 {weights.sha256} ({weights.bytes:,} bytes), "
            f"found {found} ({size:,} bytes); was the download cut short? Delete it and fetch {weights.url} again"
        )
    return path


def locate_file(weights: PublishedFile, path: str | Path | None = None) -> Path:
    """The published file, checked: at `path`, in our cache or torch hub's, else fetched into our cache."""
    if path is not None:
        return check_sha256(Path(path), weights)
    hub = (
        Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch")) / "hub" / "checkpoints"
    )
    for folder in (cache_dir(), hub):
        if (folder / weights.name).is_file():
            return check_sha256(folder / weights.name, weights)
    return download_file(weights, cache_dir() / weights.name)


def download_file(weights: PublishedFile, target: Path) -> Path:
    """Download to `target` with a progress bar; the file appears there only whole and checked."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with (
            urllib.request.urlopen(weights.url, timeout=30) as answer,
            open(part, "wb") as file,
            Progress(*columns) as bar,
        ):
            task = bar.add_task(weights.name, total=weights.bytes)
            while block := answer.read(CHUNK_BYTES):
                file.write(block)
                bar.update(task, advance=len(block))
        check_sha256(part, weights)
        part.replace(target)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ValueError(
            f"{weights.name} ({weights.bytes / 1e6:.0f} MB, {weights.licence}) is needed and could not be fetched "
            f"({error}); fetch {weights.url} on a machine with a network and put it at {target}, or give its path"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target


def format_bytes(count: int) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB"):
        if count < 10_000:
            return f"{count} {unit}"
        count //= 1000
    return f"{count} GB"


def atomic_replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, flush it to disk and rename it: whoever looks sees the old one or the new."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def cache_dir() -> Path:
    """Where fetched weights are kept: $MEZZOTINT_CACHE, else mezzotint/ below $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("MEZZOTINT_CACHE")
    return (
        Path(own)
        if own
        else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mezzotint"
    )


@contextmanager
def atomic_open(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name only when it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    with atomic_open(path) as file:
        file.write((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The card in a file; ValueError where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no card: {error}; remove it to start anew") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no card; remove it to start anew")
    return values


def fsync_path(path: Path) -> None:
    """Ask the disk to keep what was written to a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
