"""What a preset is and costs: parameters, multiply-accumulates and activation memory, beside what its paper claims.

Everything is counted on the meta device, so nothing is allocated: one forward pass of one image (or latent) at the
native size, by torch's own flop counter, attention products included. The papers' "FLOPs" are multiply-accumulates;
so is `gmac`, in units of 1e9. Work that the published network does and that changes nothing, which our forward pass
leaves out, is counted too (a backbone says how much in `skipped_macs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import mezzotint.backbones as backbones
from mezzotint.core.registry import suggest
from mezzotint.process.denoiser import Cond

GIGA = 1e9


def table() -> list[dict[str, Any]]:
    """One JSON-ready row per preset; see `describe`. A second or so per large preset."""
    return [describe(name) for name in backbones.presets()]


def describe(preset: str) -> dict[str, Any]:
    """A preset's counts and claims.

    Returns:
        name, backbone; params (all, frozen ones included), gmac (per forward pass of one input), gmac_attention (the
        part of the two products of attention), gmac_skipped (the part without effect that we do not compute),
        input_shape [channels, height, width], codec, paper; params_claimed, gmac_claimed, fid_claimed as the paper
        prints them, or None, protocol behind the FID; note: why counts and claims differ.

    Errors: ValueError for an unknown preset, listing near names.
    """
    backbone, entry = find(preset)
    net, z, noise = on_meta(preset)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(z, noise, Cond())
    by_op = {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    skipped = getattr(net, "skipped_macs", 0)
    return {
        "name": preset,
        "backbone": backbone,
        "params": sum(p.numel() for p in net.parameters()),
        "gmac": (sum(by_op.values()) + skipped) / GIGA,
        "gmac_attention": sum(n for op, n in by_op.items() if "bmm" in op or "attention" in op)
        / GIGA,
        "gmac_skipped": skipped / GIGA,
        "input_shape": list(z.shape[1:]),
        "codec": entry.codec,
        "paper": entry.paper,
        "params_claimed": entry.params,
        "gmac_claimed": entry.gmac,
        "fid_claimed": entry.fid,
        "protocol": entry.protocol,
        "note": entry.note,
    }


def find(preset: str) -> tuple[str, backbones.Preset]:
    """(backbone, Preset) of a name, or a ValueError that lists near names."""
    known = backbones.presets()
    if preset not in known:
        raise ValueError(f"unknown preset {preset!r}; {suggest(preset, known)}")
    return known[preset]


def on_meta(preset: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The backbone, one input of native size and one noise level, all without storage."""
    backbone, entry = find(preset)
    config = entry.config
    with torch.device("meta"):
        net = backbones.registry[backbone].module(config)
        return net, torch.empty(1, config.channels, config.size, config.size), torch.empty(1)


def layers(preset: str) -> list[dict[str, Any]]:
    """The layers of a preset in order of execution, equal ones at one resolution together, JSON-ready.

    Returns:
        rows of name ("blocks.0...27"), module (class), count, resolution ("16x16", "" without one), output (shape of
        each without the batch), params, gmac and activation_bytes of all `count` together. activation_bytes is what
        autograd keeps for the backward pass of one image in float32, without checkpointing and with attention
        matrices (a fused kernel keeps none), each tensor once, where it is first kept. The last row, named
        "(itself)", is what the network does and owns outside its layers.

    Errors: ValueError for an unknown preset, listing near names.
    """
    net, z, noise = on_meta(preset)
    parts = dict(groups(net))
    trace = Trace(net, parts)
    with trace, FlopCounterMode(display=False) as counter:
        net(z, noise, Cond())
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    order = [*trace.outputs, *(name for name in parts if name not in trace.outputs)]
    macs = [flops.get(f"{type(net).__name__}.{name}", 0) // 2 for name in order]
    rows = [
        row(name, parts[name], n, trace, z.shape[-1]) for name, n in zip(order, macs, strict=True)
    ]
    itself = {
        "name": "(itself)",
        "module": "",
        "count": 1,
        "resolution": "",
        "output": [],
        "params": sum(p.numel() for p in net.parameters()) - sum(r["params"] for r in rows),
        "gmac": (flops["Global"] // 2 - sum(macs) + getattr(net, "skipped_macs", 0)) / GIGA,
        "activation_bytes": trace.kept.get("", 0),
    }
    return [*merged(rows), itself]


def groups(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers worth a row: descends into lists, and into modules made of lists (a branch, a stage)."""
    for name, child in module.named_children():
        lists = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if lists or any(isinstance(c, (nn.ModuleList, nn.ModuleDict)) for c in child.children()):
            yield from groups(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class Trace:
    """Records, while a network runs, each layer's output shape and the bytes that autograd keeps while in it."""

    def __init__(self, net: nn.Module, parts: dict[str, nn.Module]):
        self.parts = parts
        self.outputs: dict[str, tuple[int, ...]] = {}  # in order of execution
        self.kept: dict[str, int] = {}
        # Storages by their address, held so that no address is used twice; weights are none of the activations.
        storages = [p.untyped_storage() for p in net.parameters()]
        self.seen: dict[int, Any] = {storage._cdata: storage for storage in storages}
        self.current = ""

    def __enter__(self) -> Trace:
        self.handles = [h for name, part in self.parts.items() for h in self.hooks(name, part)]
        self.saving = saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.saving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.saving.__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def hooks(self, name: str, part: nn.Module) -> list[Any]:
        """Hooks that say when `part` runs and what it gives."""

        def before(*_: Any) -> None:
            self.current = name

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.current = ""
            first = (
                output
                if isinstance(output, Tensor)
                else next((t for t in output if isinstance(t, Tensor)), None)
            )
            self.outputs[name] = tuple(first.shape[1:]) if first is not None else ()

        return [part.register_forward_pre_hook(before), part.register_forward_hook(after)]

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a tensor saved for the backward pass, unless it is a weight or was counted before."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.kept[self.current] = self.kept.get(self.current, 0) + storage.nbytes()
        return tensor


def row(name: str, part: nn.Module, macs: int, trace: Trace, side: int) -> dict[str, Any]:
    """One layer's row; `side`: of the network's input."""
    output = trace.outputs.get(name, ())
    return {
        "name": name,
        "module": type(part).__name__,
        "count": 1,
        "resolution": resolution(output, side),
        "output": list(output),
        "params": sum(p.numel() for p in part.parameters()),
        "gmac": macs / GIGA,
        "activation_bytes": trace.kept.get(name, 0),
    }


def resolution(shape: tuple[int, ...], side: int) -> str:
    """Height x width of an output without its batch: (c, h, w), (h, w, c) or tokens (..., n, c); "" for vectors."""
    if len(shape) == 3 and shape[1] == shape[2] <= side:
        return f"{shape[1]}x{shape[2]}"
    tokens = math.prod(shape[:-1])
    if len(shape) < 2:
        return ""
    root = math.isqrt(tokens)
    return f"{root}x{root}" if root**2 == tokens else f"{tokens} tokens"


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers of one class, output and size that run at one resolution without leaving it, as one row."""
    result = []
    for _, run in groupby(rows, key=lambda r: r["resolution"]):
        alike: dict[Any, list[dict[str, Any]]] = {}
        for r in run:
            alike.setdefault((r["module"], tuple(r["output"]), r["params"]), []).append(r)
        for first, *more in alike.values():
            total = {
                k: first[k] + sum(r[k] for r in more)
                for k in ("count", "params", "gmac", "activation_bytes")
            }
            name = f"{first['name']}...{more[-1]['name']}" if more else first["name"]
            result.append({**first, **total, "name": name})
    return result


def si(number: float) -> str:
    """Three decimals in millions or billions, as papers print parameters."""
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.3f} M"


def render_table(rows: list[dict[str, Any]]) -> RenderableType:
    """`table()` for a terminal: counts, claims, and below why they differ."""
    grid = Table(title="presets: counted, and as the paper prints it", title_justify="left")
    for column in ("preset", "input"):
        grid.add_column(column, no_wrap=True)
    for column in ("params", "claimed", "GMAC", "claimed", "FID claimed"):
        grid.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        shape = "x".join(map(str, r["input_shape"]))
        claims = [r[key] or "" for key in ("params_claimed", "gmac_claimed", "fid_claimed")]
        grid.add_row(r["name"], shape, si(r["params"]), claims[0], f"{r['gmac']:.3f}", *claims[1:])
    notes = [f"{r['name']}: {r['note']}" for r in rows if r["note"]]
    return Group(
        grid,
        *notes,
        "GMAC: 1e9 multiply-accumulates of one forward pass of one input, attention included.",
    )


def render_layers(preset: str, rows: list[dict[str, Any]]) -> RenderableType:
    """`layers(preset)` for a terminal, one section per resolution."""
    grid = Table(
        title=f"{preset}: layers in order of execution", title_justify="left", show_footer=True
    )
    total = {key: sum(r[key] for r in rows) for key in ("params", "gmac", "activation_bytes")}
    grid.add_column("resolution", "total", no_wrap=True)
    grid.add_column("layer")
    grid.add_column("output", no_wrap=True)
    grid.add_column("params", si(total["params"]), justify="right", no_wrap=True)
    grid.add_column("GMAC", f"{total['gmac']:.3f}", justify="right", no_wrap=True)
    grid.add_column(
        "activations", f"{total['activation_bytes'] / 2**20:.1f} MiB", justify="right", no_wrap=True
    )
    for _, run in groupby(rows, key=lambda r: r["resolution"]):
        for r in run:
            layer = f"{r['count']} x {r['module']}  {r['name']}" if r["module"] else r["name"]
            memory = f"{r['activation_bytes'] / 2**20:.1f} MiB"
            shape = "x".join(map(str, r["output"]))
            grid.add_row(r["resolution"], layer, shape, si(r["params"]), f"{r['gmac']:.3f}", memory)
        grid.add_section()
    return Group(
        grid,
        "activations: kept for the backward pass of one image in float32, attention matrices included",
    )
