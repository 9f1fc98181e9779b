"""Rows of a webdataset tar, whose samples may differ in fields and in the types of their JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from datasets.utils.file_utils import ArchiveIterable

from mezzotint.data.side_tables import decode_text

BLOCK_BYTES = 512  # of a tar


class _Reader(WebDataset):
    """Decodes text and JSON; other fields stay bytes, so a pickle is never read."""

    DECODERS: ClassVar[dict[str, Callable[[bytes], Any]]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        **dict.fromkeys(("txt", "text", "transcript", "cls", "cls2", "index", "id"), decode_text),
        **dict.fromkeys(("json", "jsn"), json.loads),
    }  # fmt: skip


def read_tar_rows(path: Path, batch_rows: int) -> tuple[pa.Schema, Iterator[pa.Table]]:
    """Return the schema and the rows of a webdataset tar; samples without an image are left out.

    A field that a sample lacks is null. A field of several types is text.

    Errors: ValueError for a cut tar; `tarfile.ReadError`.
    """
    with path.open("rb") as file:
        if file.read(BLOCK_BYTES)[257:262] == b"ustar" and path.stat().st_size % BLOCK_BYTES:
            raise ValueError("it is cut: a tar has whole blocks of 512 bytes")
    types: dict[str, pa.DataType] = {}
    for sample in _samples(path):
        for name, value in sample.items():
            types[name] = _merge(types.get(name, pa.null()), _type_of(value))
    images = [name for name in types if _extension(name) in WebDataset.IMAGE_EXTENSIONS]
    features = datasets.Features.from_arrow_schema(pa.schema(list(types.items())))
    features |= {name: datasets.Image() for name in images}
    schema = datasets.Features(features).arrow_schema

    def rows() -> Iterator[dict[str, Any]]:
        for sample in _samples(path):
            if not images or any(sample.get(name) for name in images):
                row = {name: _fit(sample.get(name), types[name]) for name in types}
                cells = {name: row[name] and {"bytes": row[name], "path": None} for name in images}
                yield row | cells

    def tables() -> Iterator[pa.Table]:
        left = rows()
        while part := list(islice(left, batch_rows)):
            yield pa.Table.from_pylist(part, schema)

    return schema, tables()


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    members = ArchiveIterable.from_urlpath(str(path))
    for sample in _Reader._get_pipeline_from_tar(str(path), members):
        del sample["__url__"]  # the name of a temporary file
        yield sample


def _extension(field: str) -> str:
    return field.rpartition(".")[2].lower()


def _type_of(value: Any) -> pa.DataType:
    """Return the Arrow type of a field's value, as JSON has them, or bytes."""
    if isinstance(value, dict):
        return pa.struct([(str(name), _type_of(inner)) for name, inner in value.items()])
    if isinstance(value, list):
        return pa.list_(reduce(_merge, map(_type_of, value), pa.null()))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
        return pa.float64()
    kinds = {type(None): pa.null(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return {**kinds, bytes: pa.large_binary()}.get(type(value), pa.string())


def _merge(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """Return a type for the values of both; text where there is no other."""
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if pa.types.is_struct(a) and pa.types.is_struct(b):
        fields = {field.name: field.type for field in a}
        for field in b:
            fields[field.name] = _merge(fields.get(field.name, pa.null()), field.type)
        return pa.struct(list(fields.items()))
    if pa.types.is_list(a) and pa.types.is_list(b):
        return pa.list_(_merge(a.value_type, b.value_type))
    if {a, b} == {pa.int64(), pa.float64()}:
        return pa.float64()
    return pa.string()


def _fit(value: Any, kind: pa.DataType) -> Any:
    """Return a value as one of a type that `_merge` has chosen for it."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {field.name: _fit(value.get(field.name), field.type) for field in kind}
    if pa.types.is_list(kind):
        return [_fit(inner, kind.value_type) for inner in value]
    if pa.types.is_floating(kind):
        return float(value)
    if pa.types.is_string(kind):
        text = value if isinstance(value, str) else json.dumps(value)
        return text.encode(errors="replace").decode()
    return value
