"""The parts of gpu.sh: correctness of every fast path, single kernels, the large presets. Each writes one JSON file.

    python benchmarks/gpu.py checks|kernels|presets --device cuda --out DIR

With `--device cpu --small` everything runs in a minute or two without a GPU, except CUDA graphs and the count of host
synchronisations, which that device does not have.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import plain.forms as forms_of
from common import write
from mezzotint.backbones.blocks import compile_blocks
from mezzotint.bench import Settings, bench, interleaved, matmul_ceiling
from mezzotint.graphs import Graphed
from mezzotint.kernels import depthwise
from mezzotint.process import guidance
from mezzotint.process.samplers import registry as samplers
from mezzotint.recipes import recipe_for
from speed import Pair, make, networks

Row = dict[str, Any]


def difference(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over norm of the second, in float64; NaN where anything is."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def gradient(pair: Pair, which: str, bf16: bool) -> Tensor:
    """All gradients of one training step as one vector, in the order of our parameters."""
    pair.train(which, bf16)()
    model = getattr(pair, which)
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def outputs(pair: Pair, which: str, bf16: bool) -> Tensor:
    """The finest prediction."""
    with torch.no_grad(), torch.autocast(pair.x.device.type, torch.bfloat16, enabled=bf16):
        return getattr(pair, which).raw(pair.x, pair.logsnr, pair.cond)[-1].float()


def checks(device: str, small: bool) -> list[Row]:
    """Ours against the plain twin and against itself; `ok` says whether a row is within its bound."""
    rows: list[Row] = []

    def row(network: str, what: str, value: float, bound: float) -> None:
        rows.append({"network": network, "check": what, "difference": value, "bound": bound, "ok": value <= bound})
        print(rows[-1], flush=True)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name, (family, config, batch) in networks(small).items():
        pair = make(family, config, batch, device)
        exact = outputs(pair, "plain", False)
        row(name, "output, float32, against the twin", difference(outputs(pair, "ours", False), exact), 1e-4)
        row(name, "output, bf16, against the float32 twin", difference(outputs(pair, "ours", True), exact), 5e-2)
        plain_norm = gradient(pair, "plain", False).norm()
        own = gradient(pair, "ours", False)
        row(name, "gradient norm, against the twin", abs(float(own.norm() / plain_norm) - 1), 1e-3)
        row(name, "gradient, bf16 against float32", difference(gradient(pair, "ours", True), own), 0.2)
        for how in ("selective", "full"):
            pair.ours.backbone.checkpointing = how
            row(name, f"gradient, {how} checkpointing", difference(gradient(pair, "ours", False), own), 1e-5)
        pair.ours.backbone.checkpointing = "none"
        if device == "cuda":
            graphs(pair, lambda what, value, name=name: row(name, what, value, 0.0))
            count = synchronisations(pair.train("ours", True))
            row(name, "host synchronisations in a training step", count, 0.0)
        if device == "cpu":  # compiling takes minutes there and is measured by speed.py --switches --compile
            continue
        try:
            before = outputs(pair, "ours", False)
            torch.compiler.reset()
            compile_blocks(pair.ours.backbone)
            row(name, "output, compiled", difference(outputs(pair, "ours", False), before), 1e-4)
            row(name, "gradient, compiled", difference(gradient(pair, "ours", False), own), 1e-3)
        except Exception as error:  # a compiler that is not installed is a finding, not the end of the run
            rows.append({"network": name, "check": "compiled", "ok": False, "error": str(error)[:500]})
    return rows


def graphs(pair: Pair, row: Callable[[str, float], None]) -> None:
    """A guided run with an interval, from graphs and without."""
    pair.ours.eval()
    grid = torch.linspace(-4, 4, 9, dtype=torch.float64)
    null = guidance.null_label(pair.ours.card.config.num_classes)
    scale = guidance.interval(guidance.dit_s(1.5), -2.0, 2.0)

    def run(denoise: Any) -> Tensor:
        with torch.no_grad():
            return samplers["ddim"](guidance.classifier_free(denoise, null, scale), pair.x, grid, pair.cond)

    replayed = Graphed(pair.ours)
    first, again = run(replayed), run(replayed)
    row("graphs against none, interval", difference(first, run(pair.ours)))
    row("graphs replayed", difference(again, first))
    row("graphs beyond the two of an interval", float(len(replayed.recordings) - 2))
    pair.ours.train()


def synchronisations(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU within `work`."""
    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    for message in found[:3]:
        print("  ", message, flush=True)
    return len(found)


def kernels(device: str, small: bool) -> list[Row]:
    """Single kernels in each form: seconds, and the difference from float64 where a kernel is ours."""
    rows = depthwise_kernels(device, small)
    for heads, d in ((2, 12),) if small else ((16, 60), (16, 64), (16, 72)):
        n = 17 if small else 257
        q, k, v = drawn(device, 3, 4 if small else 64, heads, n, d)
        grad = torch.randn_like(q)

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = grad) -> None:
            F.scaled_dot_product_attention(q, k, v).backward(g)

        def padded(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = grad, d: int = d) -> None:
            wide = (F.pad(t, (0, -d % 64)) for t in (q, k, v))
            F.scaled_dot_product_attention(*wide, scale=d**-0.5)[..., :d].backward(g)

        seconds = interleaved({"as it is": plain, "padded to a multiple of 64": padded}, device)
        rows.append({"kernel": "attention, forward and backward", "heads": heads, "width": d, "seconds": seconds})
        print(rows[-1], flush=True)
    return rows + biased_kernels(device, *((2, 16) if small else (64, 256)))


def drawn(device: str, count: int, *shape: int) -> list[Tensor]:
    """Random bf16 tensors that want gradients."""
    return [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(count)]


def often(work: Callable[[], object], times: int = 20) -> Callable[[], None]:
    """`work` many times, so that what a launch costs is hidden as it is within a network."""

    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated


def depthwise_kernels(device: str, small: bool) -> list[Row]:
    """The 7x7 depthwise convolution with its residual, and its weight gradient: cuDNN in two layouts, Triton."""
    rows: list[Row] = []
    triton = device == "cuda" and depthwise.has_triton()
    float32, bf16 = torch.float32, torch.bfloat16
    for b, c, side in [(2, 16, 8)] if small else [(64, 480, 32), (16, 192, 64)]:
        for kept, low in ((float32, float32), (float32, bf16), (bf16, bf16)):
            x, grad = (torch.randn(b, side, side, c, device=device, dtype=kept) for _ in range(2))
            weight, bias = torch.randn(c, 1, 7, 7, device=device), torch.randn(c, device=device)
            image = x.to(low).permute(0, 3, 1, 2).contiguous()
            forward, gradient = (x, weight, bias, low), (x, grad, weight, low)
            works: dict[str, Callable[[], object]] = {
                "forward": partial(depthwise.forward_torch, *forward),
                "weight gradient": partial(depthwise.gradient_torch, *gradient),
                "forward, NCHW, without the residual": partial(
                    F.conv2d, image, weight.to(low), bias.to(low), padding=3, groups=c
                ),
            }
            row: Row = {"kernel": "depthwise 7x7", "shape": [b, side, side, c], "kept": str(kept), "low": str(low)}
            if triton:
                works["forward, Triton"] = partial(depthwise.forward_triton, *forward)
                works["weight gradient, Triton"] = partial(depthwise.gradient_triton, *gradient)
                exact = depthwise.forward_torch(x.double(), weight.double(), bias.double(), torch.float64)
                exact += depthwise.gradient_torch(x.double(), grad.double(), weight.double(), torch.float64)
                found = depthwise.forward_triton(*forward) + depthwise.gradient_triton(*gradient)
                row["differences"] = [difference(ours, theirs) for ours, theirs in zip(found, exact, strict=True)]
                row["chosen"] = depthwise.chosen(depthwise.forward_torch, depthwise.forward_triton, forward[:-1], low)
                row["ok"] = max(row["differences"]) < (1e-5 if kept == float32 else 1e-2)
            seconds = interleaved({name: often(work) for name, work in works.items()}, device)
            row["seconds"] = {name: taken / 20 for name, taken in seconds.items()}
            row["least seconds at 4.3 TB/s"] = 2 * x.numel() * x.element_size() / 4.3e12
            rows.append(row)
            print(row, flush=True)
    return rows


def biased_kernels(device: str, batch: int, n: int) -> list[Row]:
    """DiffiT's attention, forward and backward with its bias: fused, written out, FlexAttention."""
    from torch.nn.attention.flex_attention import flex_attention

    heads, d = 16, 72
    q, k, v = drawn(device, 3, batch, heads, n, d)
    bias = torch.randn(1, heads, n, n, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(q)
    flex = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    forms: dict[str, Callable[[], Tensor]] = {
        "fused, bias as mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
        "written out": lambda: forms_of.written_biased(q, k, v, bias),
        "FlexAttention": lambda: flex(q, k, v, score_mod=biased),
    }
    rows: list[Row] = []
    exact = forms["written out"]().detach()
    for name, form in forms.items():
        row: Row = {"kernel": "biased attention, forward and backward", "form": name, "batch": batch, "tokens": n}
        try:
            row["difference"] = difference(form().detach(), exact)
            row["seconds"] = interleaved({name: lambda form=form: form().backward(grad)}, device)[name]
        except Exception as error:  # a form that does not exist on this device is a finding
            row["error"] = str(error)[:300]
        rows.append(row)
        print(row, flush=True)
    return rows


# preset -> images per training step and per sampling call on one 139 GiB GPU
LARGE = {
    "dimr-xl-2r-256": (128, 64),
    "diffit-256": (128, 64),
    "dimr-m-3r-64": (128, 64),
    "uvit-128": (32, 32),
    "sid2-128": (64, 32),
    "dimr-g-2r-256": (64, 32),
}
SMALL = {"dimr-tiny": (4, 4), "uvit-tiny": (4, 4)}


def presets(device: str, small: bool, budget: float) -> list[Row]:
    """Throughput, latency and memory of presets in bf16, with and without compile and graphs, until time is up."""
    rows: list[Row] = []
    end = time.monotonic() + budget
    for preset, (train_batch, sample_batch) in (SMALL if small else LARGE).items():
        objective = recipe_for(preset).objective
        common = {"preset": preset, "precision": "bf16", "device": device, "rounds": 3, "objective": objective}
        plans: list[tuple[str, Row]] = [
            ("train", {"batch": train_batch}),
            ("train", {"batch": train_batch, "compile": True}),
            ("train", {"batch": 2 * train_batch, "checkpointing": "full"}),
            ("sample", {"batch": sample_batch}),
            ("sample", {"batch": sample_batch, "compile": True}),
        ]
        if device == "cuda":
            plans.append(("sample", {"batch": sample_batch, "graphs": True}))
        else:
            plans = [plan for plan in plans if "compile" not in plan[1]]
        for mode, options in plans:
            if time.monotonic() > end:
                rows.append({"preset": preset, "mode": mode, **options, "error": "no time left"})
                continue
            try:
                rows.append(bench(Settings(**common, **options), mode))
                shown = ("images_per_second", "latency_seconds", "peak_bytes", "fraction")
                print(preset, mode, options, {key: rows[-1][key] for key in shown}, flush=True)
            except Exception as error:  # too little memory for one row must not cost the others
                rows.append({"preset": preset, "mode": mode, **options, "error": str(error)[:500]})
                print(rows[-1], flush=True)
                traceback.clear_frames(error.__traceback__)
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("checks", "kernels", "presets"))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no further preset is begun")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    if args.part == "checks":
        rows = checks(args.device, args.small)
    elif args.part == "kernels":
        rows = kernels(args.device, args.small)
    else:
        rows = presets(args.device, args.small, args.budget)
    ceilings = {p: matmul_ceiling(args.device, p, 256 if args.small else None) for p in ("float32", "bf16")}
    write(args.out / f"{args.part}.json", args.device, ceiling_flops=ceilings, rows=rows)
    failed = [r for r in rows if not r.get("ok", True)]
    for r in failed:
        print("FAILED", r)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
