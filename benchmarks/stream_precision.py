"""What a residual stream in bfloat16 costs in accuracy, by family.

    python benchmarks/stream_precision.py

Networks of the published depth and an eighth of the published width, with random weights, are run
under bfloat16 autocast on the CPU: once with the stream between the blocks rounded to bfloat16,
once with it in float32. Printed are relative norms of the errors of the output and of all gradients
together, against float64, averaged over draws of weights, inputs and targets.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.backbones import Backbone, Preset, presets, registry
from mezzotint.backbones.blocks import repeated_blocks
from mezzotint.process.denoiser import Cond

NARROW = 8  # factor on all widths

NETWORKS: dict[str, dict[str, Any]] = {
    "dimr-xl-2r-256": {"dims": (120, 60), "hidden_dims": (240, 120), "heads": 2, "size": 16},
    "diffit-256": {"width": 144, "heads": 2, "size": 16},
    "jit-h-256": {"width": 160, "heads": 2, "bottleneck": 32, "size": 128, "dropout": 0.0},
    "uvit-256": {"width": 16, "emb_dim": 128, "size": 128, "dropout": 0.0},
    "sid2-256": {"width": 16, "emb_dim": 128, "size": 128, "dropout": 0.0},
    "unet-128": {"width": 16, "emb_dim": 128, "size": 64, "dropout": 0.0},
}


def build(name: str, seed: int) -> Backbone:
    """Return a narrow network with random weights; those that start at zero are drawn too."""
    family, preset = presets()[name]
    assert isinstance(preset, Preset)
    torch.manual_seed(seed)
    network = registry[family].module(replace(preset.config, **NETWORKS[name]))
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=weight[0].numel() ** -0.5)
    return network


def run(network: Backbone, z: Tensor, noise: Tensor, label: Tensor, target: Tensor, low: bool):
    """Return the output and the gradients of a mean square error, both in float64."""
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = network(z, noise, Cond(label=label))[-1]
    (out.to(target.dtype) - target).square().mean().backward()
    grads = [p.grad.double().flatten() for p in network.parameters() if p.grad is not None]
    return out.detach().double(), torch.cat(grads)


def round_stream(network: Backbone, dtype: torch.dtype) -> list[Any]:
    """Give every repeated block its first argument in `dtype`, and return what removes that."""

    def cast(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].to(dtype), *args[1:])

    return [block.register_forward_pre_hook(cast) for block in repeated_blocks(network)]


def measure(name: str, seed: int) -> dict[str, tuple[float, float]]:
    """Return the errors of output and gradient by the dtype of the stream."""
    network = build(name, seed)
    c = network.config
    z = torch.randn(2, c.channels, c.size, c.size)
    noise, label = torch.tensor([0.3, 0.6]), torch.tensor([1, 2])
    target = torch.randn(2, network(z, noise, Cond(label=label))[-1].shape[1], c.size, c.size)
    exact = build(name, seed).double()
    truth = run(exact, z.double(), noise.double(), label, target.double(), low=False)
    errors = {}
    for key, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        handles = round_stream(network, dtype)
        found = run(network, z, noise, label, target, low=True)
        for handle in handles:
            handle.remove()
        errors[key] = tuple(
            float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)
        )
    return errors


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    args = parser.parse_args()
    print("| network, 1/8 of the width | stream | output, % | gradient, % |\n|---|---|---:|---:|")
    for name in args.networks:
        draws = [measure(name, seed) for seed in range(args.draws)]
        for key in ("float32", "bfloat16"):
            out, grad = (100 * sum(d[key][i] for d in draws) / len(draws) for i in (0, 1))
            print(f"| {name} | {key} | {out:.2f} | {grad:.2f} |", flush=True)


if __name__ == "__main__":
    main()
