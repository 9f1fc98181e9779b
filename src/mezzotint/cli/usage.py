"""What is wrong with a command line: values out of range, fields of a recipe written as options."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mezzotint.core.console import echo
from mezzotint.core.fields import check_ranges, type_hints


def fail(program: str, sentence: str) -> NoReturn:
    """Print a usage error on stderr and exit with 2."""
    echo(f"{program}: {sentence}; see {program} --help", stderr=True)
    sys.exit(2)


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with its options' ranges checked first; ValueError names the option."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        given = inspect.signature(command).bind(*args, **options)
        _check(given.arguments, command)
        command(*args, **options)

    return run


def _check(values: dict[str, Any], owner: Callable[..., Any]) -> None:
    for name, value in values.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            _check(fields, type(value))
        else:
            _check_local(name, value)
            check_ranges(f"--{name.replace('_', '-')}", value, type_hints(owner)[name])


def _check_local(name: str, value: Any) -> None:
    """Raise ValueError for an address in place of a path; a `Path` holds it with one slash."""
    if isinstance(value, Path) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
        raise ValueError(
            f"{name.upper()} {str(value).replace(':/', '://', 1)} is an address; give a path on a "
            "disk. Addresses may be --data of train, save.store, and OUT of prepare --shards"
        )


def explain_number(arguments: Sequence[str], command: Callable[..., Any]) -> str | None:
    """Return a sentence for the first option of a number that is given something else."""
    numbers = {f"--{name.replace('_', '-')}": kind for name, kind in _list_numbers(command)}
    pairs = [argument.partition("=") for argument in arguments]
    for i, (name, equals, value) in enumerate(pairs):
        kind = numbers.get(name)
        if kind is None or not (equals or i + 1 < len(arguments)):
            continue
        text = value if equals else arguments[i + 1]
        if text == "None":  # what the parser takes for an option left out
            continue
        try:
            kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            return f"{name} is {text!r}; {wanted} is needed"
    return None


def _list_numbers(owner: Callable[..., Any]) -> Iterator[tuple[str, type[int] | type[float]]]:
    """Yield the options of a command that take one number, with its type; those of parts too."""
    for name, hint in type_hints(owner).items():
        kinds = [kind for kind in _list_kinds(hint) if kind is not type(None)]
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                yield from _list_numbers(typing.cast(Any, kind))
        if kinds in ([int], [float]):
            yield name, kinds[0]


def _list_kinds(hint: Any) -> list[Any]:
    """Return the types that a value may have, without what annotates them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _list_kinds(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [kind for part in arguments for kind in _list_kinds(part)]
    return [hint]


def gather_fields(arguments: Sequence[str], options: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the arguments with fields that follow an option moved before all options.

    The parser takes positional arguments in one row only.

    Args:
        options: the command's parameters; those annotated `Switch` take no value.
    """
    fields, rest, takes_value = [], [], False
    for argument in arguments:
        if takes_value or argument.startswith("-"):
            rest.append(argument)
            name = argument.lstrip("-").replace("-", "_")
            known = "Switch" in str(options[name].annotation) if name in options else False
            switch = known or name == "list"  # the name of `download`'s switch
            takes_value = not takes_value and "=" not in argument and not switch
        else:
            fields.append(argument)
    return [*fields, *rest]


def explain_field(arguments: Sequence[str], options: Collection[str], of_model: bool) -> str | None:
    """Return a sentence for the first argument that writes a field as an option; None for none.

    Args:
        options: names of the command's own, e.g. "dry_run".
        of_model: the command takes fields of the network, as `bench` does, not of a recipe.
    """
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        field = name.lstrip("-").replace("-", "_")
        if not name.startswith("--") or field in options:
            continue
        fields = find_fields(field, of_model)
        if not fields:
            known = [f"--{option.replace('_', '-')}" for option in options]
            is_known = name in ("--help", "--list") or field.startswith("no_")
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.75)
            if near and not is_known:
                return f"unknown option {name} (did you mean {' or '.join(near)}?)"
            continue
        if not equals:
            value = next((a for a in arguments[i + 1 : i + 2] if not a.startswith("--")), "VALUE")
        choice = " or ".join(f"{path}={value}" for path in fields)
        return f"fields are given without dashes: {choice}"
    return None


def find_fields(name: str, of_model: bool = False) -> list[str]:
    """Return the fields that `name` can mean: itself, or those that end in it."""
    if of_model:
        from mezzotint import backbones

        leaf = name.removeprefix("model.")
        configs = [backbones.registry[family].config for family in backbones.registry]
        return [leaf] if any(leaf in type_hints(config) for config in configs) else []
    from mezzotint.config import Recipe

    paths = [path for path in _paths(Recipe, "") if path != "hours"]  # an option of train alone
    outer, _, inner = name.partition(".")
    open_ended = inner and (outer == "model" or inner.startswith("options."))
    if name in paths or (open_ended and outer in ("model", "schedule", "objective")):
        return [name]
    return [path for path in paths if path.endswith(f".{name}")]


def _paths(kind: Any, prefix: str) -> list[str]:
    """Return the dotted path of every field of a dataclass, with those of its parts."""
    paths = []
    for field in dataclasses.fields(kind):
        hint = type_hints(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            paths += _paths(hint, f"{prefix}{field.name}.")
        else:
            paths.append(prefix + field.name)
    return paths
