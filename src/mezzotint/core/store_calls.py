"""Calls of file systems behind addresses: repeated until `patience` ends, each of limited time."""

from __future__ import annotations

import asyncio
import functools
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mezzotint.core.console import echo
from mezzotint.core.store_errors import (
    SCHEMES,
    PassingError,
    StoreError,
    scheme_of,
    translate_error,
    unavailable,
    without_query,
)

T = TypeVar("T")
PATIENCE_S = 60.0
NOTICE_S = 5.0  # of waiting, before a line names the store and the reason
# The library repeats a part of a large file, so that one failure does not cost the other parts.
PART_ATTEMPTS = 2
SLOWEST_BYTES_PER_S = 1 << 20  # a slower upload is repeated

_patiences: list[float] = []  # that are in force, in all threads; the newest counts


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Wait at most this long for a store that does not answer, in all threads of the process."""
    _patiences.append(seconds)
    try:
        yield
    finally:
        _patiences.remove(seconds)  # threads leave in any order


def patience_s() -> float:
    """Return for how long a call waits: `patience`, else MEZZOTINT_STORE_PATIENCE_S, else 60."""
    for seconds in reversed(_patiences):
        return seconds
    asked = os.environ.get("MEZZOTINT_STORE_PATIENCE_S", str(PATIENCE_S))
    try:
        seconds = float(asked)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise StoreError(
            f"MEZZOTINT_STORE_PATIENCE_S is {asked!r}; give seconds, e.g. 600, or unset it"
        )
    return seconds


def call_store(address: str, act: Callable[[Any, str], T], attempts: int = 1) -> T:
    """Return `act(file system, path)`, repeated while it fails for reasons that pass."""
    if "::" in address:
        raise StoreError(
            f"{address} chains file systems with ::, which is not supported; give one address"
        )
    begin, wait_s = time.monotonic(), patience_s()
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
        # Many processes that lost the same store do not all come back at the same moment.
        sleep_s = min(pause * (0.5 + secrets.randbelow(1000) / 1000), max(0, wait_s - passed))
        if passed + sleep_s >= NOTICE_S and not told:
            told = True
            echo(f"waiting for {without_query(address)}: {reason}", stderr=True)
        time.sleep(sleep_s)
        pause = min(2 * pause, 8.0)


def _plain(address: str) -> str:
    """Return an address as its file system expects it: an absolute path for a local one."""
    if scheme_of(address) == "file":
        return str(local_path(address))
    scheme, separator, rest = address.partition("://")
    return scheme.lower() + separator + rest


def _environment() -> Iterator[tuple[str, str]]:
    """Yield the variables that configure stores; a file system reads them once, when it is made."""
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


def send_to_store(fs: Any, method: str, num_bytes: int, *arguments: Any) -> None:
    """Call a writing method of a file system; fail if it takes too long for its size.

    The libraries limit how long they wait for an answer, but not for a server that stops taking
    bytes.
    """
    if not fs.async_impl:
        getattr(fs, method)(*arguments)
        return
    from fsspec.asyn import sync

    limit_s = PART_ATTEMPTS * _read_timeout_s(patience_s()) + num_bytes / SLOWEST_BYTES_PER_S

    async def send() -> None:
        await asyncio.wait_for(getattr(fs, f"_{method}")(*arguments), limit_s)

    sync(fs.loop, send)


def local_path(address: str) -> Path:
    """Return the absolute path of a local address."""
    return Path(os.path.abspath(address.partition("://")[2] if "://" in address else address))
