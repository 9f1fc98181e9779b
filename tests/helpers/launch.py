"""Run `mezzotint train` here, or under torchrun on several gloo ranks of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from mezzotint.cli import run_command


def run_here(*arguments: str) -> None:
    """Run `mezzotint ARGUMENTS` in this process, on the CPU as the ranks do."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        run_command(*arguments)


def torchrun(ranks: int, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `mezzotint ARGUMENTS` on RANKS processes; without torchrun for one."""
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launch, "-m", "mezzotint", *arguments],
        capture_output=True, text=True, timeout=timeout, env=environment, check=False,
    )  # fmt: skip


def train(ranks: int, preset: str, folder: Path, *overrides: str) -> Path:
    """Train a short float32 run on the digits without dropout, here if RANKS is 1; it succeeds."""
    common = [
        "model.channels=1", "model.num_classes=10", "batch=16", "images=96", "log_every_images=16",
        "samples.every_images=96", "samples.count=10", "samples.steps=2", "save.every_images=48",
        "save.keep=9", "engine.precision=float32", "optim.warmup_images=0",
    ]  # fmt: skip
    arguments = ["train", preset, *common, *overrides, "--data", "digits", "--out", str(folder)]
    if ranks == 1:
        run_here(*arguments)
    else:
        done = torchrun(ranks, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder
