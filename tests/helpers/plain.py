"""The plain networks of benchmarks/plain, which the tests compare the library's networks with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "plain"


def plain_module(name: str) -> ModuleType:
    """Import benchmarks/plain/NAME.py; skip the test where the checkout has no benchmarks."""
    path = FOLDER / f"{name}.py"
    if not path.exists():
        pytest.skip(f"{path} is absent: benchmarks are not part of the source distribution")
    spec = importlib.util.spec_from_file_location(f"plain_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
