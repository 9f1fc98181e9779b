"""Settings of a sampling job: what they refuse, in words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mezzotint.core.registry import Spec
from mezzotint.sampling.settings import Guidance, SamplingSettings


def test_counts_are_whole_numbers():
    """In its own process: here the type annotations would raise first."""
    code = """
import numpy as np
from mezzotint.sampling.settings import SamplingSettings

for name in ("steps", "batch"):
    for value in (1.5, 2.0, "2", np.float32(3), None):
        try:
            SamplingSettings(**{name: value})
        except ValueError as error:
            assert str(error).startswith(f"{name} is "), error
            assert "number is needed" in str(error), error
        else:
            raise AssertionError((name, value))
    assert getattr(SamplingSettings(**{name: np.int64(3)}), name) == 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 2.0, "convention": "ditt"}, "ditt"),
        ({"scale": 1.5, "low": 1.0}, "low and high"),
        ({"scale": 1.5, "time": "t", "power": 2.0}, "'t'"),
        ({"scale": 1.5, "time": "u"}, "power=4"),
    ],
)  # fmt: skip
def test_bad_guidance(fields, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("batch", 0, "batch 0"), ("dtype", "float31", "float32"), ("clip", Spec("statik"), "static")],
)
def test_bad_settings(field, value, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**{field: value})
