"""What every benchmark writes with its numbers: the machine, the code, one JSON file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import mezzotint
from mezzotint.core.machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Return the measured commit, or $COMMIT where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return os.environ.get("COMMIT", "")
    return done.stdout.strip() or os.environ.get("COMMIT", "")


def facts(device: str) -> dict[str, Any]:
    """Return the command, the versions and the machine of a result."""
    # Keep only the last component of a path outside the repository.
    arguments = [Path(a).name if a.startswith(("/", "..")) else a for a in sys.argv[1:]]
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "mezzotint": mezzotint.__version__,
        "commit": commit(),
        **describe_machine(device),
        "clock": "processor time of one thread"
        if device == "cpu" and torch.get_num_threads() == 1
        else "wall",
    }


def write(out: Path, device: str, **content: Any) -> None:
    """Write `facts` and `content` as one JSON file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts(device), **content}, indent=1) + "\n")


def one_thread() -> None:
    """Use one thread, or OMP_NUM_THREADS: two are very slow when another job shares the cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
