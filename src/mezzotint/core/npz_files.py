"""Arrays in .npz files: sizes are checked before anything is read, and nothing is unpickled."""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from mezzotint.core.files import CHUNK_BYTES, atomic_open, open_regular

# What zipfile and numpy raise for a damaged archive.
DAMAGE = (
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
# An array of more than BOMB_BYTES that unpacks to more than BOMB_RATIO times its size is refused.
BOMB_BYTES, BOMB_RATIO = 64 << 20, 100


@contextmanager
def open_npy_member(
    file: str | Path, key: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
    """Open one array of a .npz as a stream placed after its header.

    Returns:
        The stream, the shape, the dtype, and whether the array is in Fortran order.

    Errors: ValueError for a damaged file, a missing array, pickled objects (never unpickled), a
        size other than its header's, and one that unpacks to far more than the file.
    """
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_regular(file))
            archive = stack.enter_context(zipfile.ZipFile(opened))
            member = archive.getinfo(f"{key}.npy")
            stream = stack.enter_context(archive.open(member))
            version = np.lib.format.read_magic(stream)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(stream)
        except DAMAGE as error:
            raise ValueError(f"{file} is damaged or has no array {key!r} ({error})") from error
        if dtype.hasobject:
            raise ValueError(f"{file}: array {key!r} holds pickled objects; refused")
        declared, held = math.prod(shape) * dtype.itemsize, member.file_size - stream.tell()
        if declared != held or min(shape, default=0) < 0:
            raise ValueError(
                f"{file}: {key} is damaged; its shape {shape} takes {declared:,} bytes, it holds "
                f"{held:,}"
            )
        if held > max(BOMB_BYTES, BOMB_RATIO * member.compress_size):
            raise ValueError(
                f"{file}: {key} unpacks to {held:,} bytes, over {BOMB_RATIO} times its size in the "
                "file; refused. If you trust it, save it with numpy.savez, which does not compress"
            )
        yield stream, shape, dtype, fortran_order


def npz_names(file: str | Path) -> list[str]:
    """Return the names of the arrays in a .npz, sorted."""
    try:
        with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
            return sorted(name.removesuffix(".npy") for name in archive.namelist())
    except DAMAGE as error:
        raise ValueError(f"{file} is not a complete .npz file ({error})") from error


def read_npz(
    file: str | Path, names: Iterable[str], max_bytes: int | None = None
) -> dict[str, np.ndarray]:
    """Read arrays of a .npz by name; errors as in `open_npy_member`.

    Args:
        max_bytes: of all these arrays together; ValueError where they take more.
    """
    names = list(names)
    if max_bytes is not None:
        total = 0
        for name in names:
            with open_npy_member(file, name) as (_, shape, dtype, _order):
                total += math.prod(shape) * dtype.itemsize
        if total > max_bytes:
            raise ValueError(f"{file} holds arrays of {total:,} bytes; at most {max_bytes:,}")
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        with open_npy_member(file, name) as (stream, shape, dtype, fortran_order):
            try:
                values = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
                view, done = values.data, 0
                while piece := stream.read(CHUNK_BYTES):
                    view[done : done + len(piece)] = piece
                    done += len(piece)
                order = "F" if fortran_order else "C"
                arrays[name] = values.view(dtype).reshape(shape, order=order)
            except DAMAGE as error:
                raise ValueError(f"{file}: array {name!r} is damaged ({error})") from error
    return arrays


def load_npy(path: Path, mmap: bool = False) -> np.ndarray:
    """Load the array of a .npy, or map it into memory; nothing is unpickled.

    Errors: numpy's OSError, ValueError and EOFError; OSError for a device, pipe or socket.
    """
    open_regular(path).close()
    return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a .npz atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
