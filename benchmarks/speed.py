"""Training steps and sampling calls against plain twins, in one process, run in turn.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --out benchmarks/results/speed-cpu.json

Networks have the published widths at reduced depth. A training step is forward, loss and backward;
the optimiser and the weight average have a row of their own. A sampling call is one guided
evaluation: two passes for the twins, one doubled batch for ours. `--memory` gives the peaks of
training steps at published sizes. `--switches` measures every choice alone, by replacing it with
the plain form.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import plain.forms as forms
from common import RESULTS, one_thread, write
from mezzotint.backbones import dimr, registry
from mezzotint.backbones.blocks import compile_blocks, repeated_blocks
from mezzotint.backbones.diffit import DiffiTConfig
from mezzotint.backbones.dimr import published_config
from mezzotint.backbones.uvit import UViTConfig
from mezzotint.convert.official.load import load_official
from mezzotint.core.registry import Spec, build
from mezzotint.models import ModelInfo, build_model, preset_info
from mezzotint.process import guidance, objectives
from mezzotint.process.denoiser import Cond, Model
from mezzotint.tools.benchmark import (
    Work,
    measure_matmul_flops,
    measure_peak_bytes,
    time_interleaved,
)
from mezzotint.tools.memory import StepMemoryEstimator
from plain.diffit import PlainDiffiT
from plain.dimr import PlainDiMR
from plain.uvit import PlainUViT


class Twin(nn.Module):
    """A plain network called as ours are."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.plain = plain

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """The twin's outputs as a list."""
        out = self.plain(z, noise, cond.label)
        return out if isinstance(out, list) else [out]


@dataclass
class Pair:
    """Ours and its twin with the same weights, and what they are trained on."""

    ours: Model
    plain: Model
    objective: Any
    x: Tensor
    eps: Tensor
    logsnr: Tensor
    cond: Cond

    def train(self, which: str, bf16: bool) -> Work:
        """Forward, loss and backward of one batch."""
        model: Model = getattr(self, which)
        device = self.x.device.type

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = self.objective(model, self.x, self.eps, self.logsnr, self.cond).mean()
            loss.backward()

        return step

    def sample(self, which: str, bf16: bool) -> Work:
        """One guided evaluation of the batch."""
        model: Model = getattr(self, which)
        device, classes = self.x.device.type, model.info.config.num_classes
        logsnr = self.logsnr.cpu().double()
        guided = guidance.classifier_free(model, guidance.null_label(classes), guidance.dit_s(1.5))
        null = Cond(label=torch.full_like(self.cond.label, classes))

        def doubled() -> None:
            guided(self.x, logsnr, self.cond)

        def twice() -> None:
            c, u = model(self.x, self.logsnr, self.cond), model(self.x, self.logsnr, null)
            (u.x + 1.5 * (c.x - u.x), u.eps + 1.5 * (c.eps - u.eps))

        def call() -> None:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                doubled() if which == "ours" else twice()

        return call


PLAIN = {"dimr": PlainDiMR, "diffit": PlainDiffiT, "uvit": PlainUViT}
OBJECTIVE = {"dimr": "pyramid", "diffit": "hybrid", "uvit": "eps_mse"}


def make(family: str, config: Any, batch: int, device: str) -> Pair:
    """Both networks on `device`, weights perturbed so that none is zero."""
    torch.manual_seed(0)
    entry = registry[family]
    plain = PLAIN[family](config)
    for p in plain.parameters():
        p.data += 0.02 * torch.randn_like(p)
    if family == "uvit":
        ours = build_model(
            ModelInfo(backbone=family, config=config, schedule=entry.schedule(config))
        )
        ours.backbone.load_state_dict(plain.state_dict())
    else:
        hints = {"heads": config.heads, "time": config.time} if family == "dimr" else {}
        ours = load_official(plain.state_dict(), family=family, **hints)
    twin = Model(Twin(plain), ours.parameterisation, ours.info)
    shape = (batch, config.channels, config.size, config.size)
    label = torch.arange(batch, device=device) % config.num_classes
    return Pair(
        ours=ours.to(device),
        plain=twin.to(device),
        objective=build(objectives.registry, Spec(OBJECTIVE[family])),
        x=torch.randn(shape, device=device).clamp(-1, 1),
        eps=torch.randn(shape, device=device),
        logsnr=torch.linspace(-4, 4, batch, device=device),
        cond=Cond(label=label),
    )


def networks(small: bool) -> dict[str, tuple[str, Any, int]]:
    """name -> (family, config, batch)."""
    if small:
        return {
            "dimr-2r": ("dimr", published_config(16, (2, 1), 32, (3, 3), pixels=False), 2),
            "diffit": ("diffit", DiffiTConfig(size=8, width=64, depth=2, heads=2), 2),
            "uvit": (
                "uvit",
                UViTConfig(
                    size=16,
                    width=8,
                    emb_dim=32,
                    multipliers=(1, 4),
                    blocks=(1,),
                    depth=1,
                    dropout=0.0,
                ),
                2,
            ),
        }
    wide = UViTConfig(
        size=64, width=64, emb_dim=256, multipliers=(1, 2, 12), blocks=(2, 2), depth=4, dropout=0.0
    )
    return {
        "dimr-2r": ("dimr", published_config(32, (2, 1), 960, (3, 3), pixels=False), 2),
        "dimr-3r": ("dimr", published_config(64, (4, 2, 1), 768, (3, 3, 3), pixels=True), 1),
        "diffit": ("diffit", DiffiTConfig(depth=2), 2),
        "uvit": ("uvit", wide, 2),
    }


ARITHMETIC = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution",
              "aten::convolution_backward", "aten::_scaled_dot_product_flash_attention_for_cpu",
              "aten::_scaled_dot_product_flash_attention_for_cpu_backward")  # fmt: skip


def arithmetic_seconds(work: Work) -> float:
    """Return the seconds of one call in products, convolutions and attention."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return sum(e.self_cpu_time_total for e in profile.key_averages() if e.key in ARITHMETIC) / 1e6


def compare(name: str, pair: Pair, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of every contender and ratios to the float32 twin."""
    kinds = [("plain", False), ("ours", False), ("plain", True), ("ours", True)]
    row: dict[str, Any] = {"network": name, "batch": len(pair.x)}
    for mode in ("train", "sample"):
        make_work: Callable[[str, bool], Work] = getattr(pair, mode)
        works = {
            f"{which} {'bf16' if bf16 else 'float32'}": make_work(which, bf16)
            for which, bf16 in kinds
        }
        seconds = time_interleaved(works, device, rounds)
        row[mode] = {
            "seconds": seconds,
            "float32": seconds["plain float32"] / seconds["ours float32"],
            "bf16 against float32 twin": seconds["plain float32"] / seconds["ours bf16"],
            "bf16 against bf16 twin": seconds["plain bf16"] / seconds["ours bf16"],
        }
        if device == "cpu":  # the ratios if everything else cost nothing
            row[mode]["limits"] = {
                precision: seconds["plain float32"] / arithmetic_seconds(works[f"ours {precision}"])
                for precision in ("float32", "bf16")
            }
    works = {
        label: with_checkpointing(pair, on)
        for label, on in (("kept", "none"), ("selective", "selective"), ("checkpointed", "full"))
    }
    seconds = time_interleaved({**works, "plain": pair.train("plain", False)}, device, rounds)
    pair.ours.backbone.checkpointing = "none"
    row["train, checkpointing"] = seconds["plain"] / seconds["checkpointed"]
    row["train, selective checkpointing"] = seconds["plain"] / seconds["selective"]
    return row


class Labelled(Twin):
    """A twin that takes the first label where none is given, as the player of steps gives none."""

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """The twin's outputs as a list."""
        return super().forward(z, noise, Cond(label=torch.zeros(len(z), dtype=torch.long)))


def memory(preset: str, batch: int, **overrides: Any) -> list[dict[str, Any]]:
    """Estimate the peaks of training steps at published size, with gradients, without weights."""
    with torch.device("meta"):
        ours = build_model(preset_info(preset, **overrides))
        family = ours.info.backbone
        plain = Model(Labelled(PLAIN[family](ours.info.config)), ours.parameterisation, ours.info)
    objective = build(objectives.registry, Spec(OBJECTIVE[family]))
    rows = []
    for bf16 in (False, True):
        peaks = {}
        for name, model, checkpointing in (
            ("plain", plain, "none"),
            ("ours", ours, "none"),
            ("ours, selective checkpointing", ours, "selective"),
            ("ours, checkpointing", ours, "full"),
        ):
            # What has no values has no branch to take: the twin's shortcut for equal noise levels.
            with patch.object(torch, "all", lambda _: False):
                player = StepMemoryEstimator(
                    model,
                    objective,
                    weights=torch.float32,
                    bf16=bf16,
                    checkpointing=checkpointing,
                    gradients_leave=False,
                )
                peaks[name] = player.peak(batch)
        ratio = {name: peak / peaks["plain"] for name, peak in peaks.items()}
        precision = "bf16" if bf16 else "float32"
        rows.append(
            {
                "preset": preset,
                "batch": batch,
                "precision": precision,
                "peak_bytes": peaks,
                "ratio": ratio,
            }
        )
        print(rows[-1], flush=True)
    return rows


def with_checkpointing(pair: Pair, checkpointing: Any) -> Work:
    """A float32 training step of ours."""
    step = pair.train("ours", False)

    def work() -> None:
        pair.ours.backbone.checkpointing = checkpointing
        step()

    return work


@contextmanager
def compiled(model: Model) -> Iterator[None]:
    """Every repeated block through torch.compile."""
    compile_blocks(model.backbone)
    yield
    for block in repeated_blocks(model.backbone):
        block._compiled_call_impl = None


def switched(work: Work, swap: forms.Swap) -> Work:
    """`work` with a plain form in place."""

    def other() -> None:
        with swap():
            work()

    return other


def switches(rounds: int, device: str, small: bool, compile: bool) -> list[dict[str, Any]]:
    """Measure each choice alone: the plain form over ours, in seconds and in peak memory."""
    chosen = networks(small)
    if (
        not small
    ):  # half the width: the choices are elementwise, and matrix products would hide them
        chosen["dimr-2r"] = (
            "dimr",
            published_config(64, (4, 2, 1), 384, (3, 3, 3), pixels=True),
            1,
        )
    pairs = {
        family: make(*chosen[name], device)
        for family, name in (("dimr", "dimr-2r"), ("diffit", "diffit"))
    }
    rows = []
    for family, name, swap in forms.SWITCHES:
        pair, row = pairs[family], {"family": family, "switch": name}
        for bf16 in (False, True):
            for mode in ("train", "sample"):
                work = getattr(pair, mode)("ours", bf16)
                seconds = time_interleaved(
                    {"ours": work, "other": switched(work, swap)}, device, rounds
                )
                row[f"{mode} {'bf16' if bf16 else 'float32'}"] = seconds["other"] / seconds["ours"]
            step = pair.train("ours", bf16)
            peaks = []
            for work in (step, switched(step, swap)):
                pair.ours.zero_grad(set_to_none=True)
                peaks.append(measure_peak_bytes(work, device))
            row[f"peak {'bf16' if bf16 else 'float32'}"] = peaks[1] / peaks[0]
        rows.append(row)
        print(row, flush=True)
    if compile:
        for family, pair in pairs.items():
            step = pair.train("ours", False)
            with ExitStack() as stack:
                eager = time_interleaved({"step": step}, device, rounds)["step"]
                stack.enter_context(compiled(pair.ours))
                fast = time_interleaved({"step": step}, device, rounds)["step"]
            rows.append(
                {
                    "family": family,
                    "switch": "compiled, block by block",
                    "train float32": fast / eager,
                }
            )
            print(rows[-1], flush=True)
    return rows


def updates(rounds: int, device: str, small: bool) -> dict[str, float]:
    """Time AdamW and the weight average: fused and by list, against torch's default and a loop."""
    _, config, _ = networks(small)["dimr-2r"]
    parameters = list(dimr.DiMR(config).to(device).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p)
    averages = [p.detach().clone() for p in parameters]
    plain = torch.optim.AdamW(parameters, lr=1e-6, foreach=False)
    fused = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def loop() -> None:
        plain.step()
        with torch.no_grad():
            for average, p in zip(averages, parameters, strict=True):
                average.copy_(average * 0.999 + p * 0.001)

    def listed() -> None:
        fused.step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.001)

    return time_interleaved({"plain": loop, "ours": listed}, device, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--small", action="store_true", help="tiny networks, to see that everything runs"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="*")
    parser.add_argument(
        "--batch", type=int, help="images per step; by default what a CPU does in a second or two"
    )
    parser.add_argument(
        "--switches", action="store_true", help="each choice alone, instead of the comparison"
    )
    parser.add_argument(
        "--memory", action="store_true", help="peaks at published sizes, instead of the comparison"
    )
    parser.add_argument(
        "--compile", action="store_true", help="with --switches: torch.compile of the blocks too"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "speed-cpu.json")
    args = parser.parse_args()
    one_thread()
    ceilings = {p: measure_matmul_flops(args.device, p) for p in ("float32", "bf16")}
    if args.switches:
        rows = switches(args.rounds, args.device, args.small, args.compile)
        write(args.out, args.device, ceiling_flops=ceilings, rows=rows)
        return
    if args.memory:
        chosen = {"dimr-xl-2r-256": 32, "dimr-m-3r-64": 32, "diffit-256": 32, "uvit-128": 32}
        small = {"dimr-tiny": 32, "diffit-latent-tiny": 32}
        rows = [
            row
            for preset, batch in (small if args.small else chosen).items()
            for row in memory(preset, batch)
        ]
        write(args.out, args.device, rows=rows)
        return
    rows = []
    for name, (family, config, batch) in networks(args.small).items():
        if args.networks and name not in args.networks:
            continue
        rows.append(
            compare(
                name,
                make(family, config, args.batch or batch, args.device),
                args.rounds,
                args.device,
            )
        )
        print(rows[-1], flush=True)
        write(args.out, args.device, ceiling_flops=ceilings, rows=rows, updates=None)
    write(
        args.out,
        args.device,
        ceiling_flops=ceilings,
        rows=rows,
        updates=updates(args.rounds, args.device, args.small),
    )


if __name__ == "__main__":
    main()
