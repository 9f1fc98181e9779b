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


def compute_results() -> dict:
    """Return what every preset does here, from a process of the recorded instruction set."""
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


def test_results_are_those_recorded():
    """One test for all, since the processes of a parallel run would each compute them."""
    found, recorded = compute_results(), GOLDEN["presets"]
    assert found.keys() == recorded.keys()  # no family is left out
    for preset, results in recorded.items():
        for what in ("samples", "model", "model-raw"):
            ours, theirs = found[preset][what], results[what]
            expected = pytest.approx(theirs["mean_abs"], rel=1e-4)
            assert ours["mean_abs"] == expected, f"{what} of {preset}"
            if same_rounding():
                assert ours["sha256"] == theirs["sha256"], f"{what} of {preset}"
