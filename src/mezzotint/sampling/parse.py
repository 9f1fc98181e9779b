"""Sampling settings as text: parsed from the command line, written to cards."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from mezzotint.core.fields import check_ranges, shorten, type_hints
from mezzotint.core.registry import Spec, check_options, suggest
from mezzotint.process import samplers
from mezzotint.process.samplers import grids
from mezzotint.sampling.settings import CLIPS, Guidance


def parse_sampler(text: str) -> Spec:
    """Parse a sampler with options, e.g. "heun" or "heun:s_churn=40,s_noise=1.007"."""
    return _parse_spec("sampler", text, samplers.registry)


def parse_discretization(text: str) -> Spec:
    """Parse a discretization with options, e.g. "karras:rho=5"."""
    return _parse_spec("discretization", text, grids.registry)


def parse_clip(text: str) -> Spec | None:
    """Parse "none", "static" or "dynamic", with options: "dynamic:quantile=0.99"."""
    return None if text == "none" else _parse_spec("clipping", text, CLIPS)


def parse_guidance(text: str) -> Guidance:
    """Parse fields of `Guidance`: "1.5", "4.4,power=4" or "scale=0.4,convention=dimr"."""
    named = "=" in text.partition(",")[0]
    options = _parse_options("guidance", Guidance, text if named else f"scale={text}")
    if "scale" not in options:
        raise ValueError(f"guidance {text!r} has no scale; write scale=1.5,... or 1.5,...")
    return Guidance(**options)


def parse_size(text: str) -> tuple[int, int]:
    """Parse "64" or "48x64", height first, to (height, width)."""
    sides = text.lower().split("x")
    # Six digits at most; a size that is too large gets its own error later, with the limit.
    numbers = [re.fullmatch(r"0*[1-9]\d{0,5}", side.strip(), re.ASCII) for side in sides]
    if len(sides) > 2 or not all(numbers):
        raise ValueError(
            f"size {shorten(text)} is neither a number nor HEIGHTxWIDTH, e.g. 64 or 48x64"
        )
    return int(sides[0]), int(sides[-1])


def _parse_spec(what: str, text: str, known: Mapping[str, Callable[..., Any]]) -> Spec:
    name, _, options = text.partition(":")
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; {suggest(name, known)}")
    return Spec(name, _parse_options(f"{what} {name}", known[name], options))


def _parse_options(what: str, taker: Callable[..., Any], text: str) -> dict[str, Any]:
    """Parse "a=1,b=x" to keyword options of `taker`, each of its annotated type."""
    pairs = [assignment.partition("=") for assignment in text.split(",") if assignment]
    for key, equals, _ in pairs:
        if not equals:
            raise ValueError(f"{key!r} in the options of {what} is not of the form name=value")
    given = check_options(what, taker, {key.strip(): value.strip() for key, _, value in pairs})
    hints = typing.get_type_hints(taker)
    for key in given:
        kinds = typing.get_args(hints[key]) or (hints[key],)
        if not any(kind in kinds for kind in (int, float, str, bool)):
            raise ValueError(f"{key} of {what} cannot be written as text; set it in Python")
    values = {
        key: _parse_value(f"{key} of {what}", value, hints[key]) for key, value in given.items()
    }
    for key, value in values.items():
        check_ranges(f"{key} of {what}", value, type_hints(taker)[key])
    return values


def _parse_value(what: str, text: str, hint: Any) -> Any:
    """Parse a value of the annotated type, e.g. `int | None`; the first type that fits is taken."""
    kinds = typing.get_args(hint) or (hint,)
    booleans = {"true": True, "false": False}
    if bool in kinds and text.lower() in booleans:
        return booleans[text.lower()]
    for kind in (int, float, str):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    wanted = (
        "true or false" if bool in kinds else "a whole number" if float not in kinds else "a number"
    )
    raise ValueError(f"{what} is {text!r}; {wanted} is needed")


def to_plain(value: Any) -> Any:
    """Return settings as JSON values: specs and dataclasses as mappings without their Nones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {k: to_plain(v) for k, v in fields.items() if v is not None}
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value
