"""Checkpoints read without running their code.

`torch.distributed.checkpoint` describes its files in a pickle, `.metadata`, and stores every value
that is no tensor as a pickle too. A pickle can call any function. The description is read here with
a record of its own in place of each class that torch writes there; every other name is refused.
Values are read with torch's `weights_only=True`.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, no_type_check

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from mezzotint.core.tensor_files import scan_torch_file

METADATA = ".metadata"
DATA_FILE = re.compile(r"__\d+_\d+\.distcp")  # RANK_NUMBER: a plain name, so inside the folder
MAX_DIMS = 8


# `no_type_check` keeps the tests' checks of argument types out of what a checkpoint calls 30,000
# times: they took most of the time of a resume.
@no_type_check
class _Record:
    """What a pickle makes in place of one of torch's objects: its arguments and its state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _record_type(name: str) -> type[_Record]:
    return type(name, (_Record,), {})


_META = "torch.distributed.checkpoint.metadata"
_TYPES: dict[tuple[str, str], type[_Record]] = {
    (module, name): _record_type(name)
    for module, names in {
        _META: (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
        # The place where the checkpoint was written; Python 3.13 keeps paths in a private module.
        "pathlib": ("PosixPath", "WindowsPath"),
        "pathlib._local": ("PosixPath", "WindowsPath"),
    }.items()
    for name in names
}  # fmt: skip
_DTYPES = {name: d for name in dir(torch) if isinstance(d := getattr(torch, name), torch.dtype)}


# The unpickler in C would allocate whatever index a damaged or hostile file names for its memo.
@no_type_check
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _record_type("dtype")(name)
        if (module, name) not in _TYPES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _TYPES[module, name]

    def load_setitem(self: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_check_key(key)] = value

    def load_setitems(self: Any) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_check_key(key)] = value

    def refuse(self: Any) -> None:
        raise pickle.UnpicklingError("it holds a set, or a mapping of an old format")

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        **dict.fromkeys((op[0] for op in (pickle.DICT, pickle.ADDITEMS, pickle.FROZENSET)), refuse),
    }


@no_type_check
def _check_key(key):
    """Return a key that takes no time to hash; a tuple of tuples may take for ever."""
    if type(key) is not str and not isinstance(key, _Record):
        raise pickle.UnpicklingError(f"it holds a {type(key).__name__} as a key")
    return key


def read_metadata(folder: Path) -> Metadata:
    """Return what a checkpoint folder says that its files hold, without running code of it.

    Errors: ValueError for a file that is missing, damaged, or holds anything else.
    """
    path = folder / METADATA
    if not path.is_file():
        raise ValueError(f"{METADATA} is missing")
    try:
        return _parse(path.read_bytes())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{METADATA} was refused: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any opcode, with any exception
        raise ValueError(f"{METADATA} is damaged ({type(error).__name__}: {error})") from None


@functools.lru_cache(maxsize=1)  # a resume asks twice: to check the files, and to load them
def _parse(data: bytes) -> Metadata:
    return _to_metadata(_Unpickler(io.BytesIO(data)).load())


@no_type_check
def _expect(value: Any, name: str) -> _Record:
    """Return a value that stands for an object of torch's class `name`."""
    if not isinstance(value, _Record) or type(value).__name__ != name:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} in place of a {name}")
    return value


@no_type_check
def _fields(value: Any, name: str) -> dict[str, Any]:
    """Return the fields of one of torch's dataclasses."""
    return _check(_expect(value, name).state, dict)


@no_type_check
def _check(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__} in place of {kind}")
    return value


@no_type_check
def _size(record: Any) -> torch.Size:
    (values,) = _expect(record, "Size").args
    if len(values) > MAX_DIMS:
        raise pickle.UnpicklingError(f"it holds a tensor of {len(values)} dimensions")
    return torch.Size([_check(v, int) for v in values])


def _to_metadata(root: Any) -> Metadata:
    fields = _fields(root, "Metadata")
    stored = dict(map(_storage_item, _check(fields["storage_data"], dict).items()))
    items = _check(fields["state_dict_metadata"], dict)
    # One list may be named many times: its parts are counted before they are copied.
    chunks = sum(len(r.state["chunks"]) for r in items.values() if "chunks" in r.state)
    if chunks > len(stored):
        raise pickle.UnpicklingError(f"it names {chunks} parts and stores {len(stored)}")
    described = {_check(name, str): _describe(record) for name, record in items.items()}
    return Metadata(described, storage_data=stored, storage_meta=StorageMeta())


def _storage_item(item: tuple[Any, Any]) -> tuple[MetadataIndex, _StorageInfo]:
    """Return where one value or one part of a tensor is stored."""
    index, info = _fields(item[0], "MetadataIndex"), _fields(item[1], "_StorageInfo")
    offset = index.get("offset")
    file = _check(info["relative_path"], str)
    if not DATA_FILE.fullmatch(file):
        raise pickle.UnpicklingError(f"it names the file {file!r}")
    if info.get("transform_descriptors") is not None:
        raise pickle.UnpicklingError("its files are transformed")
    begin, length = _check(info["offset"], int), _check(info["length"], int)
    if begin < 0 or length < 0:
        raise pickle.UnpicklingError(f"it names {length} bytes at {begin}")
    key = MetadataIndex(_check(index["fqn"], str), None if offset is None else _size(offset))
    return key, _StorageInfo(file, begin, length)


def _describe(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(record).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    dtype = _expect(_expect(fields["properties"], "TensorProperties").state[0], "dtype")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(_DTYPES[dtype.args[0]]),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(c["offsets"]), _size(c["sizes"])) for c in chunks],
    )


def file_sizes(metadata: Metadata) -> Mapping[str, int]:
    """Return the data files that a checkpoint must have, with the least size of each."""
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        end = info.offset + info.length
        sizes[info.relative_path] = max(end, sizes.get(info.relative_path, 0))
    return sizes


class CheckpointReader(FileSystemReader):
    """Torch's reader of a checkpoint folder, with the description read by `read_metadata`."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.metadata = read_metadata(folder)

    def read_metadata(self) -> Metadata:
        """Return the description; without arguments, so that torch reads no other in its place."""
        return self.metadata


class PlainValues(DefaultLoadPlanner):
    """Torch's planner of a restore, for values that are plain: numbers, strings and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Hand torch's code a copy of what `weights_only` reads, and never the file's bytes."""
        scan_torch_file(value)
        copy = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)
