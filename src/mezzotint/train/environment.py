"""What a run is made with: environment.json in its folder, an entry for each time it was started."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mezzotint.core.files import atomic_replace
from mezzotint.core.machine import describe_machine
from mezzotint.train.setup import Run

FILE = "environment.json"
PACKAGES = (
    "mezzotint",
    "torch",
    "numpy",
    "pillow",
    "datasets",
    "safetensors",
    "diffusers",
    "transformers",
)


def record(run: Run) -> None:
    """Add this start to the run's environment.json; all ranks call this together.

    Errors: OSError where the folder cannot be written.
    """
    name = describe_machine(run.world.device.type)["processor"]
    names: list[Any] = [name] * run.world.size
    if run.world.size > 1:
        dist.all_gather_object(names, name)
    if run.world.is_rank0:
        path = run.folder / FILE
        text = json.dumps([*read(path), start(run.state.images, names)], indent=1) + "\n"
        atomic_replace(path, lambda beside: beside.write_text(text, "utf-8"))


def read(path: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where there is no such file or a damaged one."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def start(images: int, devices: list[str]) -> dict[str, Any]:
    """This process's start after `images` seen, on the named devices, one for each rank."""
    return {
        "images": images,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(),
        "commit": commit(Path(__file__).parents[1]),
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "devices": dict(Counter(devices)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def command() -> str:
    """The command line of this process, where the home folder is ~."""
    program, *words = sys.orig_argv
    return shlex.join([Path(program).name, *words]).replace(str(Path.home()), "~")


def versions() -> dict[str, str]:
    """Those of PACKAGES that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit(package: Path) -> str | None:
    """The git commit that the code in `package` is of, with "-dirty" where files differ from it; None if none is known.

    Either the folder belongs to a checkout, or pip noted the commit when it installed from a repository.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # a checkout around an installation is not its own
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        noted = importlib.metadata.distribution("mezzotint").read_text("direct_url.json")
        return json.loads(noted or "{}")["vcs_info"]["commit_id"]
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        return None
