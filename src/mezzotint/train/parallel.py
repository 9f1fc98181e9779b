"""DDP and FSDP2: wrapping a network, gradient norms and gathering of sharded tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mezzotint.backbones.blocks import compile_blocks, repeated_blocks
from mezzotint.backbones.precision import product_parameters
from mezzotint.config import Engine
from mezzotint.core.distributed import STEP_TIMEOUT, World, sum_over_ranks


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
    # It warns where a network returns a view: nothing here changes an output in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    shard(backbone, gathered_dtype(precision, world), device_mesh(engine, world))
    return backbone


def gathered_dtype(precision: str, world: World) -> torch.dtype | None:
    """Return the dtype in which FSDP2 gathers the weights of blocks; None for their own."""
    return torch.bfloat16 if precision == "bf16" and world.device.type == "cuda" else None


def shard(
    backbone: nn.Module, gathered: torch.dtype | None, mesh: DeviceMesh | None = None
) -> None:
    """Shard a backbone over the ranks of `mesh`: each block by itself, all else together.

    Args:
        gathered: dtype in which the weights of blocks are gathered; None for their own. All else
            is gathered in float32: time vectors, positions, tables, weights that autocast casts.
        mesh: of all ranks by default.
    """
    # Autocast casts the inputs: the noise level must reach its embedding in full precision.
    options: dict[str, Any] = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    low, full = MixedPrecisionPolicy(gathered, **options), MixedPrecisionPolicy(**options)
    for block in repeated_blocks(backbone):
        if product_parameters(block):  # SiD2's positions are no block
            fully_shard(block, mp_policy=low, mesh=mesh)
    fully_shard(backbone, mp_policy=full, mesh=mesh)


def check_sharding(engine: Engine, world_size: int, batch: int) -> None:
    """Raise ValueError where `engine` does not fit the ranks or their shares of the batch."""
    if engine.strategy == "fsdp" and engine.microbatch == 1 and batch % world_size:
        raise ValueError(
            f"engine.microbatch=1 and batch {batch} on {world_size} ranks: some would take one "
            "microbatch more than others, and ranks that share weights take the same number; set "
            f"engine.microbatch=2, or batch={-(-batch // world_size) * world_size}"
        )
    ranks = engine.shard_ranks
    if ranks is None:
        return
    if engine.strategy == "ddp":
        raise ValueError(
            f"engine.shard_ranks={ranks} and engine.strategy=ddp, which shards nothing; set "
            "engine.strategy=fsdp or leave shard_ranks out"
        )
    if world_size > 1 and world_size % ranks:
        even = [n for n in range(2, world_size + 1) if world_size % n == 0]
        raise ValueError(
            f"engine.shard_ranks={ranks} does not divide {world_size} ranks; "
            f"{', '.join(map(str, even))} do"
        )


def device_mesh(engine: Engine, world: World) -> DeviceMesh:
    """Return the ranks as FSDP2 sees them: in one line, or by copies and shards (HSDP)."""
    kind, shards = world.device.type, engine.shard_ranks or world.size
    if shards == world.size:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shards",))
    # Neighbours share a copy: torchrun numbers the ranks of a node one after another.
    shape = (world.size // shards, shards)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("copies", "shards"))
    for group in mesh.get_all_groups():
        # torch's own default is shorter, and there is no public way yet.
        torch.distributed.distributed_c10d._set_pg_timeout(STEP_TIMEOUT, group)
    return mesh


def no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward passes do not yet reduce gradients over all ranks.

    DDP reduces nothing. FSDP2 always reduces over the ranks of one copy: without, it would hold the
    gradients of all weights unsharded. With several copies (HSDP) it does not reduce over these.
    """
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.no_sync()
    if isinstance(wrapped, FSDPModule):
        return _without_all_reduce(wrapped)
    return nullcontext()


@contextmanager
def _without_all_reduce(wrapped: FSDPModule) -> Iterator[None]:
    wrapped.set_requires_all_reduce(False)
    try:
        yield
    finally:
        wrapped.set_requires_all_reduce(True)


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
    sharded = next((t for group in groups for t in group if isinstance(t, DTensor)), None)
    if sharded is not None:
        # Each shard is on one rank of every copy. Over all ranks, so that all get the same bits.
        shards = sharded.device_mesh.size(-1)
        sum_over_ranks(total, world).div_(world.size // shards)
    return total.sqrt()


def clear_gradients(wrapped: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> None:
    """Zero the gradients under DDP, whose buckets they lie in; free them otherwise.

    The next backward pass would allocate a freed gradient again, and copy it into its bucket.
    """
    keep = isinstance(wrapped, nn.parallel.DistributedDataParallel)
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=not keep)
