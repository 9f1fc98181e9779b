"""Every tiny preset samples and learns what it did when tests/golden/hashes.json was recorded.

Under the recorded torch version and processor maker the bytes must agree, on the instruction set
that `hashes.ISA` fixes. Elsewhere rounding may differ: mean magnitudes must agree to 1e-4.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden" / "hashes.json").read_text())


@pytest.fixture(scope="module")
def found() -> dict:
    done = subprocess.run(
        [sys.executable, str(HERE / "helpers" / "hashes.py")],
        capture_output=True,
        text=True,
        env={**os.environ},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])["presets"]


def same_rounding() -> bool:
    with open("/proc/cpuinfo") as file:
        amd = "AuthenticAMD" in file.read()
    return amd and torch.__version__.partition("+")[0] == GOLDEN["torch"]


@pytest.mark.parametrize("what", ["samples", "model", "model-raw"])
@pytest.mark.parametrize("preset", sorted(GOLDEN["presets"]))
def test_results_are_those_recorded(found, preset, what):
    ours, recorded = found[preset][what], GOLDEN["presets"][preset][what]
    assert ours["mean_abs"] == pytest.approx(recorded["mean_abs"], rel=1e-4)
    if same_rounding():
        assert ours["sha256"] == recorded["sha256"]


def test_no_family_is_left_out(found):
    assert found.keys() == GOLDEN["presets"].keys()
