"""Rehearse the start of a training run on several processes: do they reach each other?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mezzotint.core import distributed

END_SECONDS = 10.0  # for torchrun to end after SIGTERM, before SIGKILL

# The launcher and the ranks, which have sessions of their own, share the read end of a pipe as
# standard input and end when it closes: the other end is open only as long as its owner lives. The
# thread starts before anything slow is imported.
_WATCH = """
import os, signal, sys, threading, time
def watch():
    os.read(0, 1)
    {end}
threading.Thread(target=watch, daemon=True).start()
"""
_LAUNCHER = (
    _WATCH.format(
        end=f"os.kill(os.getpid(), signal.SIGTERM); time.sleep({END_SECONDS}); os._exit(1)"
    )
    + "from torch.distributed.run import main; main(sys.argv[1:])"
)
_RANK = (
    _WATCH.format(end="os._exit(1)")
    + "from mezzotint.tools.rehearsal import check_one_rank; check_one_rank(sys.argv[1])"
)


def check_processes(timeout: float = 120.0) -> dict[str, Any]:
    """Check that processes can communicate: all GPUs under NCCL, or two processes under gloo.

    They start as in training, by torchrun, and are ended after `timeout` seconds, or with this
    process if it ends before.

    Returns:
        "started" counts the processes that got as far as communicating; a slow machine may not get
        them there in time.
    """
    gpus = torch.cuda.device_count()
    processes, backend = (gpus, "nccl") if gpus > 1 else (2, "gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if gpus <= 1:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status, printed = _run_torchrun(processes, folder, environment, timeout)
        started = len(list(folder.glob("*.started")))
    return {
        "backend": backend,
        "processes": processes,
        "started": started,
        "passed": status == 0,
        "error": describe_failure(status, started, processes, timeout, printed),
        "seconds": time.monotonic() - start,
    }


def describe_failure(
    status: int | None, started: int, processes: int, timeout: float, printed: str
) -> str:
    """Return what went wrong, "" for nothing; a slow machine is no firewall.

    Args:
        status: of torchrun, None if it was ended after `timeout` seconds.
    """
    if status == 0:
        return ""
    if status is not None:
        lines = printed.splitlines()
        return ([line for line in lines if "Error" in line] or lines or ["no output"])[0][-300:]
    if started < processes:
        return (
            f"{started} of {processes} had started after {timeout:g} s: the machine is slow or "
            "busy; try again when it has less to do"
        )
    return f"no answer within {timeout:g} s; is a firewall between the processes?"


def _run_torchrun(
    processes: int, folder: Path, environment: dict[str, str], timeout: float
) -> tuple[int | None, str]:
    """Run the ranks; return torchrun's exit status, None after `timeout`, and what it printed."""
    options = ["--standalone", "--nproc-per-node", str(processes), "--no-python"]
    rank = [sys.executable, "-c", _RANK, str(folder)]
    with (folder / "printed").open("w+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *options, *rank],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
        assert process.stdin is not None
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            process.stdin.close()  # the ranks end by themselves
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")


def check_one_rank(folder: str) -> None:
    """Run one process of `check_processes`: every rank must receive the sum over all ranks."""
    (Path(folder) / f"{os.environ['RANK']}.started").touch()
    world = distributed.init_distributed()
    total = distributed.sum_over_ranks(
        torch.full((1024,), float(world.rank + 1), device=world.device), world
    )
    expected = world.size * (world.size + 1) / 2
    if not bool((total == expected).all()):
        raise RuntimeError(f"the ranks add up to {total[0].item()}, not {expected}")
    distributed.shutdown_distributed()
