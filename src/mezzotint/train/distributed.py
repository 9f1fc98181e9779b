"""How a network is wrapped for one process or many: PyTorch's own DDP and FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mezzotint.backbones.blocks import compile_blocks, repeated_blocks
from mezzotint.config import Engine
from mezzotint.core.distributed import World, sum_over_ranks


def wrap(backbone: nn.Module, engine: Engine, precision: str, world: World) -> nn.Module:
    """The backbone as the training step calls it: compiled per block, then copied (DDP) or sharded (FSDP2)."""
    if engine.compile:
        compile_blocks(backbone)
    if world.size == 1:
        return backbone
    if engine.strategy == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        # A depthwise weight (c, 1, 7, 7) is in both memory layouts at once; DDP copies its few numbers and warns of it.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(
            backbone, device_ids=ids, gradient_as_bucket_view=True
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs are cast by autocast, not here: the noise level must reach its embedding in full precision.
    low = torch.bfloat16 if precision == "bf16" and world.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in repeated_blocks(backbone):
        fully_shard(block, mp_policy=policy)
    fully_shard(backbone, mp_policy=policy)
    return backbone


def no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """A block whose backward pass leaves gradients with each rank, to be summed by a later one.

    Under DDP alone: FSDP2 would hold all gradients whole until then, which is what sharding is there to avoid.
    """
    return (
        wrapped.no_sync()
        if isinstance(wrapped, nn.parallel.DistributedDataParallel)
        else nullcontext()
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (by all ranks at once); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def group_norms(groups: Sequence[Sequence[Tensor]], world: World) -> Tensor:
    """Euclidean norm of each group of tensors, sharded ones included, (groups,) float64; all ranks call this at once.

    A group is sharded as a whole or not at all; an empty one has norm 0.
    """
    device = world.device
    squares = [
        torch.stack(torch._foreach_norm([local_tensor(t) for t in group])).double().square().sum()
        if group
        else torch.zeros((), dtype=torch.float64, device=device)
        for group in groups
    ]
    total = torch.stack(squares)
    if any(isinstance(t, DTensor) for group in groups for t in group):
        sum_over_ranks(total, world)
    return total.sqrt()
