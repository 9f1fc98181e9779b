"""The environment of a run: environment.json in its folder, with an entry for each start."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mezzotint.core.distributed import gather_to_rank0
from mezzotint.core.files import open_regular, write_json
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
    """Add an entry for this start to environment.json; all ranks call this together.

    Errors: OSError where the folder cannot be written.
    """
    name = describe_machine(run.world.device.type)["processor"]
    names = gather_to_rank0(name)
    if names is not None:
        path = run.folder / FILE
        write_json(path, [*read(path), describe_start(run.state.images, names)])


def read(path: Path) -> list[dict[str, Any]]:
    """Return the entries, oldest first; none where the file is missing or damaged."""
    try:
        with open_regular(path) as file:
            entries = json.load(file)
    except (OSError, ValueError, RecursionError):
        return []
    return [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []


def describe_start(images: int, devices: list[str]) -> dict[str, Any]:
    """Return the entry of this process.

    Args:
        images: seen when it starts.
        devices: name of each rank's device.
    """
    return {
        "images": images,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": hide_home(command_line()),
        "commit": find_commit(Path(__file__).parents[1]),
        "versions": installed_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "devices": dict(Counter(devices)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def command_line() -> str:
    """Return the command line of this process, as a shell takes it."""
    program, *arguments = sys.orig_argv
    return shlex.join([Path(program).name, *arguments])


def hide_home(command: str) -> str:
    """Return a command with ~ for the home folder, to be shown to others."""
    home = str(Path.home())
    # A whole path: /home/ann is not the beginning of /home/anna.
    whole = rf"(?<![\w/.]){re.escape(home)}(?![\w.-])"
    return command if home == "/" else re.sub(whole, "~", command)


def installed_versions() -> dict[str, str]:
    """Return the versions of those of PACKAGES that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def find_commit(package: Path) -> str | None:
    """Return the git commit of `package`, with "-dirty" where files differ; None if unknown.

    It is that of the checkout the folder belongs to, or the one pip noted when it installed from a
    repository.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()

    try:
        # Fails for a package that is installed inside the checkout of another project.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        origin = importlib.metadata.distribution("mezzotint").read_text("direct_url.json")
        return json.loads(origin or "{}")["vcs_info"]["commit_id"]
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError):
        return None
