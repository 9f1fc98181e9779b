"""Correctness of every fast path on a GPU: against the plain twin, and against itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_rows import Clock, Row, halving, in_time, release
from mezzotint.backbones.blocks import compile_blocks
from mezzotint.models import preset_info
from mezzotint.process import guidance
from mezzotint.process.samplers import registry as samplers
from mezzotint.sampling.cuda_graphs import CudaGraphDenoiser
from mezzotint.tools.benchmark import time_interleaved
from speed import Pair, make, networks


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


def checks(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """Compare ours with the plain twin and with itself; `ok`: whether a row is within its bound.

    DiMR and DiffiT at the published width and reduced depth; compiled blocks last.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    chosen = {name: networks(small)[name] for name in ("dimr-2r", "diffit")}
    for name, (family, config, batch) in chosen.items():
        if clock.left < 5:
            yield {"network": name, "error": "not begun: no time left"}
            continue
        pair = make(family, config, batch, device)
        yield from _against_the_twin(name, pair)
        if device == "cuda":
            for what, value in graphs(pair).items():
                yield check_bound(name, what, value, 0.0)
            count = synchronisations(pair.train("ours", True))
            yield check_bound(name, "host synchronisations in a training step", count, 0.0)
        if clock.left > 20:
            yield from _compiled(name, pair)
        del pair
        release(device)


def _against_the_twin(name: str, pair: Pair) -> Iterator[Row]:
    check, exact = partial(check_bound, name), outputs(pair, "plain", False)
    ours = outputs(pair, "ours", False)
    yield check("output, float32, against the twin", difference(ours, exact), 1e-4)
    low = outputs(pair, "ours", True)
    yield check("output, bf16, against the float32 twin", difference(low, exact), 5e-2)
    norm, own = gradient(pair, "plain", False).norm(), gradient(pair, "ours", False)
    yield check("gradient norm, against the twin", abs(float(own.norm() / norm) - 1), 1e-3)
    low = gradient(pair, "ours", True)
    yield check("gradient, bf16 against float32", difference(low, own), 0.2)
    for how in ("selective", "full"):
        pair.ours.backbone.checkpointing = how
        again = gradient(pair, "ours", False)
        yield check(f"gradient, {how} checkpointing", difference(again, own), 1e-5)
    pair.ours.backbone.checkpointing = "none"


def _compiled(name: str, pair: Pair) -> Iterator[Row]:
    check, device = partial(check_bound, name), pair.x.device.type
    try:
        before, own = outputs(pair, "ours", False), gradient(pair, "ours", False)
        torch.compiler.reset()
        compile_blocks(pair.ours.backbone, "inductor" if device == "cuda" else "aot_eager")
        yield check("output, compiled", difference(outputs(pair, "ours", False), before), 1e-4)
        yield check("gradient, compiled", difference(gradient(pair, "ours", False), own), 1e-3)
    except Exception as error:  # a compiler that is not installed is a finding
        yield {"network": name, "check": "compiled", "ok": False, "error": str(error)[:500]}


def twins(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """Time bf16 training steps of DiMR-XL and DiffiT at full depth against their plain twins."""
    sizes = {"dimr": "dimr-latent-tiny" if small else "dimr-xl-2r-256"}
    sizes["diffit"] = "diffit-latent-tiny" if small else "diffit-256"
    tasks = [
        ({"preset": preset, "mode": "train"}, 12.0, partial(_twin, family, preset, device, small))
        for family, preset in sizes.items()
    ]
    yield from in_time(clock, tasks, device)


def _twin(family: str, preset: str, device: str, small: bool) -> Row:
    def measure(batch: int) -> Row:
        pair = make(family, preset_info(preset).config, batch, device)
        works = {which: pair.train(which, True) for which in ("plain", "ours")}
        seconds = time_interleaved(works, device, 3)
        return {"seconds": seconds, "ratio": seconds["plain"] / seconds["ours"]}

    return halving(2 if small else 32, measure)


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
