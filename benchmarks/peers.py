"""A training step and a forward pass next to diffusers' DiT of the same depth and width.

    OMP_NUM_THREADS=1 python benchmarks/peers.py --out benchmarks/results/peers-cpu.json

diffusers' DiTTransformer2DModel is what a user would take for a class-conditional latent
transformer. Ours are latent DiffiT of the same shape and DiMR cut to about the same GMAC. Loss,
backward pass and batch are the same. Times are also given per GMAC, since the networks differ.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import RESULTS, one_thread, write
from mezzotint.backbones.diffit import DiffiT, DiffiTConfig
from mezzotint.backbones.dimr import DiMR, published_config
from mezzotint.process.denoiser import Cond
from mezzotint.tools.benchmark import Work, measure_peak_bytes, time_interleaved


class Peer(nn.Module):
    """diffusers' DiT called as ours are."""

    def __init__(self, small: bool):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.net = DiTTransformer2DModel(
            num_attention_heads=2 if small else 16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=16 if small else 32,
            patch_size=2,
            num_embeds_ada_norm=1000,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_zero",
            attention_bias=True,
        )

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """The prediction, in a list."""
        return [self.net(z, timestep=noise.long(), class_labels=cond.label).sample]


def networks(small: bool) -> dict[str, nn.Module]:
    """Of about equal GMAC."""
    if small:
        return {
            "diffusers DiT": Peer(small),
            "mezzotint DiffiT": DiffiT(DiffiTConfig(size=16, width=144, depth=2, heads=2)),
        }
    return {
        "diffusers DiT": Peer(small),
        "mezzotint DiffiT": DiffiT(DiffiTConfig(depth=2)),
        "mezzotint DiMR": DiMR(published_config(32, (2, 1), 768, (1, 1), pixels=False)),
    }


def gmac(net: nn.Module, z: Tensor, noise: Tensor, cond: Cond) -> float:
    """Return the multiply-accumulates of one image's forward pass in 1e9, counted as it runs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(z[:1], noise[:1], Cond(label=cond.label[:1]))
    return counter.get_total_flops() / 2e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "peers-cpu.json")
    args = parser.parse_args()
    one_thread()
    device, size = args.device, 16 if args.small else 32
    z = torch.randn(args.batch, 4, size, size, device=device)
    noise = torch.linspace(0, 3, args.batch, device=device)
    cond = Cond(label=torch.arange(args.batch, device=device))
    nets = {name: net.to(device) for name, net in networks(args.small).items()}
    costs = {name: gmac(net, z, noise, cond) for name, net in nets.items()}

    def train(net: nn.Module, bf16: bool) -> Work:
        def step() -> None:
            net.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = sum(out.float().square().mean() for out in net(z, noise, cond))
            loss.backward()

        return step

    def forward(net: nn.Module, bf16: bool) -> Work:
        def call() -> None:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                net(z, noise, cond)

        return call

    rows: list[dict[str, Any]] = []
    for mode, make in (("train", train), ("forward", forward)):
        for bf16 in (False, True):
            seconds = time_interleaved(
                {n: make(net, bf16) for n, net in nets.items()}, device, args.rounds
            )
            for name in nets:
                rows.append(
                    {
                        "network": name,
                        "mode": mode,
                        "precision": "bf16" if bf16 else "float32",
                        "gmac": costs[name],
                        "seconds": seconds[name],
                        "seconds_per_gmac": seconds[name] / costs[name] / args.batch,
                    }
                )
                print(rows[-1], flush=True)
    peaks = {}
    for name, net in nets.items():
        net.zero_grad(set_to_none=True)
        peaks[name] = measure_peak_bytes(train(net, False), device)
        net.zero_grad(set_to_none=True)
    write(args.out, device, rows=rows, peak_bytes_float32=peaks)


if __name__ == "__main__":
    main()
