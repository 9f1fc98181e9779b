"""Model folders as a stranger may make them: every value of a card and header replaced in turn."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEEP = 1_000_000
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "list": [],
    "object": {},
    "text": "x",
    "no text": "",
    "surrogate": "\ud800",
    "-1": -1,
    "0": 0,
    "half": 0.5,
    "7": 7,
    "million": 10**6,
    "2**53": 2**53,
    "400 digits": 10**400,
    "1e308": 1e308,
    "nan": float("nan"),
    "inf": float("inf"),
    "zeros": [0, 0, 0],
    "millions": [10**6, 10**6, 10**6],
    "levels": [1] * 100_000,
    "mixed": [None, "x", {}],
    "nested": [[[[["x"]]]]],
    "key": {"x": 1},
}
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "no utf-8": b"\xff\xfe\xfa{",
    "null": b"null",
    "number": b"7",
    "list": b"[]",
    "cut": b'{"mezzotint": 1, "back',
    "deep lists": b"[" * DEEP,
    "deep and closed": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * DEEP,
    "100 deep": b'{"mezzotint": 1, "extra": ' + b"[" * 100 + b"]" * 100 + b"}",
    "twice": b'{"mezzotint": 1, "mezzotint": 1}',
    "5000 digits": b'{"mezzotint": ' + b"9" * 5000 + b"}",
    "escapes": b'{"\\u001b[31m\\n": 1, "mezzotint": 1}',
    "zeros": bytes(1000),
    "70 MB": b" " * (70 << 20),
}


def paths(value: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the place of every value in nested objects."""
    if prefix:
        yield prefix
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*prefix, key))


def replaced(value: Any, path: tuple[str, ...], new: Any) -> Any:
    """Return a copy with the value at `path` replaced."""
    value = copy.deepcopy(value)
    node = value
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = new
    return value


def without(value: Any, path: tuple[str, ...]) -> Any:
    """Return a copy without the key at `path`."""
    value = replaced(value, path, None)
    node = value
    for key in path[:-1]:
        node = node[key]
    del node[path[-1]]
    return value


def cards(card: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield hostile texts of config.json, each with its name."""
    card = {k: v for k, v in card.items() if k != "sha256"}
    for path in paths(card):
        place = ".".join(path)
        for name, new in VALUES.items():
            yield f"{place} = {name}", json.dumps(replaced(card, path, new)).encode()
        yield f"{place} missing", json.dumps(without(card, path)).encode()
    for key in ("__class__", "module", ""):
        yield f"key {key!r}", json.dumps({**card, key: 1}).encode()
    for name, new in VALUES.items():
        yield f"sha256 = {name}", json.dumps({**card, "sha256": new}).encode()
        yield (
            f"schedule.options.x = {name}",
            json.dumps(replaced(card, ("schedule", "options"), {"x": new})).encode(),
        )
    yield from TEXTS.items()


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file."""
    return struct.pack("<Q", len(header)) + header + data


def headers(weights: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield hostile safetensors files, each with its name."""
    header, data = split(weights)
    tensor = next(k for k in header if k != "__metadata__")
    for path in [p for p in paths(header) if p[0] in ("__metadata__", tensor)]:
        for name, new in VALUES.items():
            yield (
                f"{'.'.join(path[-2:])} = {name}",
                join(json.dumps(replaced(header, path, new)).encode(), data),
            )
        yield f"{path[-1]} missing", join(json.dumps(without(header, path)).encode(), data)
    for name, text in TEXTS.items():
        yield f"header {name}", join(text, data)
    for name, length in (("0", 0), ("all", len(weights)), ("2**63", 2**63), ("2**64-1", 2**64 - 1)):
        yield f"length {name}", struct.pack("<Q", length) + weights[8:]
    for size in (0, 1, 7, 8, 9, len(weights) // 2, len(weights) - 1):
        yield f"cut to {size}", weights[:size]
    yield "longer", weights + b"\0"
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    yield "100,000 tensors", join(json.dumps(many).encode(), b"")


def write(folder: Path, card: bytes, weights: bytes) -> None:
    """Write a model's folder."""
    (folder / "config.json").write_bytes(card)
    (folder / "model.safetensors").write_bytes(weights)
