"""Training state on disk: written beside, checked by hash, renamed into place; found again, or named as damaged.

A checkpoint is a folder `checkpoints/IMAGES/` of PyTorch's distributed format, so that what two processes saved one or
three can resume, plus `manifest.json` with the size and SHA-256 of every file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
from mezzotint.core.files import fsync_path

MANIFEST = "manifest.json"
RECENT = 128  # losses that the sentinel remembers


@dataclass
class TrainingState:
    """Everything that changes during training.

    images: images seen; every random draw, the learning rate and the data cursor are functions of it.
    window: sums since the last log line (see `log`), so that a resumed log continues to the letter.
    recent: losses of the latest steps; skipped, spikes: steps of either kind in the whole run (see `sentinel`).
    """

    backbone: nn.Module
    optimisers: list[torch.optim.Optimizer]
    averages: dict[str, dict[str, Tensor]]
    window: Tensor
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    skipped: int = 0
    spikes: int = 0
    images: int = 0

    def tensors(self, world: World) -> dict[str, Any]:
        """The state as nested dictionaries of (possibly sharded) tensors, in the form that is saved."""
        return {
            "model": get_model_state_dict(self.backbone),
            "optimiser": get_optimizer_state_dict(self.backbone, self.optimisers),
            "average": self.averages,
            "window": sum_over_ranks(self.window.clone(), world),
            "history": self._history(),
        }

    def _history(self) -> Tensor:
        losses = [*self.recent, *[torch.nan] * (RECENT - len(self.recent))]
        return torch.tensor([self.skipped, self.spikes, *losses], dtype=torch.float64)

    def set_history(self, history: Tensor) -> None:
        """The inverse of what `tensors` holds as "history"."""
        skipped, spikes, *losses = history.tolist()
        self.skipped, self.spikes = int(skipped), int(spikes)
        self.recent = deque((loss for loss in losses if loss == loss), maxlen=RECENT)


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, **facts: Any) -> None:
    """List every file of `folder` with its size and hash, and flush all of them."""
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
    """What is wrong with a checkpoint folder, or None when every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {facts['bytes']}"
            if sha256_of_file(path) != facts["sha256"]:
                return f"{name} has changed since it was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, damaged ones included."""
    found = [p for p in (run / "checkpoints").glob("*") if p.is_dir() and p.name.isdigit()]
    return sorted(found, key=lambda p: int(p.name))


def find_newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a sentence for each newer one that had to be passed over."""
    passed = []
    for folder in reversed(list_checkpoints(run)):
        wrong = find_damage(folder)
        if wrong is None:
            return folder, passed
        passed.append(f"checkpoint {folder.name} is damaged and passed over: {wrong}")
    return None, passed


class CheckpointWriter:
    """Writes behind training, one thing at a time; what goes wrong waits to be asked for."""

    def __init__(self, world: World):
        self.world = world
        # The ranks' writing threads agree on a checkpoint in a group of their own, apart from training's.
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mezzotint-writer")
        self._pending: Future[object] | None = None

    @property
    def failed(self) -> bool:
        """Whether the last thing given could not be written, as far as is known without waiting."""
        return (
            self._pending is not None
            and self._pending.done()
            and self._pending.exception() is not None
        )

    def settle(self) -> None:
        """Wait for what is being written; where it failed on any rank, raise on all. All ranks call this together."""
        pending, self._pending = self._pending, None
        error = None if pending is None else pending.exception()
        raise_on_all_ranks(error if isinstance(error, Exception) else None, self.world)

    def start(self, task: Callable[[], object]) -> None:
        """Run `task` behind training; what was started before must have been settled."""
        assert self._pending is None, "settle first"
        self._pending = self._pool.submit(task)

    def close(self) -> None:
        """Wait for what is being written, come what may."""
        self._pool.shutdown(wait=True)


def begin_checkpoint(
    state: TrainingState, run: Path, writer: CheckpointWriter
) -> Callable[[], Path]:
    """Copy the state to the CPU now; the function returned writes it as the checkpoint of `state.images`.

    All ranks call both together. On any failure nothing half-written stays and the previous checkpoint is untouched.

    Errors: OSError from the function returned when the disk is full, not writable or gone.
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
            error = _not_written(images, run, reason)
    raise_on_all_ranks(error, world)  # and no rank goes on before the folder is there
    # Without a process group torch warns that it assumes a single process, which is what we tell it.
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
            raise _not_written(images, run, reason) from reason
        finally:
            if world.is_rank0:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    return finish


def _not_written(images: int, run: Path, reason: BaseException) -> OSError:
    return OSError(
        f"the checkpoint at {images} images could not be written to {run}: {reason}; "
        "earlier checkpoints are intact. Free some space or mend the folder and run the same command again."
    )


def publish_folder(partial: Path, final: Path) -> None:
    """Put a written folder in its place and have the disk keep its name; what was there before goes."""
    if final.exists():  # of a run that was resumed from an earlier checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    fsync_path(final.parent)


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Within the block the run's folder is ours alone; however the process ends, the lock ends with it.

    Errors: ValueError where another process holds it; OSError where the folder cannot be made.
    """
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {run}; let it, or use another --out"
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def remove_partial(run: Path) -> list[Path]:
    """Remove what a killed process left half-written in a run's folder; returns what there was."""
    left = [*run.glob(".*.partial"), *run.glob("*/.*.partial")]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return left


def prune_checkpoints(run: Path, keep: int, keep_every: int | None) -> None:
    """Drop all but the newest `keep` checkpoints and those at multiples of `keep_every` images."""
    for folder in list_checkpoints(run)[:-keep] if keep > 0 else []:
        if not (keep_every and int(folder.name) % keep_every == 0):
            shutil.rmtree(folder)


def restore_checkpoint(state: TrainingState, folder: Path, world: World) -> None:
    """Read a checkpoint into `state`, in place, whatever the number of ranks that wrote it."""
    tensors = state.tensors(world)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as in `begin`
    dcp.load(tensors, checkpoint_id=folder, no_dist=world.size == 1)
    set_model_state_dict(state.backbone, tensors["model"])
    set_optimizer_state_dict(state.backbone, state.optimisers, tensors["optimiser"])
    state.set_history(tensors["history"])
    # The sums were saved over all ranks, so the first one continues them and the others start anew.
    state.window.copy_(tensors["window"] if world.is_rank0 else torch.zeros_like(state.window))
    state.images = int(folder.name)
