"""Helpers for torch.distributed, for one process or for many started by torchrun."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mezzotint.core.machine import use_full_float32

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process, number `rank` of `size`, and the `device` it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


@dataclass(frozen=True)
class WorkShare:
    """A process's part of work in pieces that it does alone: those with k % world == rank."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment(local: bool = False) -> WorkShare:
        """Return the share of torchrun's RANK and WORLD_SIZE; of those of this machine if local."""
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if local else ("RANK", "WORLD_SIZE")
        rank, world = (int(os.environ.get(name, i)) for i, name in enumerate(names))
        return WorkShare(rank, world)


def restarts_ranks() -> bool:
    """Return whether torchrun started this process and restarts ranks that fail."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


class RankFailed(OSError):
    """Another rank failed; raised on the ranks that did not fail themselves.

    An OSError, so that the command line prints one sentence and no traceback.
    """


def default_device() -> torch.device:
    """Return the GPU of this process (number LOCAL_RANK, set by torchrun, else 0), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def init_distributed() -> World:
    """Join the process group of torchrun's RANK, WORLD_SIZE and LOCAL_RANK, if there is one.

    Errors: ValueError for ranks that do not fit together, and for a torchrun whose restarts would
        fail; RankFailed where a rank does not come.
    """
    _check_restarts()
    use_full_float32()
    device = default_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        _allow_connections()
        world = World(rank=int(os.environ.get("RANK", -1)), size=size, device=device)
        with lost_ranks(world):
            # torchrun gives all its processes one world size.
            store = None if "TORCHELASTIC_RUN_ID" in os.environ else _meet(world)
            # With its device named, NCCL connects here and not in the first step.
            dist.init_process_group(
                "nccl" if cuda else "gloo", timeout=STEP_TIMEOUT, device_id=device if cuda else None
            )
            del store  # rank 0 serves it until here
    return World(rank=dist.get_rank() if size > 1 else 0, size=size, device=device)


def _check_restarts() -> None:
    """Raise ValueError for a torchrun that keeps one store for all starts of the ranks.

    There, ranks that start again find the addresses of the dead (pytorch issue 135712).
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts_ranks() and shared:
        raise ValueError(
            "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment "
            "and --rdzv-backend c10d: otherwise restarted ranks do not find each other"
        )


def _allow_connections() -> None:
    """Raise this process's limit of open files to the most it may have.

    gloo connects every rank with every other, once for each group; the usual limit is 1,024.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # macOS states a limit that it does not accept
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


MOST_GPUS_PER_NODE = 8  # of the machines that are sold for training
MEETING_SECONDS = 1800  # a queue may start the ranks of a job one after another

# Within a step all ranks do the same work, so that none waits long for the others in NCCL; the
# first step also compiles.
STEP_TIMEOUT = timedelta(minutes=30)
# Work of uneven length: one rank may embed captions, write a checkpoint, read a slow disk or
# compute statistics for hours while the others wait. All but the collectives of a step runs in a
# gloo group of this timeout, on the host. A rank that ends breaks its connections, which ends the
# wait at once.
HOST_TIMEOUT = timedelta(days=1)


def _meet(world: World) -> dist.TCPStore:
    """Wait until all ranks have told their world size; the group would wait for ranks beyond it.

    Errors: ValueError where ranks have other world sizes.
    """
    rank, size = world.rank, world.size
    if not 0 <= rank < size:
        raise ValueError(f"RANK={rank} with WORLD_SIZE={size}; ranks are 0 to {size - 1}")
    address = os.environ.get("MASTER_ADDR", "")
    port = os.environ.get("MASTER_PORT", "")
    if not (address and port.isdigit()):
        raise ValueError(
            f"WORLD_SIZE={size} needs MASTER_ADDR and MASTER_PORT, the address of rank 0; "
            "start the ranks with torchrun, which sets them"
        )
    store = dist.TCPStore(
        address, int(port), is_master=rank == 0, wait_for_workers=False, multi_tenant=True
    )
    store.set(f"mezzotint/{rank}", str(size))
    missing, until = set(range(size)), time.monotonic() + MEETING_SECONDS
    while missing:
        for other in sorted(missing):
            if store.check([f"mezzotint/{other}"]):
                missing.remove(other)
                if (theirs := int(store.get(f"mezzotint/{other}"))) != size:
                    time.sleep(2.0)  # the others look too, and rank 0 serves the store
                    raise ValueError(
                        f"the ranks differ: rank {other} has world size {theirs}, rank {rank} "
                        f"{size}; give every rank the same WORLD_SIZE"
                    )
        if time.monotonic() > until:
            raise RankFailed(f"rank {min(missing)} of {size} did not come; start all ranks")
        time.sleep(0.05)
    return store


def shutdown_distributed() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        # gloo's threads need the GIL to free the last collective's tensors, and torch 2.13 joins
        # them while holding it. Sleeping gives it to them first.
        time.sleep(0.1)
        dist.destroy_process_group()


@contextmanager
def process_group() -> Iterator[World]:
    """Be in the process group, if there is one, within the block."""
    try:
        yield init_distributed()
    finally:
        shutdown_distributed()


def get_rank() -> int:
    """Return the number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


_host_group: tuple[dist.ProcessGroup | None, dist.ProcessGroup] | None = None


def host_group() -> dist.ProcessGroup:
    """Return the gloo group with `HOST_TIMEOUT`, made on first use by all ranks together."""
    global _host_group
    if _host_group is None or _host_group[0] is not dist.group.WORLD:
        _host_group = dist.group.WORLD, new_host_group()
    return _host_group[1]


def new_host_group() -> dist.ProcessGroup:
    """Make another such group, for a thread of its own; all ranks call this together."""
    group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group


def sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    """Sum over ranks, in place, on the device.

    The only function here that waits in the group of the training step: ranks come to it from the
    same work.
    """
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, world: World | None = None) -> bool:
    """Return whether the flag is set on at least one rank, on every rank.

    Args:
        world: this process and its peers; by default those of the process group, if there is one.
    """
    if _size(world) == 1:
        return flag
    value = torch.tensor(float(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=host_group())
    return bool(value.item())


def wait_for_ranks(world: World) -> None:
    """Return once all ranks have come here."""
    any_rank(False, world)


def broadcast_from_rank0(value: T, world: World | None = None) -> T:
    """Return rank 0's value, on every rank; it must pickle."""
    box: list[Any] = [value]
    if _size(world) > 1:
        dist.broadcast_object_list(box, src=0, group=host_group())
    return box[0]


def gather_from_ranks(value: T, world: World | None = None) -> list[T]:
    """Return every rank's value, in rank order, on every rank; values must pickle."""
    if _size(world) == 1:
        return [value]
    values: list[Any] = [None] * _size(world)
    dist.all_gather_object(values, value, group=host_group())
    return values


def gather_to_rank0(value: T) -> list[T] | None:
    """Return every rank's value, in rank order, on rank 0; None on the others."""
    if get_world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * get_world_size() if get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=host_group())
    return values


def _size(world: World | None) -> int:
    return get_world_size() if world is None else world.size


def raise_on_all_ranks(error: Exception | None, world: World | None = None) -> None:
    """Raise on every rank if any rank has an error: its own, else `RankFailed` with the others'.

    All ranks call it together, after work that may fail, so that no rank waits for one that left.
    """
    # An error is rare: one reduction of a flag first, the messages only if one is set.
    if not any_rank(error is not None, world):
        return
    described = None if error is None else f"{type(error).__name__}: {error}"
    reports = gather_from_ranks(described, world)
    if error is not None:
        raise error
    failed = [f"rank {i} failed: {text}" for i, text in enumerate(reports) if text is not None]
    raise RankFailed("; ".join(failed))


def all_ranks(work: Callable[[], T], world: World | None = None) -> T:
    """Return `work()` of this rank; if it raises on any rank, raise on all once all are done.

    A rank raises its own error, or else `RankFailed`. `work` must not communicate: the others would
    wait for a rank that failed.
    """
    if _size(world) == 1:
        return work()
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    raise_on_all_ranks(error, world)
    return cast(T, result)


def on_rank0(work: Callable[[], T], world: World | None = None) -> T:
    """Run `work()` on rank 0 and return its result on every rank; errors as for `all_ranks`."""
    is_rank0 = get_rank() == 0 if world is None else world.is_rank0
    result = all_ranks(lambda: work() if is_rank0 else None, world)
    return cast(T, broadcast_from_rank0(result, world))


@contextmanager
def lost_ranks(world: World) -> Iterator[None]:
    """Raise `RankFailed` in place of the error of a connection to a rank that has ended."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if world.size == 1 or not lost:
            raise
        raise RankFailed(
            f"rank {world.rank} has lost the others: one of them ended (an error of its own, "
            f"killed, or out of memory); its output says why ({str(error).splitlines()[0]})"
        ) from error
