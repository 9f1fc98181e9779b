"""Weight files by path, by cache, or fetched: always with their SHA-256."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from mezzotint.weights import cache_dir, sha256_of_module

__all__ = ["INCEPTION", "WeightFile", "cache_dir", "checked", "fetch", "located", "sha256_of", "sha256_of_module"]

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A published file: where it is, what its bytes must be, under which licence."""

    name: str
    url: str
    sha256: str
    bytes: int
    licence: str


# The 2015-12-05 TensorFlow Inception as converted for PyTorch by M. Seitzer; batch norm not folded.
INCEPTION = WeightFile(
    name="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    bytes=95_628_359,
    licence="Apache-2.0",
)


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file; ValueError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def checked(path: Path, weights: WeightFile) -> Path:
    """`path`, after a ValueError unless its bytes are those published."""
    found = sha256_of(path)
    if found != weights.sha256:
        size = path.stat().st_size
        raise ValueError(
            f"{path} is not the published {weights.name}: expected SHA-256 {weights.sha256} ({weights.bytes:,} bytes), "
            f"found {found} ({size:,} bytes); was the download cut short? Delete it and fetch {weights.url} again"
        )
    return path


def located(weights: WeightFile, path: str | Path | None = None) -> Path:
    """The published file, checked: at `path`, in our cache or torch hub's, else fetched into our cache."""
    if path is not None:
        return checked(Path(path), weights)
    hub = Path(os.environ.get("TORCH_HOME", Path.home() / ".cache" / "torch")) / "hub" / "checkpoints"
    for folder in (cache_dir(), hub):
        if (folder / weights.name).is_file():
            return checked(folder / weights.name, weights)
    return fetch(weights, cache_dir() / weights.name)


def fetch(weights: WeightFile, target: Path) -> Path:
    """Download to `target` with a progress bar; the file appears there only whole and checked."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

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
        checked(part, weights)
        part.replace(target)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ValueError(
            f"{weights.name} ({weights.bytes / 1e6:.0f} MB, {weights.licence}) is needed and could not be fetched "
            f"({error}); fetch {weights.url} on a machine with a network and put it at {target}, or give its path"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return target
