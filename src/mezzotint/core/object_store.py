"""Files at addresses: s3://, gs://, hf://, az://, https://, file:// and memory://, through fsspec.

A path without a scheme is a local file. Nothing is cached, so a listing is never stale. A call that
fails for a passing reason is repeated, with growing pauses, until `patience` ends. An object
appears whole or not at all.
"""

from __future__ import annotations

import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.core.files import atomic_replace, atomic_write
from mezzotint.core.store_calls import (
    PART_ATTEMPTS,
    call_store,
    local_path,
    patience,
    send_to_store,
)
from mezzotint.core.store_errors import (
    MissingFileError,
    StoreError,
    StoreUnavailable,
    is_missing_bucket,
    scheme_of,
    without_query,
)

__all__ = [
    "MissingFileError", "StoreError", "StoreUnavailable", "StoredFile", "delete_files",
    "download_file", "is_address", "join_address", "list_files", "local_target",
    "open_file", "patience", "read_bytes", "same_place", "stat_file", "upload_file", "write_bytes",
]  # fmt: skip

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
READ_AHEAD_BYTES = 1 << 20


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
    """Return whether a text is an address, "SCHEME://...", rather than a path or a name."""
    return ADDRESS.match(text) is not None


def join_address(base: str, *parts: str) -> str:
    """Return the address of a file below another one."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def same_place(a: str, b: str) -> bool:
    """Return whether two addresses or paths name one place."""
    if {scheme_of(a), scheme_of(b)} == {"file"}:
        return local_path(a).resolve() == local_path(b).resolve()
    ends = [address.partition("://")[2].strip("/") for address in (a, b)]
    return scheme_of(a) == scheme_of(b) and ends[0] == ends[1]


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
        fs.invalidate_cache()  # the hub's file system ignores use_listings_cache
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
        files = call_store(address, find)
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
        return call_store(address, stat)
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

    return call_store(address, read)


def open_file(address: str) -> io.BufferedReader:
    """Open a file for reading at any place; every read waits for the store like `read_bytes`."""
    if scheme_of(address) == "file":
        return open(local_path(address), "rb")
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
        lambda partial: call_store(
            address, lambda fs, stored: fs.get_file(stored, str(partial)), PART_ATTEMPTS
        ),
    )


# --- writing -------------------------------------------------------------------------------------


def write_bytes(address: str, data: bytes) -> None:
    """Write a file, which appears whole, and replaces any at this address."""
    _check_writable(address)
    if scheme_of(address) == "file":
        atomic_write(local_target(address), data)
    else:
        call_store(
            address,
            lambda fs, stored: send_to_store(fs, "pipe_file", len(data), stored, data),
            PART_ATTEMPTS,
        )


def local_target(address: str) -> Path:
    """Return the path of a local address to write, and make its folder.

    Errors: StoreError where there can be none.
    """
    path = local_path(address)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreError(
            f"{address} cannot be written ({error.filename}: {reason}); give another address, or "
            "check the permissions of its folder"
        ) from None
    return path


def upload_file(path: Path, address: str) -> None:
    """Copy a file of the disk to a store, where it appears whole."""
    _check_writable(address)
    if scheme_of(address) == "file":
        target = local_target(address)

        def copy(partial: Path) -> None:
            call_store(address, lambda fs, _: fs.put_file(str(path), str(partial)))

        atomic_replace(target, copy)
    else:
        size = path.stat().st_size
        call_store(
            address,
            lambda fs, stored: send_to_store(fs, "put_file", size, str(path), stored),
            PART_ATTEMPTS,
        )


def delete_files(address: str) -> None:
    """Delete a file, or everything below a folder; nothing where there is none."""
    _check_writable(address)
    if "*" in address:
        raise StoreError(f"{address} holds a *; only a file or a folder is deleted")
    files = list_files(address, allow_empty=True)

    def delete(file: StoredFile) -> None:
        with suppress(MissingFileError):  # another process was faster, or a failed attempt was
            call_store(file.address, lambda fs, path: fs.rm_file(path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(delete, files))
    if scheme_of(address) == "file":
        _remove_empty_folders(local_path(address))


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
    except (FileNotFoundError, NotADirectoryError) as error:  # or below a file
        if is_missing_bucket(error):
            raise
        return {}
    return {} if info.get("type") == "directory" else {info.get("name", path): info}


def _stored(scheme: str, name: str, info: dict[str, Any]) -> StoredFile:
    keys = ("ETag", "etag", "blob_id", "sha256", "md5Hash", "crc32c", "mtime", "last_modified")
    version = next((str(info[key]) for key in (*keys, "created") if info.get(key)), "")
    address = (
        name
        if "://" in name
        else f"{scheme}://{name if scheme.lower() == 'file' else name.lstrip('/')}"
    )
    return StoredFile(address, int(info.get("size") or 0), version.strip('"'))


def _written_scheme(address: str) -> str:
    return address.partition("://")[0] if "://" in address else "file"
