"""Count parameters, multiply-accumulates and activation memory of presets on the meta device.

`mezzotint.tools.summary` describes the values, and ships those of every preset.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mezzotint import backbones
from mezzotint.backbones.flops import GIGA, count_macs
from mezzotint.models import create_model
from mezzotint.process.denoiser import Cond


def meta_backbone(preset: str) -> backbones.Backbone:
    """Build a preset's network without storage; an unknown preset is a ValueError."""
    with torch.device("meta"):
        return backbones.get_backbone(create_model(preset))


def count(preset: str) -> dict[str, Any]:
    """Count a preset: its row, and its layers under "layers"."""
    return {**count_preset(preset), "layers": count_layers(preset)}


def count_preset(preset: str) -> dict[str, Any]:
    """Count a preset and add what its paper claims; see `mezzotint.tools.summary.read_summary`."""
    net = meta_backbone(preset)
    family, entry = backbones.presets()[preset]
    macs = count_macs(net)
    return {
        "name": preset,
        "backbone": family,
        "params": sum(p.numel() for p in net.parameters()),
        "gmac": macs.published / GIGA,
        "gmac_attention": macs.attention / GIGA,
        "gmac_skipped": macs.skipped / GIGA,
        "input_shape": [net.config.channels, *backbones.native_size(net.config)],
        "codec": entry.codec,
        "paper": entry.paper,
        "params_claimed": entry.params,
        "gmac_claimed": entry.gmac,
        "fid_claimed": entry.fid,
        "protocol": entry.protocol,
        "note": entry.note,
    }


def count_layers(preset: str) -> list[dict[str, Any]]:
    """Count a preset layer by layer; see `mezzotint.tools.summary.read_layers`."""
    net = meta_backbone(preset)
    size = backbones.native_size(net.config)
    with torch.device("meta"):
        z, noise = torch.empty(1, net.config.channels, *size), torch.empty(1)
    layers = dict(find_layers(net))
    trace = LayerTrace(net, layers)
    with trace, FlopCounterMode(display=False) as counter:
        net(z, noise, Cond())
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    order = [*trace.outputs, *(name for name in layers if name not in trace.outputs)]
    macs = [flops.get(f"{type(net).__name__}.{name}", 0) // 2 for name in order]
    rows = [
        _layer_row(name, layers[name], n, trace, size) for name, n in zip(order, macs, strict=True)
    ]
    remainder = {
        "name": "(itself)",
        "module": "",
        "count": 1,
        "resolution": "",
        "output": [],
        "params": sum(p.numel() for p in net.parameters()) - sum(r["params"] for r in rows),
        "gmac": (flops["Global"] // 2 - sum(macs) + net.skipped_macs) / GIGA,
        "activation_bytes": trace.saved_bytes.get("", 0),
    }
    return [*_merge_equal_layers(rows), remainder]


def find_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the layers worth a row.

    Descends into lists, and into modules made of lists (a branch, a stage).
    """
    for name, child in module.named_children():
        lists = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if lists or any(isinstance(c, (nn.ModuleList, nn.ModuleDict)) for c in child.children()):
            yield from find_layers(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


class LayerTrace:
    """Record each layer's output shape and the bytes that autograd saves in it.

    outputs: name -> shape without the batch, in order of execution.
    saved_bytes: name -> bytes; "" is outside all layers.
    """

    def __init__(self, net: nn.Module, layers: dict[str, nn.Module]):
        self.layers = layers
        self.outputs: dict[str, tuple[int, ...]] = {}
        self.saved_bytes: dict[str, int] = {}
        # Storages are known by address and held, so that no address is used twice. Weights are
        # among them from the start: they are no activations.
        storages = [p.untyped_storage() for p in net.parameters()]
        self.seen: dict[int, Any] = {storage._cdata: storage for storage in storages}
        self.current = ""

    def __enter__(self) -> LayerTrace:
        self.handles = [h for name, layer in self.layers.items() for h in self._hook(name, layer)]
        self.saving = saved_tensors_hooks(self._count_saved, lambda tensor: tensor)
        self.saving.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.saving.__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str, layer: nn.Module) -> list[Any]:
        """Register hooks that note when `layer` runs and the shape of its output."""

        def before(*_: Any) -> None:
            self.current = name

        def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.current = ""
            outputs = [output] if isinstance(output, Tensor) else output
            first = next((t for t in outputs if isinstance(t, Tensor)), None)
            self.outputs[name] = tuple(first.shape[1:]) if first is not None else ()

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    def _count_saved(self, tensor: Tensor) -> Tensor:
        """Count a tensor saved for the backward pass, unless it is a weight or already counted."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.saved_bytes[self.current] = (
                self.saved_bytes.get(self.current, 0) + storage.nbytes()
            )
        return tensor


def _layer_row(
    name: str, layer: nn.Module, macs: int, trace: LayerTrace, size: tuple[int, int]
) -> dict[str, Any]:
    output = trace.outputs.get(name, ())
    return {
        "name": name,
        "module": type(layer).__name__,
        "count": 1,
        "resolution": format_resolution(output, size),
        "output": list(output),
        "params": sum(p.numel() for p in layer.parameters()),
        "gmac": macs / GIGA,
        "activation_bytes": trace.saved_bytes.get(name, 0),
    }


def format_resolution(shape: tuple[int, ...], size: tuple[int, int]) -> str:
    """Return "HEIGHTxWIDTH" of an output without its batch, "N tokens", or "" for a vector.

    Args:
        shape: (c, h, w), (h, w, c) or tokens (..., n, c).
        size: height and width of the network's input, the most that an output has.
    """
    height, width = size
    if len(shape) == 3 and shape[1] <= height and shape[1] * width == shape[2] * height:
        return f"{shape[1]}x{shape[2]}"
    if len(shape) < 2:
        return ""
    tokens = math.prod(shape[:-1])
    root = math.isqrt(tokens)
    return f"{root}x{root}" if root**2 == tokens else f"{tokens} tokens"


def _merge_equal_layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge layers of one class, output and size that run one after another at one resolution."""
    merged = []
    for _, run in groupby(rows, key=lambda r: r["resolution"]):
        equal: dict[Any, list[dict[str, Any]]] = {}
        for r in run:
            equal.setdefault((r["module"], tuple(r["output"]), r["params"]), []).append(r)
        for first, *rest in equal.values():
            sums = {
                k: first[k] + sum(r[k] for r in rest)
                for k in ("count", "params", "gmac", "activation_bytes")
            }
            name = f"{first['name']}...{rest[-1]['name']}" if rest else first["name"]
            merged.append({**first, **sums, "name": name})
    return merged
