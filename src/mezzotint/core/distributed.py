"""One process or many: who am I, and how do ranks agree. PyTorch's own process groups, launched by torchrun."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among `size`; `device` is where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


class RankFailed(OSError):
    """Raised on ranks that did nothing wrong; an OSError, which the command line prints as one sentence."""


def default_device() -> torch.device:
    """The GPU that torchrun gives this process (the first one, alone), or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def init_distributed() -> World:
    """Join the group that torchrun's environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or stand alone."""
    device = default_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(rank=dist.get_rank() if size > 1 else 0, size=size, device=device)


def shutdown_distributed() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        # gloo's threads need Python's lock to let go of the last collective's tensors, and torch 2.13 joins them
        # holding it: sleeping lends it to them first.
        time.sleep(0.1)
        dist.destroy_process_group()


def any_rank(flag: bool, world: World) -> bool:
    """Whether the flag is set on at least one rank; every rank gets the same answer."""
    if world.size == 1:
        return flag
    value = torch.tensor(float(flag), device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """Sum over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_rank0(value: T, world: World) -> T:
    """Rank 0's value, on every rank; it must pickle."""
    box: list[Any] = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_on_all_ranks(error: Exception | None, world: World) -> None:
    """Raise on every rank if any brings an error: its own where there is one, else `RankFailed` with their words.

    Every rank must call it equally often; call it after work that may fail, so that no rank waits for one that left.
    """
    if not any_rank(error is not None, world):
        return
    if error is not None and world.size == 1:
        raise error
    words: list[Any] = [None] * world.size
    dist.all_gather_object(words, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    raise RankFailed(
        "; ".join(f"rank {i} failed: {said}" for i, said in enumerate(words) if said is not None)
    )


T = TypeVar("T")


PATIENCE = timedelta(
    days=1
)  # how long a rank waits for the one with the most pieces; NCCL's own groups give minutes


_held: tuple[dist.ProcessGroup | None, dist.ProcessGroup] | None = None


class EvaluationFailed(RuntimeError):
    """Raised on every rank when any of them failed; training may go on."""


def rank() -> int:
    """This process's number, 0 without distribution."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
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


def all_ranks(work: Callable[[], T]) -> T:
    """`work()` on every rank; if it raises on one, every rank raises after all have finished or failed.

    Alone, the exception passes unchanged. `work` must not communicate, or the others would wait for the rank that left.
    """
    if world_size() == 1:
        return work()
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(work())
    except Exception as caught:
        error = caught
    reports: list[Any] = [None] * world_size()
    dist.all_gather_object(
        reports, None if error is None else f"{type(error).__name__}: {error}", group=_group()
    )
    failed = [f"rank {i}: {report}" for i, report in enumerate(reports) if report is not None]
    if failed:
        raise EvaluationFailed("; ".join(failed)) from error
    return result[0]


def on_rank0(work: Callable[[], T]) -> T:
    """`work()` on rank 0 only, its result on every rank; a failure there is raised on all."""
    result = all_ranks(lambda: work() if rank() == 0 else None)
    if world_size() == 1:
        return result  # pyright: ignore[reportReturnType]
    box: list[Any] = [result]
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]


def gather_to_rank0(mine: T) -> list[T] | None:
    """Every rank's value, in rank order, on rank 0; None on the others."""
    if world_size() == 1:
        return [mine]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(mine, values, dst=0, group=_group())
    return values
