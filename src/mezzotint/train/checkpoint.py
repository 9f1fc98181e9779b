"""Checkpoints: written atomically, verified by SHA-256, restored on any number of ranks.

A checkpoint is a folder `checkpoints/IMAGES/` in the format of `torch.distributed.checkpoint`,
which any number of processes can restore, and `manifest.json` with the size and SHA-256 of every
file that its description names. Reading one runs no code of it, see `train.checkpoint_reader`.
"""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mezzotint.core.distributed import (
    World,
    all_ranks,
    any_rank,
    host_group,
    new_host_group,
    on_rank0,
    raise_on_all_ranks,
    sum_over_ranks,
)
from mezzotint.core.files import fsync_path, read_json, sha256_of_file
from mezzotint.train.checkpoint_reader import (
    METADATA,
    CheckpointReader,
    PlainValues,
    file_sizes,
    read_metadata,
)
from mezzotint.train.run_folder import started_recipe
from mezzotint.train.staging import share_of_rank

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


def write_manifest(folder: Path, files: Iterable[str], **facts: Any) -> None:
    """Flush the files of a folder to disk, and write manifest.json with their sizes and hashes.

    Args:
        files: what the folder must hold. OSError names one that is missing, and nothing is written.
        facts: more keys of the manifest.
    """
    listing = {}
    for name in sorted(files):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{name} is missing; is the folder on a disk that every rank shares?"
            )
        fsync_path(path)
        listing[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": listing}, indent=1))
    fsync_path(folder / MANIFEST)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a folder; None where every file matches its manifest."""
    if not (folder / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(folder / MANIFEST, "it is damaged")
        files = [(name, int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, size, sha256 in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, its manifest says {size}"
        try:
            if sha256_of_file(path) != sha256:
                return f"{name} has changed since it was written (SHA-256 differs)"
        except ValueError as error:
            return str(error)
    return None


def find_checkpoint_damage(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from; None where it is whole and in its place."""
    try:
        damage = find_damage(folder)
        if damage is not None:
            return damage
        sizes, manifest = file_sizes(read_metadata(folder)), read_json(folder / MANIFEST)
    except (ValueError, OSError) as error:
        return str(error)
    for name in (METADATA, *sizes):
        if name not in manifest["files"]:
            return f"{name} belongs to it and {MANIFEST} does not list it"
        if int(manifest["files"][name]["bytes"]) < sizes.get(name, 0):
            return f"{name} is shorter than {METADATA} says"
    images = manifest.get("images", int(folder.name))
    if images != int(folder.name):
        return f"it is the checkpoint at {images} images, copied or renamed"
    return None


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, damaged ones included."""
    folders = [p for p in (run / "checkpoints").glob("*") if p.is_dir() and p.name.isdecimal()]
    return sorted(folders, key=lambda p: int(p.name))


def find_newest_intact(run: Path, before: float = math.inf) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and a message for each newer one that is damaged.

    Args:
        before: look only at checkpoints of fewer images.
    """
    messages = []
    for folder in reversed(list_checkpoints(run)):
        if int(folder.name) >= before:
            continue
        damage = find_checkpoint_damage(folder)
        if damage is None:
            return folder, messages
        messages.append(f"checkpoint {folder.name} is damaged and passed over: {damage}")
    return None, messages


def find_resume_point(run: Path, world: World) -> tuple[Path | None, list[str]]:
    """Return `find_newest_intact`, the same on every rank; (None, []) for a run without any.

    Errors: ValueError for a run that has been trained and has nothing to resume from.
    """

    def find() -> tuple[Path | None, list[str]]:
        newest, messages = find_newest_intact(run)
        if newest is None:
            refuse_to_restart(run, messages)
        return newest, messages

    return on_rank0(find, world)


def refuse_to_restart(run: Path, messages: list[str]) -> None:
    """Raise ValueError where training from the start would overwrite what a run has learned."""
    models = [name for name in ("model", "model-raw") if (run / name).exists()]
    kept = [f"{name}/" for name in (*models, *(["checkpoints"] if list_checkpoints(run) else []))]
    if not kept:
        return
    reasons = "; ".join(
        [f"{run} was trained ({', '.join(kept)}) and has no checkpoint to resume from", *messages]
    )
    started = started_recipe(run)
    if started is not None and started.save.store:
        reasons += f"; its checkpoints went to {started.save.store}, so give save.store again"
    init_from = f" with --init-from {run / models[0]} for its weights" if models else ""
    raise ValueError(
        f"{reasons}. Nothing was changed. Bring its checkpoints back, use another "
        f"--out{init_from}, or delete {run} to train from the start"
    )


class CheckpointWriter:
    """Writes in a background thread, one task at a time; `wait` raises what went wrong."""

    def __init__(self, world: World):
        self.world = world
        # The writing threads communicate in a process group of their own: a collective of theirs in
        # training's group would pair with one of the training step.
        self.group: dist.ProcessGroup | None = None
        if world.size > 1:
            self.group = new_host_group()
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
        if error is not None and not isinstance(error, Exception):
            error = RuntimeError(f"{type(error).__name__}: {error}")
        raise_on_all_ranks(error, self.world)

    def start(self, task: Callable[[], object]) -> None:
        """Run `task` in the background; the one before must have been waited for."""
        assert self._pending is None, "wait first"
        self._pending = self._pool.submit(task)

    def close(self) -> None:
        """Wait for the last task, whether or not it fails."""
        self._pool.shutdown(wait=True)


@runtime_checkable
class Target(Protocol):
    """Where a checkpoint goes that leaves the run folder, see `train.checkpoint_store`."""

    @property
    def address(self) -> str:
        """Its name in messages."""
        ...

    def publish(
        self, facts: dict[str, Any], folder: Path, metadata: Metadata, writer: CheckpointWriter
    ) -> None:
        """Take over the files that this rank has written to `folder`; all ranks call it."""
        ...


def begin_checkpoint(
    state: TrainingState, run: Path, writer: CheckpointWriter, target: Target | None = None
) -> Callable[[], Path]:
    """Copy the state to the CPU; return the function that writes it as checkpoint `state.images`.

    Each rank copies and writes its share, see `train.staging`. All ranks call both together. On
    failure nothing half-written stays, and earlier checkpoints are untouched.

    Args:
        target: where it goes; it stays in `run`, which all ranks share, by default.

    Errors: OSError from the returned function when the disk is full, not writable or gone, and
        where the target does not take the checkpoint.
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
    if target is not None:  # every node has a disk of its own
        all_ranks(lambda: partial.mkdir(parents=True, exist_ok=True), world)
    # Without a process group torch warns that it assumes a single process, as no_dist says.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    writing = dcp.async_save(
        share_of_rank(state.tensors(world), world),
        checkpoint_id=partial,
        process_group=writer.group,
        no_dist=world.size == 1,
    )
    assert isinstance(writing, Future), "the default stager copies before it returns"

    def finish() -> Path:
        try:
            metadata = cast(Metadata, writing.result())
            facts = {"images": images, "ranks": world.size, "torch": torch.__version__}
            if target is not None:
                target.publish(facts, partial, metadata, writer)
            elif world.is_rank0:
                write_manifest(partial, files=[METADATA, *file_sizes(metadata)], **facts)
                publish_folder(partial, final)
        except (Exception, CheckpointException) as reason:
            raise _write_error(images, target.address if target else run, reason) from reason
        finally:
            if world.is_rank0 or target is not None:
                shutil.rmtree(partial, ignore_errors=True)
        return final

    return finish


class SaveError(OSError):
    """A part of a save could not be written."""


def run_tasks(
    folder: Path,
    check_folder: Callable[[], None],
    images: int,
    tasks: Iterable[Callable[[], object]],
) -> None:
    """Run the tasks of a save one after the other; OSError in a sentence where one fails.

    Args:
        check_folder: raises OSError where `folder` is no longer the run's.
    """
    for task in tasks:
        check_folder()
        try:
            task()
        except SaveError:
            raise
        except Exception as error:
            check_folder()
            raise SaveError(
                f"{folder} could not be written at {images} images: {one_line(error)}; its "
                "checkpoints are intact, and the same command goes on from the newest"
            ) from error


def _write_error(images: int, place: Path | str, reason: BaseException) -> SaveError:
    local = isinstance(place, Path)
    advice = "Free some space or repair the folder" if local else "Check the store"
    return SaveError(
        f"the checkpoint at {images} images could not be written to {place}: {one_line(reason)}; "
        f"earlier checkpoints are intact. {advice}, and repeat the command."
    )


def one_line(error: BaseException) -> str:
    """Return the first line of an error; of torch's bundle of errors, that of the first rank."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return one_line(inner) if len(error.failures) == 1 else f"rank {rank}: {one_line(inner)}"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"


def publish_folder(partial: Path, final: Path) -> None:
    """Rename a written folder into place, replacing any folder there, and flush its name."""
    if final.exists():  # written before the run was resumed from an earlier checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    fsync_path(final.parent)


def prune_checkpoints(run: Path, images: int, keep: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the first at or past each multiple.

    Args:
        keep_every: in images; the batch need not divide it.
        images: of the newest. Checkpoints of more images were passed over when the run resumed.
    """
    there = [int(folder.name) for folder in list_checkpoints(run)]
    for old in checkpoints_to_delete(there, images, keep, keep_every):
        shutil.rmtree(run / "checkpoints" / str(old))


def checkpoints_to_delete(
    there: Iterable[int], images: int, keep: int, keep_every: int | None
) -> list[int]:
    """Return which of the checkpoints at so many images go, see `prune_checkpoints`."""
    written = sorted(i for i in there if i <= images)
    deleted, before = [], 0
    for i in written[: max(0, len(written) - keep)]:
        # The one before that is still there: the first past a multiple always is.
        if keep_every is not None and i // keep_every > before // keep_every:
            before = i
        else:
            deleted.append(i)
    return deleted


class UnusableCheckpointError(ValueError):
    """A checkpoint cannot be loaded into this run."""


def restore_checkpoint(state: TrainingState, folder: Path, world: World) -> None:
    """Read a checkpoint into `state`, in place; any number of ranks may have written it.

    Errors: UnusableCheckpointError on every rank where it cannot be loaded; `state` may then hold
        parts of it.
    """
    error = None
    try:
        _load(state, folder, world)
    except (Exception, CheckpointException) as reason:
        failures = reason.failures.values() if isinstance(reason, CheckpointException) else ()
        if any(isinstance(inner, KeyboardInterrupt) for inner, _ in failures):
            raise KeyboardInterrupt from None
        error = UnusableCheckpointError(one_line(reason))
    if any_rank(error is not None, world):
        raise error or UnusableCheckpointError("another rank cannot load it")


def _load(state: TrainingState, folder: Path, world: World) -> None:
    tensors = state.tensors(world)
    reader = all_ranks(lambda: CheckpointReader(folder), world)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as above
    dcp.load(
        tensors,
        storage_reader=reader,
        planner=PlainValues(),
        process_group=host_group() if world.size > 1 else None,
        no_dist=world.size == 1,
    )
    set_model_state_dict(state.backbone, tensors["model"])
    set_optimizer_state_dict(state.backbone, state.optimisers, tensors["optimiser"])
    state.unpack_history(tensors["history"])
    # The saved sums are over all ranks: rank 0 continues them, the others start from zero.
    window = tensors["window"]
    state.metrics_window.copy_(window if world.is_rank0 else torch.zeros_like(window))
    state.images = int(folder.name)


def restore_newest(
    state: TrainingState,
    run: Path,
    newest: Path,
    world: World,
    print_line: Callable[[str], None] = print,
) -> None:
    """Restore checkpoint `newest`, or where it cannot be loaded the newest before it that can.

    Args:
        print_line: gets a line for each checkpoint that is passed over.

    Errors: ValueError on every rank where none can be loaded.
    """
    found, messages = newest, []
    while found is not None:
        try:
            restore_checkpoint(state, found, world)
            break
        except UnusableCheckpointError as reason:
            failed = found
            messages.append(
                f"checkpoint {failed.name} cannot be loaded and is passed over: {reason}"
            )
        before = int(failed.name)
        found, damaged = on_rank0(lambda before=before: find_newest_intact(run, before), world)
        messages += damaged
    if found is None:
        refuse_to_restart(run, messages)
    for line in messages:
        print_line(line)
