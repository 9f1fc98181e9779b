"""One process or many: who am I, and how do ranks agree. PyTorch's own process groups, launched by torchrun."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
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
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0


class RankFailed(OSError):
    """Raised on ranks that did nothing wrong; an OSError, which the command line prints as one sentence."""


def own_device() -> torch.device:
    """The GPU that torchrun gives this process (the first one, alone), or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    )


def start() -> World:
    """Join the group that torchrun's environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or stand alone."""
    device = own_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(rank=dist.get_rank() if size > 1 else 0, size=size, device=device)


def stop() -> None:
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


def add_ranks(tensor: Tensor, world: World) -> Tensor:
    """Sum over ranks, in place."""
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def from_main(value: T, world: World) -> T:
    """Rank 0's value, on every rank; it must pickle."""
    box: list[Any] = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def fail_together(error: Exception | None, world: World) -> None:
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
    raise RankFailed("; ".join(f"rank {i} failed: {said}" for i, said in enumerate(words) if said is not None))
