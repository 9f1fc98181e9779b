"""Growth of time and memory of a training step with resolution, batch, depth and ranks.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --out benchmarks/results/scaling-cpu.json

Along each axis the exponent of a power law is fitted to the seconds, to the estimated peak memory
(activations and gradients, see `mezzotint.tools.memory`) and to the counted multiply-accumulates.
In theory the time has the exponent of the multiply-accumulates. A greater one means overhead that
grows, a smaller one overhead that does not. Ranks are gloo processes on this machine, each with the
whole batch (weak scaling), so constant seconds on free cores are perfect.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from common import RESULTS, one_thread, write
from mezzotint.backbones import get_backbone
from mezzotint.backbones.flops import count_macs
from mezzotint.core.registry import build
from mezzotint.models import create_model
from mezzotint.process import objectives
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for
from mezzotint.tools.benchmark import (
    BenchmarkSettings,
    make_benchmark_model,
    make_training_step,
    time_interleaved,
)
from mezzotint.tools.memory import StepMemoryEstimator

# preset -> the config's field for its depth, and values
DEPTHS = {
    "dimr-tiny": ("depths", [(3, 3, 3), (5, 5, 5), (9, 9, 9)]),
    "diffit-latent-tiny": ("depth", [2, 4, 8]),
    "uvit-tiny": ("depth", [2, 4, 8]),
}
SIZES = {"dimr-tiny": [16, 32, 64], "diffit-latent-tiny": [16, 32, 64], "uvit-tiny": [16, 32, 64]}
BATCHES = [2, 4, 8, 16]


def exponent(x: list[float], y: list[float]) -> float:
    """Return the slope of the least-squares line through (log x, log y)."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mu, mv = sum(u) / len(u), sum(v) / len(v)
    return sum((a - mu) * (b - mv) for a, b in zip(u, v, strict=True)) / sum(
        (a - mu) ** 2 for a in u
    )


def gmac(preset: str, overrides: dict[str, Any]) -> float:
    """Return the multiply-accumulates of one forward pass of one image in 1e9."""
    with torch.device("meta"):
        return count_macs(get_backbone(create_model(preset, **overrides))).computed / 1e9


def estimate_peak(preset: str, overrides: dict[str, Any], batch: int) -> int:
    """Return the peak bytes of a float32 training step beyond the weights."""
    with torch.device("meta"):
        model = create_model(preset, **overrides)
    estimator = StepMemoryEstimator(
        model,
        build(objectives.registry, recipe_for(preset).objective),
        weights=torch.float32,
        bf16=False,
        checkpointing="none",
        gradients_leave=True,
    )
    return estimator.peak(batch)


def point(base: BenchmarkSettings) -> Callable[[], object]:
    """Make a training step of these settings."""
    model = make_benchmark_model(base)
    model.train()
    return make_training_step(model, base)


def along(axis: str, base: BenchmarkSettings, values: list[Any], rounds: int) -> dict[str, Any]:
    """Return seconds, memory and multiply-accumulates along one axis, and their exponents."""
    settings = []
    for value in values:
        if axis == "batch":
            settings.append(replace(base, batch=value))
        else:
            name = "size" if axis == "resolution" else DEPTHS[base.preset][0]
            settings.append(replace(base, overrides={**base.overrides, name: value}))
    works = {str(value): point(s) for value, s in zip(values, settings, strict=True)}
    seconds = list(time_interleaved(works, base.device, rounds).values())
    memory = [estimate_peak(s.preset, dict(s.overrides), s.batch) for s in settings]
    macs = [s.batch * gmac(s.preset, dict(s.overrides)) for s in settings]
    numbers = [float(v if isinstance(v, int) else v[0]) for v in values]
    return {
        "preset": base.preset,
        "axis": axis,
        "values": values,
        "seconds": seconds,
        "peak_bytes": memory,
        "gmac": macs,
        "exponent_seconds": exponent(numbers, seconds),
        "exponent_memory": exponent(numbers, memory),
        "exponent_gmac": exponent(numbers, macs),
    }


def worker(
    rank: int,
    ranks: int,
    port: int,
    strategy: str,
    settings: BenchmarkSettings,
    rounds: int,
    results: Any,
) -> None:
    """Run one gloo process; rank 0 reports its median step."""
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    model = make_benchmark_model(settings)
    model.train()
    if strategy == "ddp":
        model.backbone = torch.nn.parallel.DistributedDataParallel(
            model.backbone, gradient_as_bucket_view=True
        )
    else:
        fully_shard(
            model.backbone, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (ranks,))
        )
    step = ranked_step(model, settings)
    step()
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        results.put(sorted(seconds)[len(seconds) // 2])
    dist.destroy_process_group()


def ranked_step(model: Any, settings: BenchmarkSettings) -> Callable[[], None]:
    """Make a step of forward, loss, backward and a fused update on the wrapped parameters."""
    c = model.info.config
    x, eps = (torch.randn(settings.batch, c.channels, c.size, c.size) for _ in range(2))
    cond = Cond(label=torch.zeros(settings.batch, dtype=torch.long)) if c.num_classes else Cond()
    objective = build(objectives.registry, settings.objective)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6)
    logsnr = torch.linspace(-4, 4, settings.batch)

    def step() -> None:
        objective(model, x, eps, logsnr, cond).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def over_ranks(base: BenchmarkSettings, rounds: int) -> list[dict[str, Any]]:
    """Return the wall seconds of one step at 1 and 2 ranks."""
    context = torch.multiprocessing.get_context("spawn")
    rows = []
    for strategy in ("ddp", "fsdp"):
        seconds = {}
        for ranks in (1, 2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            results = context.SimpleQueue()
            torch.multiprocessing.spawn(
                worker, (ranks, port, strategy, base, rounds, results), nprocs=ranks
            )
            seconds[ranks] = results.get()
        rows.append(
            {
                "preset": base.preset,
                "strategy": strategy,
                "batch per rank": base.batch,
                "wall seconds": seconds,
                "efficiency": seconds[1] / seconds[2],
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--presets", nargs="*", default=list(DEPTHS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--small", action="store_true", help="two points per axis, to see that everything runs"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling-cpu.json")
    args = parser.parse_args()
    one_thread()
    rows: list[dict[str, Any]] = []
    for preset in args.presets:
        base = BenchmarkSettings(
            preset=preset, batch=4, device=args.device, objective=recipe_for(preset).objective
        )
        for axis, values in (
            ("resolution", SIZES[preset]),
            ("batch", BATCHES),
            ("depth", DEPTHS[preset][1]),
        ):
            rows.append(along(axis, base, values[:2] if args.small else values, args.rounds))
            print(rows[-1], flush=True)
    preset = args.presets[0]
    base = BenchmarkSettings(preset=preset, batch=8, objective=recipe_for(preset).objective)
    ranks = over_ranks(base, args.rounds)
    write(args.out, args.device, rows=rows, ranks=ranks)


if __name__ == "__main__":
    main()
