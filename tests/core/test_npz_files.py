"""Arrays of .npz files: sizes are checked before anything is read."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mezzotint.core.npz_files import npz_names, open_npy_member, read_npz, write_npz


def write_member(path: Path, shape: tuple[int, ...], dtype: str, held: int, packed: bool) -> None:
    """Write an .npz whose array "mu" claims a shape and holds so many zero bytes."""
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with (
        zipfile.ZipFile(path, "w", method, compresslevel=1) as archive,
        archive.open("mu.npy", "w", force_zip64=True) as file,
    ):
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(held >> 20):
            file.write(bytes(1 << 20))
        file.write(bytes(held % (1 << 20)))


def test_arrays_come_back(tmp_path):
    arrays = {
        "a": np.arange(6).reshape(2, 3),
        "b": np.asfortranarray(np.eye(3)),
        "c": np.array("x"),
    }
    write_npz(tmp_path / "x.npz", arrays)
    np.savez_compressed(tmp_path / "y.npz", **arrays)
    for name in ("x.npz", "y.npz"):
        assert npz_names(tmp_path / name) == ["a", "b", "c"]
        read = read_npz(tmp_path / name, arrays)
        assert all(np.array_equal(read[k], v) for k, v in arrays.items())


@pytest.mark.parametrize(
    ("shape", "dtype", "held", "packed", "named"),
    [
        ((10**9,), "<f8", 800, False, "damaged.*8,000,000,000 bytes, it holds 800"),
        ((2**40, 2**40), "|u1", 100, True, "damaged"),
        ((10,), "<f8", 79, False, "it holds 79"),
        ((-2, -5), "|u1", 10, False, "damaged"),
        ((3 << 26,), "|u1", 3 << 26, True, "over 100 times its size.*numpy.savez"),
        ((1 << 24, 4), "<f4", 1 << 28, True, "over 100 times its size"),
    ],
)
def test_sizes_are_checked_before_anything_is_read(tmp_path, shape, dtype, held, packed, named):
    write_member(tmp_path / "x.npz", shape, dtype, held, packed)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=named):
            read_npz(tmp_path / "x.npz", ["mu"])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_many_arrays_have_a_limit_together(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(1000), b=np.zeros(1000))
    assert len(read_npz(tmp_path / "x.npz", ["a", "b"], 16000)) == 2
    with pytest.raises(ValueError, match=r"16,000 bytes; at most 15,999"):
        read_npz(tmp_path / "x.npz", ["a", "b"], 15999)


def test_a_smaller_declared_member_does_not_grow(tmp_path):
    """A zip whose directory states fewer bytes than the data unpacks to."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, mu=np.zeros(100_000))
    data = bytearray(buffer.getvalue())
    real, small = (n.to_bytes(4, "little") for n in (800_128, 928))
    assert data.count(real) >= 1
    (tmp_path / "x.npz").write_bytes(bytes(data).replace(real, small))
    with pytest.raises(ValueError, match="damaged"):
        read_npz(tmp_path / "x.npz", ["mu"])


@pytest.mark.parametrize("data", [b"", b"PK\3\4 no zip", b"PK\5\6" + bytes(18)])
def test_damaged_files_are_refused(tmp_path, data):
    (tmp_path / "x.npz").write_bytes(data)
    with (
        pytest.raises(ValueError, match=r"x\.npz"),
        open_npy_member(tmp_path / "x.npz", "mu"),
    ):
        pass
