"""Registries of builders by name; adding a file to a package adds an entry."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from mezzotint.core.fields import parse_options, suggest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping that imports every module of `package` at its first use.

    Args:
        what: the singular noun used in errors, e.g. "sampler".
        package: dotted name of the package whose modules register themselves when imported.
    """

    def __init__(self, what: str, package: str):
        self.what = what
        self.package = package
        self._entries: dict[str, T] = {}
        self._scanned = False
        self._scanning = False
        self._failed = False
        self._lock = threading.RLock()

    def add(self, name: str, entry: T) -> T:
        """Register `entry`; ValueError if the name is taken."""
        # After a scan that failed, its last module may register again.
        if name in self._entries and not self._failed:
            raise ValueError(f"{self.what} {name!r} is registered twice")
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a function under `name`."""
        return lambda entry: self.add(name, entry)

    def _scan(self) -> None:
        if self._scanned:
            return
        # Another thread waits for the whole scan; a module that is being imported looks up at once.
        with self._lock:
            if self._scanned or self._scanning:
                return
            self._scanning = True
            try:
                package = importlib.import_module(self.package)
                # An import error must reach the user: a variant must not be missing silently.
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self.package}.{module.name}")
                self._scanned, self._failed = True, False
            except BaseException:
                self._failed = True
                raise
            finally:
                self._scanning = False

    def __getitem__(self, name: str) -> T:
        self._scan()
        if not isinstance(name, str):
            raise ValueError(f"{self.what} {name!r} is not a name; known: {', '.join(self)}")
        if name not in self._entries:
            raise ValueError(f"unknown {self.what} {name!r}; {suggest(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._scan()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._scan()
        return len(self._entries)


@dataclass(frozen=True)
class Spec:
    """A registered function by name, with keyword options, as in recipes and configs."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.options.items())})"


def check_options(
    what: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `options`; ValueError for one that `function` does not take by keyword."""
    allowed = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    for name in options:
        if name not in allowed:
            raise ValueError(f"{what} takes no option {name!r}; {suggest(name, allowed)}")
    return dict(options)


def build(registry: Registry[Callable[..., T]], spec: Spec) -> T:
    """Call the builder named by `spec` with its options, after checking the options' names.

    Errors: ValueError for an unknown name or option, and a value of another type or out of range.
    """
    builder = registry[spec.name]
    options = check_options(f"{registry.what} {spec.name}", builder, spec.options)
    return builder(**parse_options(f"{registry.what}.options.", builder, options))
