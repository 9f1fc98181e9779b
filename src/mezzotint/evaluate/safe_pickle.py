"""Pickles of arrays read without running code, for EDM2's reference files.

A pickle can call any function. This reader knows eight names, each replaced by one of the classes
and functions below; it refuses all others. numpy's own unpickling code never sees the file's bytes.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.core.fields import shorten
from mezzotint.core.files import open_regular
from mezzotint.core.json_values import first_line
from mezzotint.core.pickle_scan import EXPANDED_LIMIT, scan_pickle

NUMBER_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


class _Dtype:
    """In place of numpy.dtype, for numbers only."""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if code.lstrip("<>|=") not in NUMBER_DTYPES:
            raise pickle.UnpicklingError(f"an array of dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """In place of numpy.ndarray."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran_order, data = state
        self.value = _make_array(data, dtype, shape, "F" if fortran_order else "C").value


def _make_array(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
        raise pickle.UnpicklingError("an array of other things than numbers")
    if (
        not isinstance(shape, tuple)
        or len(shape) > 32
        or not all(type(n) is int and 0 <= n < 2**48 for n in shape)
    ):
        raise pickle.UnpicklingError(f"an array of shape {shorten(shape)}")
    if math.prod(shape) * dtype.dtype.itemsize != len(data):
        raise pickle.UnpicklingError(f"an array of shape {shape} with {len(data)} bytes")
    array = _Array()
    array.value = np.frombuffer(data, dtype.dtype).reshape(
        shape, order="F" if order == "F" else "C"
    )
    return array


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _make_scalar(dtype: _Dtype, data: bytes) -> Any:
    return _make_array(data, dtype, (1,), "C").value[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):  # how protocols below 3 write bytes
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("multiarray", "_reconstruct"): _reconstruct,
    ("multiarray", "scalar"): _make_scalar,
    ("numeric", "_frombuffer"): _make_array,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
    ("dnnlib.util", "EasyDict"): dict,  # EDM's own subclass of dict
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        short = module_name.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if (short, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the name {module_name}.{global_name}")
        return _ALLOWED[short, global_name]

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("a persistent object")


def _to_plain(value: Any) -> Any:
    """Replace `_Array` by numpy arrays; refuse anything that is not plain data."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}")


def load_arrays(path: str | Path) -> Any:
    """Load numbers, strings, arrays of numbers, and dicts and lists of these.

    Errors: ValueError for a damaged file, for anything else in it, and for a small file that stands
        for a large number of values.
    """
    try:
        with open_regular(path) as file:
            if scan_pickle(file) > EXPANDED_LIMIT:
                raise ValueError(f"it stands for more than {EXPANDED_LIMIT:,} values")
            file.seek(0)
            return _to_plain(_ArrayUnpickler(file).load())
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it holds {error}, and only arrays of numbers are read"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any opcode, with any exception
        raise ValueError(
            f"{path} is not a readable pickle of arrays: {type(error).__name__}, "
            + first_line(error)
        ) from error
