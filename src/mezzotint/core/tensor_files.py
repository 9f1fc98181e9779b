"""Safe reading of safetensors and .pth files: sizes are checked before anything is allocated.

Names, dtypes, shapes and byte counts are checked against the file's size first. Only then are
tensors read, one by one. Every failure is a ValueError that names the file.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import re
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mezzotint.core.fields import shorten
from mezzotint.core.files import atomic_replace, format_bytes, open_regular
from mezzotint.core.json_values import check_fields, parse_json
from mezzotint.core.pickle_scan import scan_pickle
from mezzotint.core.text import escape_name

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MOST_DIMENSIONS = 64  # of a tensor in torch
HEADER_LIMIT = 16 << 20  # bytes of a safetensors header
MOST_TENSORS = 1 << 15  # in a file, far more than any preset has


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor, as listed in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSource:
    """Named tensors that are not read yet.

    what: the file, for errors. claims: name -> dtype and shape, checked against the file's size.
    read: name -> the tensor, on the CPU; it may share memory with the file's content.
    metadata: texts that the file holds besides its tensors.
    """

    what: str
    claims: Mapping[str, TensorSpec]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_safetensors(path: Path) -> TensorSource:
    """Open a safetensors file and check its header; ValueError if it is damaged or truncated."""
    from safetensors import SafetensorError, safe_open

    claims, metadata = read_safetensors_header(path)

    @functools.cache
    def opened() -> Any:
        return safe_open(path, framework="pt")

    def read(name: str) -> Tensor:
        try:
            return opened().get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is no intact safetensors file: {error}") from None

    return TensorSource(str(path), claims, read, metadata)


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Read the header of a safetensors file; check it for consistency and against the file's size.

    Returns:
        dtype and shape by name, and the metadata.

    Format: 8 bytes length N (little endian), N bytes JSON {name: {dtype, shape, data_offsets}},
    then the data without gaps (huggingface/safetensors, README).
    """
    with open_regular(path) as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise ValueError(
                f"{path} is no intact safetensors file: it has {format_bytes(size)}, its first "
                f"bytes give a header of {format_bytes(length)}"
            )
        try:
            header = parse_json(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
            metadata = header.pop("__metadata__", {})
            check_fields({"__metadata__": metadata}, {"__metadata__": dict[str, str]})
            if len(header) > MOST_TENSORS:
                raise ValueError(f"it lists {len(header):,} tensors; at most {MOST_TENSORS:,}")
            for name, entry in header.items():
                check_fields({name: entry}, {name: dict})
                check_fields(entry, {"dtype": str, "shape": list[int], "data_offsets": list[int]})
                numbers = (*entry["shape"], *entry["data_offsets"])
                if len(entry["data_offsets"]) != 2 or not all(0 <= n < 2**63 for n in numbers):
                    raise ValueError(f"the sizes of {name} are {shorten(entry)}")
                if len(entry["shape"]) > MOST_DIMENSIONS:
                    raise ValueError(f"{name} has more than {MOST_DIMENSIONS} dimensions")
                if entry["dtype"] not in DTYPES:
                    raise ValueError(f"{name} has the unknown dtype {shorten(entry['dtype'])}")
        except ValueError as error:
            raise ValueError(
                f"{path} is no intact safetensors file: its header cannot be read: {error}"
            ) from None
    claims = {k: TensorSpec(DTYPES[v["dtype"]], tuple(v["shape"])) for k, v in header.items()}
    spans = sorted((*v["data_offsets"], k) for k, v in header.items())
    end, held = 0, size - 8 - length
    for start, stop, name in spans:
        if stop > held:
            raise ValueError(
                f"{path} is cut or lies: {name} claims data up to {format_bytes(stop)}, there are "
                f"{format_bytes(held)}"
            )
        if start != end or stop - start != claims[name].bytes:
            raise ValueError(
                f"{path}: the header lies about {name}: shape {claims[name].shape} needs "
                f"{format_bytes(claims[name].bytes)}, the header gives it bytes {start} to {stop} "
                f"after {end}"
            )
        end = stop
    if end != held:
        raise ValueError(
            f"{path} lies: the header claims {format_bytes(end)} of data, the file holds "
            f"{format_bytes(held)}"
        )
    return claims, metadata


@contextmanager
def at_most_parameters(count: int) -> Iterator[None]:
    """Raise ValueError as soon as the modules built in this block have far more parameters."""
    thread, built = threading.get_ident(), 0

    def count_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal built
        if threading.get_ident() == thread and parameter is not None:
            built += 1
            # A constructor may register one twice.
            if built > 2 * count + 100:
                raise ValueError(f"it needs far more than the {count} tensors of the weights")

    hook = register_module_parameter_registration_hook(count_parameter)
    try:
        yield
    finally:
        hook.remove()


def open_torch_file(path: Path, choose: Callable[[Any], Mapping[str, Tensor]]) -> TensorSource:
    """Open a file of torch.save without running code from it.

    The first reading is on the meta device and allocates nothing.

    Args:
        choose: returns the state dict among the file's contents.
    """
    open_regular(path).close()
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            scan_torch_file(file)
    except (ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is damaged, cut or not a file of weights: {error}") from None
    contents = _torch_load(path, "meta")
    metadata = getattr(contents, "_metadata", None)
    texts = metadata if isinstance(metadata, dict) else {}
    texts = {k: v for k, v in texts.items() if isinstance(k, str) and isinstance(v, str)}
    state = choose(contents)
    claims = state_dict_specs(str(path), state, limit=size)
    loaded: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if not loaded:
            loaded.update(choose(_torch_load(path, "cpu")))
        return loaded[name]

    return TensorSource(str(path), claims, read, texts)


def scan_torch_file(file: io.BytesIO | io.BufferedReader) -> None:
    """Raise ValueError for sizes and pickles that would keep torch.load busy; run nothing.

    The stream is left at its start.
    """
    size = file.seek(0, io.SEEK_END)
    if _is_zip(file):
        _scan_torch_zip(file, size)
    else:
        # The older format: pickles of a magic number, a version, the machine, the contents and the
        # keys, then the data.
        file.seek(0)
        for _ in range(5):
            scan_pickle(file)
            if file.tell() == size:
                break
    file.seek(0)


def _is_zip(file: io.BytesIO | io.BufferedReader) -> bool:
    """Return whether torch.load takes the stream for a zip."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def _scan_torch_zip(file: io.BytesIO | io.BufferedReader, size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > size:
            raise ValueError(
                f"it unpacks from {format_bytes(size)} to {format_bytes(unpacked)}; refused"
            )
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two of its members have the same name")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                scan_pickle(io.BytesIO(archive.read(entry)))


def _torch_load(path: Path, device: str) -> Any:
    with path.open("rb") as file:
        mmap = device == "cpu" and _is_zip(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols: the error is enough
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load raises many types: all mean that the file is unusable
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(path):
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"{path} contains code ({found[1] if found else 'or unknown objects'}) and was "
                "refused: mezzotint reads only weights and runs no code from a file. Its author "
                "can save the state dict alone, preferably as .safetensors"
            ) from None
        first = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises to run its code
            first = "it does not begin as torch.save's do"
        raise ValueError(f"{path} is damaged, cut or not a file of weights: {first}") from error


def _is_pickle(path: Path) -> bool:
    """Return whether a file begins like torch.save's: a zip, or a pickle of protocol 2 or later."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def state_dict_specs(
    what: str, state: Mapping[str, Tensor], limit: int | None = None
) -> dict[str, TensorSpec]:
    """Return the specs of a state dict, after checking that there are enough bytes for its tensors.

    Args:
        limit: bytes of the file that they come from; None if their storages are real.
    """
    odd = [k for k, t in state.items() if t.layout != torch.strided or t.is_quantized]
    if odd:
        raise ValueError(f"{what}: {list_names(odd)} are sparse or quantised; dense ones are read")
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in state.values()}
    held, claimed = sum(storages.values()), sum(t.numel() * t.itemsize for t in state.values())
    held = held if limit is None else min(held, limit)
    if claimed > held:
        raise ValueError(
            f"{what}: its tensors claim {format_bytes(claimed)}, there are {format_bytes(held)}"
        )
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in state.items()}


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors atomically: as `torch.save` does for .pth, else as safetensors.

    Errors: OSError where the disk is full or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(partial: Path) -> None:
        try:
            if path.suffix == ".pth":
                contents = OrderedDict(tensors)
                if metadata:  # where torch's own state dicts have theirs
                    vars(contents)["_metadata"] = OrderedDict(metadata)
                torch.save(contents, partial)
            else:
                save_file(dict(tensors), partial, metadata=metadata)
        except (SafetensorError, RuntimeError) as error:  # their words for what a disk refuses
            found = re.search(r"No space left on device|File too large|[^:]*quota[^:]*", str(error))
            reason = found[0] if found else str(error).splitlines()[0]
            raise OSError(
                f"{path} cannot be written: {reason}; free some space or choose another place"
            ) from error

    atomic_replace(path, write)


def list_names(names: Mapping[str, Any] | set[str] | list[str], most: int = 12) -> str:
    """Return names as a list for an error message, at most `most` of them."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return "[" + ", ".join(map(escape_name, ordered[:most])) + "]" + more


def sha256_of_module(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers: names, dtypes, shapes, bytes."""
    h = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        h.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
