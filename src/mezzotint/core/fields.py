"""Values of settings: parsed by the type of their field, and checked against its range.

A number's range is part of its type: `lr: Annotated[float, Range(0, 100, "...")]`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

T = TypeVar("T")

MOST_IMAGES = 10**15  # more than any training has seen; exact as a float64
MOST_SEED = 2**62  # the seeds of a run, seed + i, stay below 2^63


def suggest(name: object, known: Iterable[str]) -> str:
    """Return "did you mean ...?" with the names nearest to an unknown one, else all known names."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=4, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known) or 'none'}"


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes: finite, from `low` to `high`.

    why: what lies beyond, or what to give instead; part of the error.
    above, below: leave out the end itself.
    """

    low: float
    high: float
    why: str = ""
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        # nan fails both comparisons, and an integer may be too large for a float.
        reached = value > self.low if self.above else value >= self.low
        return reached and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low, high = (
            f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high)
        )
        words = "above" if self.above else "at least", "below" if self.below else "at most"
        why = f" ({self.why})" if self.why else ""
        return f"{words[0]} {low} and {words[1]} {high}{why}"


def shorten(value: object, length: int = 60) -> str:
    """Return the value as Python writes it, cut to `length` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= length else f"{text[:length]}..."


def check_ranges(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError for a number outside the `Range` of its type, in tuples and unions too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, (type(None), str)) and _takes(hint, type(value)):
        return
    if origin is Annotated:
        for part in arguments[1:]:
            if isinstance(part, Range):
                _check_range(name, value, part)
        check_ranges(name, value, arguments[0])
    elif _is_union(hint):
        for kind in arguments:
            check_ranges(name, value, kind)
    elif isinstance(value, (tuple, list)):
        inner = [arguments[0]] * len(value) if Ellipsis in arguments else arguments
        for i, (part, kind) in enumerate(zip(value, inner, strict=False)):
            check_ranges(f"{name}[{i}]", part, kind)


def _takes(hint: Any, kind: type) -> bool:
    """Return whether a field of type `hint` takes values of `kind`: NoneType or str."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _takes(arguments[0], kind)
    if origin is Literal:
        return any(isinstance(value, kind) for value in arguments)
    return hint is kind or (_is_union(hint) and any(_takes(part, kind) for part in arguments))


def _check_range(name: str, value: Any, allowed: Range) -> None:
    if isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            _check_range(f"{name}[{i}]", part, allowed)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} is {shorten(value)}; a number is needed")
    elif float_of(value) not in allowed:
        raise ValueError(f"{name} {shorten(value)} must be {allowed}")


def float_of(value: Any) -> Any:
    """Return an integer as it is, which compares exactly, and other numbers as a float."""
    return value if isinstance(value, int) else float(value)


@functools.lru_cache(maxsize=256)
def type_hints(owner: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a dataclass's fields or a function's arguments, with their ranges."""
    return typing.get_type_hints(owner, include_extras=True)


class Checked:
    """Base of dataclasses whose fields have ranges. `prefix` stands before names in errors."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = type_hints(type(self))
        for field in dataclasses.fields(typing.cast(Any, self)):
            check_ranges(self.prefix + field.name, getattr(self, field.name), hints[field.name])


def parse_options(
    prefix: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return keyword options of `function` in the types of its arguments.

    Args:
        prefix: before the option's name in errors, e.g. "schedule.options.".

    Errors: ValueError for a value of another type or outside its range.
    """
    hints = type_hints(function)
    parameters = inspect.signature(function).parameters
    return {
        name: parse(hints.get(name, Any), value, prefix + name) if name in parameters else value
        for name, value in options.items()
    }


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (Union, types.UnionType)


def parse(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`: a dataclass, union, literal, tuple, dict or scalar.

    Args:
        path: of the field, for the ValueError of a value that does not fit.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        parsed = parse(args[0], value, path)
        check_ranges(path, parsed, kind)
        return parsed
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(typing.cast(type, kind), value, path)
    if _is_union(kind):
        return _parse_union(args, value, path)
    if origin is Literal:
        if not any(value == a and type(value) is type(a) for a in args):
            raise ValueError(f"{path} is {shorten(value)}; allowed: {', '.join(map(str, args))}")
        return value
    if origin in (tuple, collections.abc.Sequence):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path} is {shorten(value)}; a list is needed")
        endless = origin is not tuple or args[-1] is Ellipsis
        inner = [args[0]] * len(value) if endless else list(args)
        if len(inner) != len(value):
            raise ValueError(f"{path} has {len(value)} values; {len(inner)} are needed")
        return tuple(
            parse(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(inner, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{path} is {shorten(value)}; a mapping of names to values is needed")
        return value
    if kind is Any or (isinstance(kind, type) and kind not in WANTED and isinstance(value, kind)):
        return value
    return _parse_scalar(kind, value, path)


def _parse_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    """Return None where it is allowed, else the value as the first kind that takes it."""
    if value is None and type(None) in kinds:
        return None
    error = ValueError(f"{path} is None; a value is needed")
    for kind in kinds:
        if kind is not type(None):
            try:
                return parse(kind, value, path)
            except ValueError as reason:
                error = reason
    raise error


WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _parse_scalar(kind: type, value: Any, path: str) -> Any:
    """Return a bool, int, float or str. YAML reads 1e6 as text, so both count as integers."""
    wanted = WANTED.get(kind, f"a {getattr(kind, '__name__', kind)}")
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise ValueError(f"{path} is {shorten(value)}; {wanted} is needed")
    try:
        if kind is int and isinstance(value, int):
            return value
        number = float(value) if kind in (int, float) else value
        if kind is int and number == int(number):
            return int(number)
        if kind is float or (kind is str and isinstance(value, str)):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{path} is {shorten(value)}; {wanted} is needed")


def _parse_dataclass(kind: type[T], value: Any, path: str) -> T:
    if not isinstance(value, dict):
        raise ValueError(f"{path or 'the recipe'} is {shorten(value)}; a mapping is needed")
    hints = type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, kind))}
    for key in value:
        if key not in known:
            raise ValueError(
                f"unknown key {f'{path}.{key}'.lstrip('.')!r}; {suggest(str(key), known)}"
            )
    for key, field in known.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and key not in value:
            raise ValueError(f"key {f'{path}.{key}'.lstrip('.')!r} is missing")
    return kind(**{k: parse(hints[k], v, f"{path}.{k}".lstrip(".")) for k, v in value.items()})
