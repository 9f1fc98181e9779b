"""DDP and FSDP2: wrapping a network, gradient norms and gathering of sharded tensors."""

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
    """Compile each block if asked, then copy (DDP) or shard (FSDP2) the backbone over ranks."""
    if engine.compile:
        compile_blocks(backbone)
    if world.size == 1:
        return backbone
    if engine.strategy == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        # A depthwise weight (c, 1, 7, 7) has both memory layouts; DDP copies it and warns.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return nn.parallel.DistributedDataParallel(
            backbone, device_ids=ids, gradient_as_bucket_view=True
        )
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Autocast casts the inputs: the noise level must reach its embedding in full precision.
    low = torch.bfloat16 if precision == "bf16" and world.device.type == "cuda" else None
    policy = MixedPrecisionPolicy(
        param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in repeated_blocks(backbone):
        fully_shard(block, mp_policy=policy)
    fully_shard(backbone, mp_policy=policy)
    return backbone


def no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward passes under DDP do not reduce gradients over ranks.

    FSDP2 reduces every time: without, it would hold the gradients of all weights unsharded.
    """
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.no_sync()
    return nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered, by all ranks together; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def group_norms(groups: Sequence[Sequence[Tensor]], world: World) -> Tensor:
    """Return the Euclidean norm of each group of tensors, (groups,) float64, on all ranks.

    All tensors of a group are sharded, or none is. An empty group has norm 0.
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
