"""Sampling on two processes: the bytes of one process, uneven shares, a failure that ends both."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mezzotint as mz
from helpers.launch import torchrun
from helpers.tiny_models import tiny

N = 13  # in batches of 4: four batches, the last of one image
WORDS = [
    "-n",
    str(N),
    "--steps",
    "2",
    "--sampler",
    "ancestral",
    "--guidance",
    "1.5",
    "--label-order",
    "random",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    mz.save_model(tiny(), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Samples of one process, in batches of 7."""
    out = tmp_path_factory.mktemp("alone") / "a.npz"
    done = torchrun(1, "sample", str(model), *WORDS, "--batch", "7", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def same(a: Path, b: Path) -> bool:
    cards = (f.with_name(f"{f.name}.json").read_bytes() for f in (a, b))
    return a.read_bytes() == b.read_bytes() and len(set(cards)) == 1


def test_two_processes_write_the_bytes_of_one(model, alone, tmp_path):
    done = torchrun(
        2, "sample", str(model), *WORDS, "--batch", "4", "--out", str(tmp_path / "a.npz")
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(tmp_path / "a.npz", alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]


FAILING = """
import sys, time
from mezzotint import cli
from mezzotint.sampling.job import SamplingJob
real = SamplingJob.draw
def draw(self, seeds):
    if {fails!r} in seeds:
        raise ValueError("image {fails} failed")
    time.sleep({pause})
    return real(self, seeds)
SamplingJob.draw = draw
sys.argv = ["mezzotint", *sys.argv[1:]]
cli.main()
"""


def start(
    tmp_path: Path, words: list[str], fails: int = -1, pause: float = 0.0
) -> subprocess.Popen[str]:
    """Start a command on two processes; sampling the image of seed `fails` raises."""
    script = tmp_path / "run.py"
    script.write_text(FAILING.format(fails=fails, pause=pause))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launch, *words], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_a_failure_ends_both_and_keeps_finished_images(model, alone, tmp_path):
    out = tmp_path / "o" / "a.npz"
    words = ["sample", str(model), *WORDS, "--batch", "4", "--out", str(out)]
    process = start(tmp_path, words, fails=12)  # in the last batch, which is the second process's
    _, printed = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "mezzotint: image 12 failed" in printed
    assert "mezzotint: rank 1 failed: ValueError: image 12 failed" in printed
    kept = out.with_name(".a.npz.parts")
    assert not out.exists()
    assert len([p for p in kept.iterdir() if p.name[0].isdigit()]) == 3
    done = torchrun(1, "sample", str(model), *WORDS, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(out, alone)
    shutil.rmtree(tmp_path / "o")


@pytest.mark.slow
def test_both_killed_and_finished_by_one(model, alone, tmp_path):
    out = tmp_path / "o" / "a.npz"
    process = start(
        tmp_path, ["sample", str(model), *WORDS, "--batch", "2", "--out", str(out)], pause=0.5
    )
    kept = out.with_name(".a.npz.parts")
    until = time.monotonic() + 150
    while len([p for p in (kept.iterdir() if kept.exists() else ()) if p.name[0].isdigit()]) < 2:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    children = (
        (Path("/proc") / str(process.pid) / "task" / str(process.pid) / "children")
        .read_text()
        .split()
    )
    for child in children:
        os.kill(int(child), 9)
    process.kill()
    process.communicate()
    assert not out.exists()
    done = torchrun(1, "sample", str(model), *WORDS, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(out, alone)
