"""Training state on disk: written beside, checked by hash, renamed into place; found again, or named as damaged.

A checkpoint is a folder `checkpoints/IMAGES/` of PyTorch's distributed format, so that what two processes saved one or
three can resume, plus `manifest.json` with the size and SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mezzotint.ranks import World, add_ranks

MANIFEST = "manifest.json"


@dataclass
class State:
    """Everything that changes during training.

    images: images seen; every random draw, the learning rate and the data cursor are functions of it.
    window: sums since the last log line (see `log`), so that a resumed log continues to the letter.
    """

    backbone: nn.Module
    optimisers: list[torch.optim.Optimizer]
    averages: dict[str, dict[str, Tensor]]
    window: Tensor
    images: int = 0

    def tensors(self, world: World) -> dict[str, Any]:
        """The state as nested dictionaries of (possibly sharded) tensors, in the form that is saved."""
        return {
            "model": get_model_state_dict(self.backbone),
            "optimiser": get_optimizer_state_dict(self.backbone, self.optimisers),
            "average": self.averages,
            "window": add_ranks(self.window.clone(), world),
        }


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Ask the disk to keep what was written to a file or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(folder: Path, **facts: Any) -> None:
    """List every file of `folder` with its size and hash, and flush all of them."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": file_hash(p)} for p in files}
    for path in files:
        _sync(path)
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": listing}, indent=1))
    _sync(folder / MANIFEST)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {facts['bytes']}"
            if file_hash(path) != facts["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, damaged ones included."""
    found = [p for p in (run / "checkpoints").glob("*") if p.is_dir() and p.name.isdigit()]
    return sorted(found, key=lambda p: int(p.name))


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a sentence for each newer one that had to be passed over."""
    passed = []
    for folder in reversed(checkpoints(run)):
        wrong = damage(folder)
        if wrong is None:
            return folder, passed
        passed.append(f"checkpoint {folder.name} is damaged and passed over: {wrong}")
    return None, passed


def save(state: State, run: Path, world: World, keep: int, keep_every: int | None) -> Path:
    """Write the checkpoint of `state.images` (all ranks call this together) and drop the old ones.

    On any failure nothing half-written stays and the previous checkpoint is untouched.
    """
    final = run / "checkpoints" / str(state.images)
    partial = final.with_name(f".{state.images}.partial")
    try:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
        _barrier(world)
        with _one_process_is_fine():
            dcp.save(state.tensors(world), checkpoint_id=partial, no_dist=world.size == 1)
        if world.main:
            write_manifest(partial, images=state.images, ranks=world.size, torch=torch.__version__)
            if final.exists():  # left by a run that was killed between this save and its next log line
                shutil.rmtree(final)
            partial.rename(final)
            _sync(final.parent)
            prune(run, keep, keep_every)
    except BaseException as error:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, (OSError, RuntimeError, dcp.api.CheckpointException)):
            raise OSError(
                f"the checkpoint at {state.images} images could not be written to {run}: {error}; "
                "earlier checkpoints are intact. Free some space or mend the folder and run the same command again."
            ) from error
        raise
    _barrier(world)
    return final


def prune(run: Path, keep: int, keep_every: int | None) -> None:
    """Drop all but the newest `keep` checkpoints and those at multiples of `keep_every` images."""
    for folder in checkpoints(run)[:-keep] if keep > 0 else []:
        if not (keep_every and int(folder.name) % keep_every == 0):
            shutil.rmtree(folder)


def restore(state: State, folder: Path, world: World) -> None:
    """Read a checkpoint into `state`, in place, whatever the number of ranks that wrote it."""
    tensors = state.tensors(world)
    with _one_process_is_fine():
        dcp.load(tensors, checkpoint_id=folder, no_dist=world.size == 1)
    set_model_state_dict(state.backbone, tensors["model"])
    set_optimizer_state_dict(state.backbone, state.optimisers, tensors["optimiser"])
    # The sums were saved over all ranks, so the first one continues them and the others start anew.
    state.window.copy_(tensors["window"] if world.main else torch.zeros_like(state.window))
    state.images = int(folder.name)


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without a process group torch warns that it assumes a single process, which is what we told it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
