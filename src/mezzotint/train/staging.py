"""What a save copies to the memory of the host: each tensor once per job, and not once per rank.

A node has one host memory for all its ranks. Eight copies of the state of a large network do not
fit there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from mezzotint.core.distributed import World
from mezzotint.train.parallel import full_tensor

Path = tuple[str, ...]


def gather_to_host(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Copy tensors to the host of rank 0, one after the other; other ranks return nothing.

    Sharded tensors are gathered, by all ranks together: a device holds one of them whole at a time.
    """
    copies = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor)
        if world.is_rank0:
            copies[name] = whole.to("cpu", copy=True)
    return copies


def share_of_rank(state: Mapping[str, Any], world: World) -> dict[str, Any]:
    """Return the part of a checkpoint's state that this rank copies to its host and writes.

    A tensor that several ranks hold goes to one of them, a sharded tensor to one of the groups of
    ranks that hold it whole. Larger tensors first, each goes to who has least: our own rule, the
    same on every rank. All other values stay on every rank; torch writes one of each.

    Args:
        state: nested dictionaries, alike on all ranks.
    """
    loads: dict[int, list[int]] = {}
    own = set()
    leaves = sorted(_tensors(state, ()), key=lambda leaf: (-_bytes(leaf[1]), leaf[0]))
    for path, tensor in leaves:
        holder, holders = _holder(tensor, world)
        load = loads.setdefault(holders, [0] * holders)
        chosen = load.index(min(load))
        load[chosen] += _bytes(tensor)
        if chosen == holder:
            own.add(path)
    return _select(state, (), own)


def _tensors(value: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, Tensor]]:
    for key, inner in value.items():
        if isinstance(inner, Tensor):
            yield (*path, key), inner
        elif isinstance(inner, Mapping):
            yield from _tensors(inner, (*path, key))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # of the whole tensor, sharded or not


def _holder(tensor: Tensor, world: World) -> tuple[int, int]:
    """Return which of the holders of a tensor this rank belongs to, and their number."""
    if not isinstance(tensor, DTensor):
        return world.rank, world.size
    mesh, holder, holders = tensor.device_mesh, 0, 1
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            holder = holder * mesh.size(dim) + mesh.get_local_rank(dim)
            holders *= mesh.size(dim)
    return holder, holders


def _select(value: Mapping[str, Any], path: Path, own: set[Path]) -> dict[str, Any]:
    """Return nested dictionaries without the tensors that are not in `own`."""
    selected: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            selected[key] = _select(inner, (*path, key), own)
        elif not isinstance(inner, Tensor) or (*path, key) in own:
            selected[key] = inner
    return selected
