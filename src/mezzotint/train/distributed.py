"""How a network is wrapped for one process or many: PyTorch's own DDP and FSDP2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mezzotint.config import Engine
from mezzotint.ranks import World


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
