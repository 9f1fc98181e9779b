"""Evaluation on several ranks: all of them work, and a failure on one ends it on all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # how long a rank waits for the one with the most pieces; NCCL's own groups give minutes
_held: tuple[dist.ProcessGroup | None, dist.ProcessGroup] | None = None


class EvaluationFailed(RuntimeError):
    """Raised on every rank when any of them failed; training may go on."""


def rank() -> int:
    """This process's number, 0 without distribution."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 without distribution."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _group() -> dist.ProcessGroup:
    """A gloo group for the objects that are exchanged here, made when first needed; all ranks need it together."""
    global _held
    if _held is None or _held[0] is not dist.group.WORLD:
        made = dist.new_group(backend="gloo", timeout=PATIENCE)
        assert isinstance(made, dist.ProcessGroup), "every rank is a member"
        _held = dist.group.WORLD, made
    return _held[1]


def together(work: Callable[[], T]) -> T:
    """`work()` on every rank; if it raises on one, every rank raises after all have finished or failed.

    Alone, the exception passes unchanged. `work` must not communicate, or the others would wait for the rank that left.
    """
    if world() == 1:
        return work()
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(work())
    except Exception as caught:
        error = caught
    reports: list[Any] = [None] * world()
    dist.all_gather_object(reports, None if error is None else f"{type(error).__name__}: {error}", group=_group())
    failed = [f"rank {i}: {report}" for i, report in enumerate(reports) if report is not None]
    if failed:
        raise EvaluationFailed("; ".join(failed)) from error
    return result[0]


def on_first(work: Callable[[], T]) -> T:
    """`work()` on rank 0 only, its result on every rank; a failure there is raised on all."""
    result = together(lambda: work() if rank() == 0 else None)
    if world() == 1:
        return result  # pyright: ignore[reportReturnType]
    box: list[Any] = [result]
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]


def gathered(mine: T) -> list[T] | None:
    """Every rank's value, in rank order, on rank 0; None on the others."""
    if world() == 1:
        return [mine]
    values: list[Any] | None = [None] * world() if rank() == 0 else None
    dist.gather_object(mine, values, dst=0, group=_group())
    return values
