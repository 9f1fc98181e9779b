"""The parts of gpu.sh: correctness of every fast path, single kernels, the large presets.

    python benchmarks/gpu.py checks|kernels|presets --device cuda --out DIR

Each part writes one JSON file. With `--device cpu --small` everything runs in a minute or two
without a GPU, except CUDA graphs and the count of host synchronisations.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import plain.forms as forms_of
from common import write
from depthwise import torch_weight_gradient
from mezzotint.backbones.blocks import compile_blocks
from mezzotint.backbones.kernels import depthwise
from mezzotint.process import guidance
from mezzotint.process.samplers import registry as samplers
from mezzotint.recipes import recipe_for
from mezzotint.sampling.cuda_graphs import CudaGraphDenoiser
from mezzotint.tools.benchmark import (
    BenchmarkSettings,
    measure_matmul_flops,
    run_benchmark,
    time_interleaved,
)
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


def checks(device: str, small: bool, budget: float) -> Iterator[Row]:
    """Compare ours with the plain twin and with itself; `ok`: whether a row is within its bound."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    end = time.monotonic() + budget
    pairs = {}
    for name, (family, config, batch) in networks(small).items():
        pair = pairs[name] = make(family, config, batch, device)
        check = partial(check_bound, name)
        exact = outputs(pair, "plain", False)
        yield check(
            "output, float32, against the twin",
            difference(outputs(pair, "ours", False), exact),
            1e-4,
        )
        yield check(
            "output, bf16, against the float32 twin",
            difference(outputs(pair, "ours", True), exact),
            5e-2,
        )
        plain_norm = gradient(pair, "plain", False).norm()
        own = gradient(pair, "ours", False)
        yield check(
            "gradient norm, against the twin", abs(float(own.norm() / plain_norm) - 1), 1e-3
        )
        yield check(
            "gradient, bf16 against float32", difference(gradient(pair, "ours", True), own), 0.2
        )
        for how in ("selective", "full"):
            pair.ours.backbone.checkpointing = how
            yield check(
                f"gradient, {how} checkpointing",
                difference(gradient(pair, "ours", False), own),
                1e-5,
            )
        pair.ours.backbone.checkpointing = "none"
        if device == "cuda":
            for what, value in graphs(pair).items():
                yield check(what, value, 0.0)
            count = synchronisations(pair.train("ours", True))
            yield check("host synchronisations in a training step", count, 0.0)
    # Last, since each takes up to a minute (minutes on a CPU: see speed.py --switches --compile).
    for name in ("dimr-2r", "diffit") if device == "cuda" else ():
        if time.monotonic() > end:
            yield {"network": name, "check": "compiled", "error": "no time left"}
            continue
        pair, check = pairs[name], partial(check_bound, name)
        try:
            before, own = outputs(pair, "ours", False), gradient(pair, "ours", False)
            torch.compiler.reset()
            compile_blocks(pair.ours.backbone)
            yield check("output, compiled", difference(outputs(pair, "ours", False), before), 1e-4)
            yield check("gradient, compiled", difference(gradient(pair, "ours", False), own), 1e-3)
        except (
            Exception
        ) as error:  # a compiler that is not installed is a finding, not the end of the run
            yield {"network": name, "check": "compiled", "ok": False, "error": str(error)[:500]}


def check_bound(network: str, what: str, value: float, bound: float) -> Row:
    """Return a row of `checks`."""
    return {
        "network": network,
        "check": what,
        "difference": value,
        "bound": bound,
        "ok": value <= bound,
    }


def graphs(pair: Pair) -> dict[str, float]:
    """Compare a guided run with and without CUDA graphs; all differences should be 0."""
    pair.ours.eval()
    grid = torch.linspace(-4, 4, 9, dtype=torch.float64)
    null = guidance.null_label(pair.ours.info.config.num_classes)
    scale = guidance.interval(guidance.dit_s(1.5), -2.0, 2.0)

    def run(denoise: Any) -> Tensor:
        with torch.no_grad():
            return samplers["ddim"](
                guidance.classifier_free(denoise, null, scale), pair.x, grid, pair.cond
            )

    replayed = CudaGraphDenoiser(pair.ours)
    first, again = run(replayed), run(replayed)
    found = {
        "graphs against none, interval": difference(first, run(pair.ours)),
        "graphs replayed": difference(again, first),
        "graphs beyond the two of an interval": float(len(replayed.recordings) - 2),
    }
    pair.ours.train()
    return found


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


def kernels(device: str, small: bool, budget: float) -> Iterator[Row]:
    """Time single kernels in each form, and compare our own kernels with float64."""
    end = time.monotonic() + budget
    yield from depthwise_kernels(device, small)
    for heads, d in ((2, 12),) if small else ((16, 60), (16, 64), (16, 72)):
        n = 17 if small else 257
        q, k, v = drawn(device, 3, 4 if small else 64, heads, n, d)
        grad = torch.randn_like(q)

        def plain(q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = grad) -> None:
            F.scaled_dot_product_attention(q, k, v).backward(g)

        def padded(
            q: Tensor = q, k: Tensor = k, v: Tensor = v, g: Tensor = grad, d: int = d
        ) -> None:
            wide = (F.pad(t, (0, -d % 64)) for t in (q, k, v))
            F.scaled_dot_product_attention(*wide, scale=d**-0.5)[..., :d].backward(g)

        seconds = time_interleaved(
            {"as it is": plain, "padded to a multiple of 64": padded}, device
        )
        yield {
            "kernel": "attention, forward and backward",
            "heads": heads,
            "width": d,
            "seconds": seconds,
        }
    if time.monotonic() > end:
        yield {"kernel": "biased attention, forward and backward", "error": "no time left"}
        return
    # FlexAttention last: should it break the device, every other row is written.
    yield from biased_kernels(device, *((2, 16) if small else (64, 256)))


def drawn(device: str, count: int, *shape: int) -> list[Tensor]:
    """Random bf16 tensors that want gradients."""
    return [
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(count)
    ]


def often(work: Callable[[], object], times: int = 20) -> Callable[[], None]:
    """`work` many times, so that what a launch costs is hidden as it is within a network."""

    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated


def depthwise_kernels(device: str, small: bool) -> Iterator[Row]:
    """Time the 7x7 depthwise convolution with its residual, and its weight gradient.

    By cuDNN in two layouts and, where triton is installed, by Triton, whose results are checked.
    """
    triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    float32, bf16 = torch.float32, torch.bfloat16
    for b, c, side in [(2, 16, 8)] if small else [(64, 480, 32), (16, 192, 64)]:
        for kept, low in ((float32, float32), (float32, bf16), (bf16, bf16)):
            x, grad = (torch.randn(b, side, side, c, device=device, dtype=kept) for _ in range(2))
            weight, bias = torch.randn(c, 1, 7, 7, device=device), torch.randn(c, device=device)
            low_x, low_grad, low_weight = x.to(low), grad.to(low), weight.to(low)
            image = low_x.permute(0, 3, 1, 2).contiguous()
            works: dict[str, Callable[[], object]] = {
                "forward": lambda low_x=low_x, low_weight=low_weight, x=x, bias=bias: (
                    x + depthwise.convolve(low_x, low_weight, bias.to(low_x.dtype))
                ),
                "weight gradient": partial(torch_weight_gradient, low_x, low_grad, low_weight),
                "forward, NCHW, without the residual": partial(
                    F.conv2d, image, low_weight, bias.to(low), padding=3, groups=c
                ),
            }
            row: Row = {
                "kernel": "depthwise 7x7",
                "shape": [b, side, side, c],
                "kept": str(kept),
                "low": str(low),
            }
            if triton:
                ours = partial(depthwise.residual_op, x, weight, bias)
                our_gradient = partial(depthwise.weight_gradient_op, x, grad, weight)
                works |= {"forward, Triton": ours, "weight gradient, Triton": our_gradient}
                exact_x, exact_weight = x.double(), weight.double()
                row["differences"] = [
                    difference(
                        ours(), exact_x + depthwise.convolve(exact_x, exact_weight, bias.double())
                    ),
                    difference(
                        our_gradient()[0],
                        torch_weight_gradient(exact_x, grad.double(), exact_weight),
                    ),
                ]
                row["ok"] = max(row["differences"]) < (1e-5 if kept == float32 else 1e-2)
            seconds = time_interleaved({name: often(work) for name, work in works.items()}, device)
            row["seconds"] = {name: taken / 20 for name, taken in seconds.items()}
            row["least seconds at 4.3 TB/s"] = 2 * x.numel() * x.element_size() / 4.3e12
            yield row


def biased_kernels(device: str, batch: int, n: int) -> Iterator[Row]:
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
    exact = forms["written out"]().detach()
    for name, form in forms.items():
        row: Row = {
            "kernel": "biased attention, forward and backward",
            "form": name,
            "batch": batch,
            "tokens": n,
        }
        try:
            row["difference"] = difference(form().detach(), exact)
            row["seconds"] = time_interleaved(
                {name: lambda form=form: form().backward(grad)}, device
            )[name]
        except Exception as error:  # a form that does not exist on this device is a finding
            row["error"] = str(error)[:300]
        yield row


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
# In the order of their worth; compiling a large network takes a minute.
WAYS: list[tuple[str, Row]] = [
    ("train", {}),
    ("sample", {}),
    ("sample", {"graphs": True}),
    ("train", {"compile": True}),
    ("train", {"checkpointing": "full"}),
    ("sample", {"compile": True}),
]


def presets(device: str, small: bool, budget: float) -> Iterator[Row]:
    """Throughput, latency and memory of presets in bf16, in every way, until time is up."""
    chosen = list((SMALL if small else LARGE).items())
    ways = (
        WAYS
        if device == "cuda"
        else [way for way in WAYS if not {"graphs", "compile"} & way[1].keys()]
    )
    plans = [(p, way) for part in (chosen[:2], chosen[2:]) for way in ways for p in part]
    end = time.monotonic() + budget
    for (preset, (train_batch, sample_batch)), (mode, options) in plans:
        batch = (
            sample_batch
            if mode == "sample"
            else train_batch * (2 if "checkpointing" in options else 1)
        )
        row: Row = {"preset": preset, "mode": mode, "batch": batch, **options}
        if time.monotonic() > end:
            yield {**row, "error": "no time left"}
            continue
        objective = recipe_for(preset).objective
        settings = BenchmarkSettings(
            preset=preset,
            precision="bf16",
            device=device,
            rounds=3,
            objective=objective,
            batch=batch,
            **options,
        )
        try:
            row = run_benchmark(settings, mode)
        except Exception as error:  # too little memory for one row must not cost the others
            row["error"] = str(error)[:500]
            traceback.clear_frames(error.__traceback__)
        yield row
        gc.collect()  # a compiled block holds itself
        if device == "cuda":
            torch.cuda.empty_cache()


SHOWN = ("preset", "mode", "batch", "graphs", "compile", "checkpointing", "error",
         "images_per_second", "latency_seconds", "peak_bytes", "fraction")  # fmt: skip
PARTS: dict[str, Callable[[str, bool, float], Iterator[Row]]] = {
    "checks": checks,
    "kernels": kernels,
    "presets": presets,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--budget", type=float, default=240, help="seconds after which nothing long is begun"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    ceilings = {
        p: measure_matmul_flops(args.device, p, 256 if args.small else None)
        for p in ("float32", "bf16")
    }
    rows: list[Row] = []
    for row in PARTS[args.part](args.device, args.small, args.budget):
        rows.append(row)
        print({k: v for k, v in row.items() if args.part != "presets" or k in SHOWN}, flush=True)
        # After every row: whatever ends the run, what was measured is there.
        write(
            args.out / f"{args.part}.json",
            args.device,
            ceiling_flops=ceilings,
            rows=rows,
        )
    failed = [r for r in rows if not r.get("ok", True)]
    for r in failed:
        print("FAILED", r)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
