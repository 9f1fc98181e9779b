"""A cache of shards on a local disk: fetched once, kept as Arrow, read through a memory map.

`datasets` parses a shard, parquet or webdataset, into one Arrow file; see docs/shards.md for why.
Processes of a machine share the cache: a lock per shard lets one of them fetch, and the shards used
least recently make room for new ones. A file that a process still maps can be removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from mezzotint.core.files import atomic_replace, format_bytes
from mezzotint.core.object_store import StoredFile, download_file, patience, stat_file
from mezzotint.core.store_calls import local_path
from mezzotint.core.store_errors import scheme_of
from mezzotint.data.shard_format import COLUMNS, TOKENS, RowHash
from mezzotint.data.sources import hash_parts

ARROW, LOCK = ".arrow", ".lock"
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
BATCH_ROWS = 256  # in one Arrow record batch
LEFTOVER_S = 3600.0  # an unfinished file that is older was left by a killed process


class UnreadableShardError(Exception):
    """A shard that is missing, cut, changed or damaged; the message says which."""


class EmptyShardError(UnreadableShardError):
    """A shard without rows."""


@dataclass(frozen=True)
class ShardCache:
    """A folder of at most `max_bytes` of shards.

    patience_s: seconds to wait for a store that does not answer.
    """

    folder: Path
    max_bytes: int
    patience_s: float = 60.0

    def check(self, source: str = "") -> None:
        """Raise ValueError where the disk cannot hold the cache, OSError where it is not writable.

        Args:
            source: address or folder of the shards, which the cache must not be in.

        What the cache holds already counts as free. What killed processes left is removed.
        """
        local = local_path(source) if source and scheme_of(source) == "file" else None
        if local and self.folder.absolute().is_relative_to(local):
            raise ValueError(
                f"the shards of {source} cannot be kept in a folder of their own set, "
                f"{self.folder}; give another by data.shards.cache=FOLDER"
            )
        self._check_folder()
        for pattern in ("*.stored", ".*.partial"):
            for path in self.folder.glob(pattern):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > LEFTOVER_S:
                        path.unlink()
        free = shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())
        if self.max_bytes > free:
            raise ValueError(
                f"data.shards.cache_gb={self.max_bytes / 1e9:g} is more than the disk of "
                f"{self.folder} has free, {format_bytes(free)}; give less, or another disk by "
                "data.shards.cache=FOLDER"
            )

    def _check_folder(self) -> None:
        advice = "give a folder on a local disk by data.shards.cache=FOLDER"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise OSError(
                f"shards cannot be kept in {self.folder}: {error.strerror or error}; {advice}"
            ) from None

    def open(self, shard: StoredFile, builder: str, row_hash: str = "") -> Any:
        """Return a shard's rows as a `datasets.Dataset` on a memory map; fetch it if need be.

        Args:
            builder: of `datasets`: parquet, arrow or webdataset.
            row_hash: that its rows must have, see `shard_format.RowHash`; "" where none is known.

        Errors: `UnreadableShardError`; OSError where the store does not answer or the disk is full.
        """
        path = self.path(shard, builder)
        # Another process may remove it before it is mapped; a disk may damage it.
        for _ in range(3):
            if not path.is_file():
                self.fetch(shard, builder, row_hash)
            with suppress(FileNotFoundError):
                os.utime(path)
                try:
                    return _map_rows(path)
                except (ValueError, EOFError, OSError) as error:
                    # Of pyarrow, for a file that is cut; an error of the system has a number.
                    if isinstance(error, OSError) and error.errno is not None:
                        raise
                    path.unlink(missing_ok=True)
        raise OSError(f"{path} was removed as soon as it was fetched; raise data.shards.cache_gb")

    def path(self, shard: StoredFile, builder: str) -> Path:
        """Return where a shard lies once it is fetched; another version lies elsewhere."""
        key = hash_parts([shard.address, str(shard.num_bytes), shard.version, builder])
        return self.folder / f"{key}{ARROW}"

    def fetch(self, shard: StoredFile, builder: str, row_hash: str = "") -> None:
        """Fetch a shard that is not here; processes that ask for the same one wait for the first.

        Errors: as `open`.
        """
        path = self.path(shard, builder)
        with locked(path.with_suffix(LOCK)):
            if path.is_file():
                return
            self._make_room(2 * shard.num_bytes)  # as it is stored, and as Arrow
            stored = path.with_suffix(f".{os.getpid()}.stored")
            try:
                with patience(self.patience_s):
                    check_unchanged(shard)
                    download_file(shard.address, stored)
                if stored.stat().st_size != shard.num_bytes:
                    raise UnreadableShardError("it was cut while it was read")

                def write(partial: Path) -> None:
                    write_arrow(stored, builder, partial)
                    if row_hash and hash_rows(_map_rows(partial)) != row_hash:
                        raise UnreadableShardError("its rows are not those that its card states")

                atomic_replace(path, write)
            finally:
                stored.unlink(missing_ok=True)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of the shards here."""
        found = []
        for path in self.folder.glob(f"*{ARROW}"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _make_room(self, num_bytes: int) -> None:
        """Remove the shards used least recently until `num_bytes` more fit."""
        with locked(self.folder / f"room{LOCK}"):
            files = sorted(self._files())
            excess = sum(size for _, size, _ in files) + num_bytes - self.max_bytes
            for _, size, path in files:
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                path.with_suffix(LOCK).unlink(missing_ok=True)
                excess -= size


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among the processes of a machine; it ends with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # A lock file that was removed while we waited locks nobody out.
            with suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    yield
                    return


def check_unchanged(shard: StoredFile) -> None:
    """Raise `UnreadableShardError` for a shard that is missing, or not as it was indexed."""
    found = stat_file(shard.address)
    if found is None:
        raise UnreadableShardError("it is missing")
    if found.num_bytes != shard.num_bytes:
        raise UnreadableShardError(
            f"it has {found.num_bytes:,} bytes, and {shard.num_bytes:,} when it was indexed"
        )
    if shard.version and found.version and shard.version != found.version:
        raise UnreadableShardError("it was written again after it was indexed")


def write_arrow(stored: Path, builder: str, target: Path) -> None:
    """Write the rows of a parquet, Arrow or webdataset file as an Arrow stream.

    Errors: `EmptyShardError` for one without rows; `UnreadableShardError` for a damaged one;
        OSError where the disk is full.
    """
    import pyarrow as pa

    try:
        schema, batches = _read_stored(stored, builder)
        count = 0
        with pa.OSFile(str(target), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches:
                count += batch.num_rows
                # Arrow cannot cast a slice of a struct that has a field of nulls.
                same = batch.schema.equals(schema)
                writer.write_table(batch if same else batch.cast(schema))
    except OSError as error:
        if error.errno:
            raise
        raise UnreadableShardError(f"it is damaged: {_first_line(error)}") from error
    except Exception as error:  # every builder raises its own
        raise UnreadableShardError(f"it is damaged: {_first_line(error)}") from error
    if count == 0:
        raise EmptyShardError("it holds no rows")


def _read_stored(stored: Path, builder: str) -> tuple[Any, Iterator[Any]]:
    """Return the schema and the tables of a stored shard."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm.std import tqdm

    # Several threads read shards. The lock of tqdm, which `datasets` uses, is made by one of them
    # and deleted at its end (tqdm.contrib.concurrent.ensure_lock), unless it exists before.
    tqdm.set_lock(tqdm.get_lock())
    # Else `datasets` asks a server of its authors, once a file, to count the download.
    cast(Any, datasets).config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error says what it logs
    if builder == "webdataset":
        from mezzotint.data.tar_rows import read_tar_rows

        return read_tar_rows(stored, BATCH_ROWS)
    if builder == "parquet" and not pq.read_metadata(stored).num_rows:
        return pq.read_schema(stored), iter(())  # `datasets` takes it for a damaged one
    rows = datasets.load_dataset(
        builder, data_files={"train": [str(stored)]}, split="train", streaming=True
    )
    batches: Iterator[Any] = iter(cast(Any, rows.with_format("arrow")).iter(BATCH_ROWS))
    first = next(batches, None)
    if first is None:
        return pa.schema([]), iter(())
    features = rows.features or datasets.Features.from_arrow_schema(first.schema)
    return features.arrow_schema, chain([first], batches)


def hash_rows(rows: Any) -> str:
    """Return the `RowHash` of a prepared shard's rows, a `datasets.Dataset`."""
    total = RowHash()
    names = [*COLUMNS, TOKENS] if TOKENS in rows.column_names else [*COLUMNS]
    for batch in rows.with_format("arrow").select_columns(names).iter(BATCH_ROWS):
        cells = [batch.column(name).to_pylist() for name in names]
        for image, label, text, name, *tokens in zip(*cells, strict=True):
            total.add(image, label, text, name, tokens[0] if tokens else None)
    return total.hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _map_rows(path: Path) -> Any:
    """Map a shard into memory; ValueError for one that is cut, also between two batches."""
    import datasets

    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(END)))
        if file.read() != END:
            raise ValueError("it is cut")
    return datasets.Dataset.from_file(str(path))
