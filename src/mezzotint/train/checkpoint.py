"""Checkpoints: written atomically, verified by SHA-256, restored on any number of ranks.

A checkpoint is a folder `checkpoints/IMAGES/` in the format of `torch.distributed.checkpoint`,
which any number of processes can restore, and `manifest.json` with the size and SHA-256 of every
file.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

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

from mezzotint.core.distributed import World, raise_on_all_ranks, sum_over_ranks
from mezzotint.core.files import fsync_path, read_json, sha256_of_file

MANIFEST = "manifest.json"
RECENT_LOSSES = 128  # kept to detect spikes


@dataclass
class TrainingState:
    """Everything that changes during training.

    images: images seen. Draws, learning rate and data order are functions of it.
    metrics_window: sums since the last log line (see `train.log`), so that a resumed run logs the
        same lines.
    recent: losses of the latest steps.
    skipped, spikes: steps of either kind in the whole run (see `train.nonfinite`).
    """

    backbone: nn.Module
    optimisers: list[torch.optim.Optimizer]
    averages: dict[str, dict[str, Tensor]]
    metrics_window: Tensor
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOSSES))
    skipped: int = 0
    spikes: int = 0
    images: int = 0

    def tensors(self, world: World) -> dict[str, Any]:
        """Return the state as saved: nested dictionaries of tensors, sharded or not."""
        return {
            "model": get_model_state_dict(self.backbone),
            "optimiser": get_optimizer_state_dict(self.backbone, self.optimisers),
            "average": self.averages,
            "window": sum_over_ranks(self.metrics_window.clone(), world),
            "history": self._pack_history(),
        }

    def _pack_history(self) -> Tensor:
        """Return skipped, spikes and the recent losses as one tensor of fixed length."""
        losses = [*self.recent, *[torch.nan] * (RECENT_LOSSES - len(self.recent))]
        return torch.tensor([self.skipped, self.spikes, *losses], dtype=torch.float64)

    def unpack_history(self, history: Tensor) -> None:
        """Restore skipped, spikes and the recent losses from a saved "history"."""
        skipped, spikes, *losses = history.tolist()
        self.skipped, self.spikes = int(skipped), int(spikes)
        self.recent = deque((v for v in losses if not math.isnan(v)), maxlen=RECENT_LOSSES)


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write manifest.json, the size and hash of every file of `folder`, and flush all to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of_file(p)}
        for p in files
    }
    for path in files:
        fsync_path(path)
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": listing}, indent=1))
    fsync_path(folder / MANIFEST)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder; None where every file matches its manifest."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(folder / MANIFEST, "it is damaged")
        files = [(name, int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, size, sha256 in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {size}"
        if sha256_of_file(path) != sha256:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, damaged ones included."""
    folders = [p for p in (run / "checkpoints").glob("*") if p.is_dir() and p.name.isdigit()]
    return sorted(folders, key=lambda p: int(p.name))


def find_newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and a message for each newer one that is damaged."""
    messages = []
    for folder in reversed(list_checkpoints(run)):
        damage = find_damage(folder)
        if damage is None:
            return folder, messages
        messages.append(f"checkpoint {folder.name} is damaged and passed over: {damage}")
    return None, messages


class CheckpointWriter:
    """Writes in a background thread, one task at a time; `wait` raises what went wrong."""

    def __init__(self, world: World):
        self.world = world
        # The writing threads communicate in a process group of their own: a collective of theirs in
        # training's group would pair with one of the training step.
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mezzotint-writer")
        self._pending: Future[object] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last task has failed by now, without waiting for it."""
        return (
            self._pending is not None
            and self._pending.done()
            and self._pending.exception() is not None
        )

    def wait(self) -> None:
        """Wait for the last task; if it failed on any rank, raise on all. All ranks call it."""
        pending, self._pending = self._pending, None
        error = None if pending is None else pending.exception()
        raise_on_all_ranks(error if isinstance(error, Exception) else None, self.world)

    def start(self, task: Callable[[], object]) -> None:
        """Run `task` in the background; the one before must have been waited for."""
        assert self._pending is None, "wait first"
        self._pending = self._pool.submit(task)

    def close(self) -> None:
        """Wait for the last task, whether or not it fails."""
        self._pool.shutdown(wait=True)


def begin_checkpoint(
    state: TrainingState, run: Path, writer: CheckpointWriter
) -> Callable[[], Path]:
    """Copy the state to the CPU; return the function that writes it as checkpoint `state.images`.

    All ranks call both together. On failure nothing half-written stays, and earlier checkpoints are
    untouched.

    Errors: OSError from the returned function when the disk is full, not writable or gone.
    """
    world, images = writer.world, state.images
    final = run / "checkpoints" / str(images)
    partial = final.with_name(f".{images}.partial")
    error = None
    if world.is_rank0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as reason:
            error = _write_error(images, run, reason)
    # Also a barrier: no rank writes before the folder exists.
    raise_on_all_ranks(error, world)
    # Without a process group torch warns that it assumes a single process, as no_dist says.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    writing = dcp.async_save(
        state.tensors(world),
        checkpoint_id=partial,
        process_group=writer.group,
        no_dist=world.size == 1,
    )
    assert isinstance(writing, Future), "the default stager copies before it returns"

    def finish() -> Path:
        try:
            writing.result()
            if world.is_rank0:
                write_manifest(partial, images=images, ranks=world.size, torch=torch.__version__)
                publish_folder(partial, final)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as reason:
            raise _write_error(images, run, reason) from reason
        finally:
            if world.is_rank0:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    return finish


def _write_error(images: int, run: Path, reason: BaseException) -> OSError:
    return OSError(
        f"the checkpoint at {images} images could not be written to {run}: {reason}; earlier "
        "checkpoints are intact. Free some space or repair the folder, and repeat the command."
    )


def publish_folder(partial: Path, final: Path) -> None:
    """Rename a written folder into place, replacing any folder there, and flush its name."""
    if final.exists():  # written before the run was resumed from an earlier checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    fsync_path(final.parent)


def prune_checkpoints(run: Path, keep: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and those at multiples of `keep_every`."""
    for folder in list_checkpoints(run)[:-keep] if keep > 0 else []:
        if not (keep_every and int(folder.name) % keep_every == 0):
            shutil.rmtree(folder)


def restore_checkpoint(state: TrainingState, folder: Path, world: World) -> None:
    """Read a checkpoint into `state`, in place; any number of ranks may have written it."""
    tensors = state.tensors(world)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as above
    dcp.load(tensors, checkpoint_id=folder, no_dist=world.size == 1)
    set_model_state_dict(state.backbone, tensors["model"])
    set_optimizer_state_dict(state.backbone, state.optimisers, tensors["optimiser"])
    state.unpack_history(tensors["history"])
    # The saved sums are over all ranks: rank 0 continues them, the others start from zero.
    window = tensors["window"]
    state.metrics_window.copy_(window if world.is_rank0 else torch.zeros_like(window))
    state.images = int(folder.name)
