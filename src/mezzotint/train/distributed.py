"""One process or many: who am I, how is the network wrapped, how do ranks agree. PyTorch's own engine throughout."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mezzotint.config import Engine


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


def start() -> World:
    """Join the group that torchrun's environment describes (RANK, WORLD_SIZE, LOCAL_RANK), or stand alone."""
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return World(rank=dist.get_rank() if size > 1 else 0, size=size, device=device)


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a backbone, the unit of sharding and compiling: members of its innermost ModuleLists."""
    if isinstance(module, nn.ModuleList):
        return [block for member in module for block in (blocks(member) or [member])]
    return [block for child in module.children() for block in blocks(child)]


def wrap(backbone: nn.Module, engine: Engine, precision: str, world: World) -> nn.Module:
    """The backbone as the training step calls it: compiled per block, then copied (DDP) or sharded (FSDP2)."""
    if engine.compile:
        for block in blocks(backbone):
            block.compile()
    if world.size == 1:
        return backbone
    if engine.strategy == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(backbone, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs are cast by autocast, not here: the noise level must reach its embedding in full precision.
    low = torch.bfloat16 if precision == "bf16" and world.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks(backbone):
        fully_shard(block, mp_policy=policy)
    fully_shard(backbone, mp_policy=policy)
    return backbone


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (by all ranks at once); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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
