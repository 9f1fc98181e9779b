"""Files at addresses: s3://, gs://, hf://, az://, https://, file:// and memory://, through fsspec.

A path without a scheme is a local file. Nothing is cached: a listing is never stale. Every call
repeats what fails for a passing reason, with growing pauses, until `patience` ends. An object
appears whole or not at all.
"""

from __future__ import annotations

import asyncio
import functools
import io
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mezzotint.core.files import atomic_replace, atomic_write
from mezzotint.core.store_errors import (
    SCHEMES,
    MissingFileError,
    PassingError,
    StoreError,
    StoreUnavailable,
    scheme_of,
    translate_error,
    unavailable,
    without_query,
)

__all__ = [
    "MissingFileError", "StoreError", "StoreUnavailable", "StoredFile", "delete_files",
    "download_file", "is_address", "join_address", "list_files", "open_file", "patience",
    "read_bytes", "stat_file", "upload_file", "write_bytes",
]  # fmt: skip

T = TypeVar("T")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
PATIENCE_S = 60.0
NOTICE_S = 5.0  # after which a line says what is waited for
# Parts of a large file are repeated by the library, so that one of them does not cost the others.
PART_ATTEMPTS = 2
READ_AHEAD_BYTES = 1 << 20
SLOWEST_BYTES_PER_S = 1 << 20  # a slower upload is repeated

_patience_s = float(os.environ.get("MEZZOTINT_STORE_PATIENCE_S", PATIENCE_S))


@dataclass(frozen=True)
class StoredFile:
    """A file of a store.

    version: changes with the content: the ETag, else a checksum, else the time of the last
        change; "" where the store says nothing.
    """

    address: str
    num_bytes: int
    version: str


def is_address(text: str) -> bool:
    """Return whether a text is an address, "SCHEME://...", and no path or name of a data set."""
    return ADDRESS.match(text) is not None


def join_address(base: str, *parts: str) -> str:
    """Return the address of a file below another one."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait at most this long for a store that does not answer, in all threads of the process."""
    global _patience_s
    before, _patience_s = _patience_s, seconds
    try:
        yield
    finally:
        _patience_s = before


# --- reading -------------------------------------------------------------------------------------


def list_files(
    address: str, suffixes: tuple[str, ...] = (), allow_empty: bool = False
) -> list[StoredFile]:
    """Return the files below a folder (recursively), of a pattern with *, or one file, by address.

    Args:
        suffixes: of the files to return; all without.
        allow_empty: return [] where there is nothing, instead of an error.

    Errors: StoreError for no access, no such bucket, and no files; StoreUnavailable.
    """
    scheme = _written_scheme(address)

    def find(fs: Any, path: str) -> list[StoredFile]:
        fs.invalidate_cache()  # the hub's file system keeps listings whatever it is told
        if "*" in path:
            found = fs.glob(path, detail=True)
        else:
            found = {} if address.endswith("/") else _single(fs, path)
            found = found or fs.find(path, detail=True)
        infos = {name: info for name, info in found.items() if info.get("type") != "directory"}
        for name, info in infos.items():
            if info.get("size") is None:  # an index page of a web server has no sizes
                infos[name] = fs.info(name)
        return [_stored(scheme, name, info) for name, info in infos.items()]

    try:
        files = _call(address, find)
    except MissingFileError:
        files = []
    if suffixes:
        files = [file for file in files if file.address.lower().endswith(suffixes)]
    if not files and not allow_empty:
        kind = f" that end in {' or '.join(suffixes)}" if suffixes else ""
        raise MissingFileError(
            f"there are no files{kind} at {without_query(address)}; check the address"
        )
    return sorted(files, key=lambda file: file.address)


def stat_file(address: str) -> StoredFile | None:
    """Return size and version of a file; None where there is none."""

    def stat(fs: Any, path: str) -> StoredFile | None:
        fs.invalidate_cache()
        return next(
            (_stored(_written_scheme(address), *item) for item in _single(fs, path).items()), None
        )

    try:
        return _call(address, stat)
    except MissingFileError:
        return None


def read_bytes(address: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of a file, or those from `start` to before `end`.

    Errors: MissingFileError where there is no such file.
    """

    def read(fs: Any, path: str) -> bytes:
        content = bytes(fs.cat_file(path, start=start, end=end))
        if start is not None and end is not None and len(content) > end - start:
            content = content[start:end]  # a web server that knows no ranges sends everything
        return content

    return _call(address, read)


def open_file(address: str) -> io.BufferedReader:
    """Open a file for reading at any place; every read waits for the store like `read_bytes`."""
    if scheme_of(address) == "file":
        return open(_local_path(address), "rb")
    found = stat_file(address)
    if found is None:
        raise MissingFileError(f"{without_query(address)} does not exist; check the address")
    return io.BufferedReader(_RangeReader(found), READ_AHEAD_BYTES)


class _RangeReader(io.RawIOBase):
    """A file of a store, read by ranges."""

    def __init__(self, file: StoredFile):
        self.file = file
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.file.num_bytes}
        self.position = max(0, base[whence] + offset)
        return self.position

    def readall(self) -> bytes:
        return self._read(self.file.num_bytes)

    def readinto(self, buffer: Any) -> int:
        content = self._read(min(self.position + len(buffer), self.file.num_bytes))
        buffer[: len(content)] = content
        return len(content)

    def _read(self, end: int) -> bytes:
        if end <= self.position:
            return b""
        content = read_bytes(self.file.address, self.position, end)
        if len(content) != end - self.position:
            raise StoreError(
                f"{without_query(self.file.address)} has changed while it was read: bytes "
                f"{self.position} to {end} are not there any more; repeat the command"
            )
        self.position = end
        return content


def download_file(address: str, path: Path) -> None:
    """Copy a file of a store to the disk, where it appears whole.

    Errors: MissingFileError where there is no such file; OSError where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_replace(
        path,
        lambda partial: _call(
            address, lambda fs, stored: fs.get_file(stored, str(partial)), PART_ATTEMPTS
        ),
    )


# --- writing -------------------------------------------------------------------------------------


def write_bytes(address: str, data: bytes) -> None:
    """Write a file, which appears whole, and replaces any at this address."""
    _check_writable(address)
    if scheme_of(address) == "file":
        path = _local_path(address)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    else:
        _call(
            address,
            lambda fs, stored: _send(fs, "pipe_file", len(data), stored, data),
            PART_ATTEMPTS,
        )


def upload_file(path: Path, address: str) -> None:
    """Copy a file of the disk to a store, where it appears whole."""
    _check_writable(address)
    if scheme_of(address) == "file":
        target = _local_path(address)
        target.parent.mkdir(parents=True, exist_ok=True)

        def copy(partial: Path) -> None:
            _call(address, lambda fs, _: fs.put_file(str(path), str(partial)))

        atomic_replace(target, copy)
    else:
        size = path.stat().st_size
        _call(
            address,
            lambda fs, stored: _send(fs, "put_file", size, str(path), stored),
            PART_ATTEMPTS,
        )


def _send(fs: Any, method: str, num_bytes: int, *arguments: Any) -> None:
    """Call a writing method of a file system, for a time that its size allows.

    The libraries limit how long they wait for an answer, and not how long for a server that takes
    no more bytes.
    """
    if not fs.async_impl:
        getattr(fs, method)(*arguments)
        return
    from fsspec.asyn import sync

    limit_s = PART_ATTEMPTS * _read_timeout_s(_patience_s) + num_bytes / SLOWEST_BYTES_PER_S

    async def send() -> None:
        await asyncio.wait_for(getattr(fs, f"_{method}")(*arguments), limit_s)

    sync(fs.loop, send)


def delete_files(address: str) -> None:
    """Delete a file, or everything below a folder; nothing where there is none."""
    _check_writable(address)
    if "*" in address:
        raise StoreError(f"{address} holds a *; only a file or a folder is deleted")
    files = list_files(address, allow_empty=True)

    def delete(file: StoredFile) -> None:
        with suppress(MissingFileError):  # another process was faster, or a failed attempt was
            _call(file.address, lambda fs, path: fs.rm_file(path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(delete, files))
    if scheme_of(address) == "file":
        _remove_empty_folders(_local_path(address))


def _remove_empty_folders(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        for inner, _, _ in os.walk(folder, topdown=False):
            if not os.listdir(inner):
                os.rmdir(inner)


def _check_writable(address: str) -> None:
    if scheme_of(address) in ("http", "https"):
        raise StoreError(
            f"{without_query(address)} can be read and not written; give an s3://, gs:// or hf:// "
            "address, or a folder"
        )


# --- file systems --------------------------------------------------------------------------------


def _single(fs: Any, path: str) -> dict[str, Any]:
    """Return {name: facts} of the one file at a path, {} where there is none."""
    try:
        info = fs.info(path)
    except FileNotFoundError as error:
        if "bucket" in str(error).lower():  # the caller says so
            raise
        return {}
    return {} if info.get("type") == "directory" else {info.get("name", path): info}


def _stored(scheme: str, name: str, info: dict[str, Any]) -> StoredFile:
    keys = ("ETag", "etag", "blob_id", "sha256", "md5Hash", "crc32c", "mtime", "last_modified")
    version = next((str(info[key]) for key in (*keys, "created") if info.get(key)), "")
    address = (
        name if "://" in name else f"{scheme}://{name if scheme == 'file' else name.lstrip('/')}"
    )
    return StoredFile(address, int(info.get("size") or 0), version.strip('"'))


def _written_scheme(address: str) -> str:
    return address.partition("://")[0] if "://" in address else "file"


def _local_path(address: str) -> Path:
    return Path(os.path.abspath(address.removeprefix("file://")))


def _call(address: str, act: Callable[[Any, str], T], attempts: int = 1) -> T:
    """Return `act(file system, path)`, repeated while it fails for reasons that pass."""
    if "::" in address:
        raise StoreError(f"{address} chains file systems with ::, which is not read")
    begin, wait_s = time.monotonic(), _patience_s
    pause, told = 0.2, False
    while True:
        attempt = time.monotonic()
        try:
            fs = _filesystem(
                os.getpid(), scheme_of(address), attempts, wait_s, tuple(_environment())
            )
            return act(fs, fs._strip_protocol(_plain(address)))
        except Exception as error:
            reason = translate_error(error, address)
            if not isinstance(reason, PassingError):
                if reason is error:
                    raise
                raise reason from error
            now = time.monotonic()
            passed = now - begin
            if passed + (now - attempt) > wait_s:  # another one like this would be too long
                raise unavailable(address, str(reason), passed) from error
        if passed >= NOTICE_S and not told:
            told = True
            print(f"waiting for {without_query(address)}: {reason}", file=sys.stderr, flush=True)
        # Many processes that lost the same store do not all come back at the same moment.
        time.sleep(min(pause * (0.5 + secrets.randbelow(1000) / 1000), max(0, wait_s - passed)))
        pause = min(2 * pause, 8.0)


def _plain(address: str) -> str:
    """Return an address as its file system expects it: an absolute path for a local one."""
    return str(_local_path(address)) if scheme_of(address) == "file" else address


def _environment() -> Iterator[tuple[str, str]]:
    """Yield what the environment says of stores: a file system reads it once, when it is made."""
    prefixes = ("AWS_", "GOOGLE_", "AZURE_", "HF_")
    return ((key, os.environ[key]) for key in sorted(os.environ) if key.startswith(prefixes))


def _read_timeout_s(wait_s: float) -> float:
    return min(30.0, wait_s / 3)


@functools.lru_cache(maxsize=16)
def _filesystem(
    pid: int, scheme: str, attempts: int, wait_s: float, environment: tuple[tuple[str, str], ...]
) -> Any:
    """Return the file system of a scheme, one for all threads of a process (`pid`).

    fsspec would make one for each thread. A forked process makes its own.
    """
    import fsspec

    if scheme not in SCHEMES:
        raise StoreError(f"{scheme}:// is no scheme that can be read; use {', '.join(SCHEMES)}")
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    # An attempt is short enough that there is a second one, and a third.
    read_s = _read_timeout_s(wait_s)
    connect_s = min(10.0, read_s)
    try:
        if scheme == "s3":
            options["config_kwargs"] = {
                "connect_timeout": connect_s, "read_timeout": read_s,
                "retries": {"total_max_attempts": attempts, "mode": "standard"},
            }  # fmt: skip
        elif scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=read_s)
            options["client_kwargs"] = {"timeout": timeout}
        fs = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = SCHEMES[scheme][0]
        raise StoreError(
            f"{scheme}:// needs {error.name or package}: pip install '{package}'"
        ) from None
    if scheme == "s3":
        fs.retries = 1  # ours and botocore's are enough
    return fs
