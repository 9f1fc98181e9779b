"""JSON that others may have written: a value of the right type, or one ValueError."""

from __future__ import annotations

import json
import types
import typing
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mezzotint.core.fields import shorten
from mezzotint.core.text import escape_name

JSON_LIMIT = 64 << 20  # bytes of one text; an index of a million images has 40 MB
JSON_DEPTH = 50


def parse_json(text: bytes | str) -> Any:
    """Return the value of a JSON text that others may have written.

    Errors: ValueError for anything that is not JSON, for more than JSON_LIMIT bytes, for values
        nested deeper than JSON_DEPTH, and for an object that has a key twice.
    """
    if len(text) > JSON_LIMIT:
        raise ValueError(f"it has {len(text):,} bytes; at most {JSON_LIMIT:,} are read")
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)  # bytes: with surrogatepass
    except RecursionError:
        raise ValueError(f"its values are nested deeper than {JSON_DEPTH}") from None
    # Later code may walk a value by recursion, so the depth that Python can parse is too much.
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    for _ in range(JSON_DEPTH):
        inside = (v.values() if isinstance(v, dict) else v for v in level)
        level = [child for v in inside for child in v if isinstance(child, (dict, list))]
    if level:
        raise ValueError(f"its values are nested deeper than {JSON_DEPTH}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    """Raise ValueError unless each named field is there and of its type.

    Args:
        values: of JSON.
        kinds: by name of the field, e.g. int, float, str | None, list[int], dict[str, str].
    """
    for name, kind in kinds.items():
        if name not in values:
            raise ValueError(f"it has no {name!r}")
        if not _is_kind(values[name], kind):
            wanted = getattr(kind, "__name__", kind) if typing.get_origin(kind) is None else kind
            raise ValueError(f"its {name!r} is {shorten(values[name])}; {wanted} is needed")


def _is_kind(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_kind(value, k) for k in args)
    if origin is list:
        return isinstance(value, list) and all(_is_kind(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_kind(v, args[1]) for v in value.values())
    if kind is float:  # JSON writes 1.0 as 1
        kind = (int, float)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return escape_name((str(error).strip() or type(error).__name__).splitlines()[0])[:200]
