"""Estimate the memory, time and FLOP of a run before it starts.

Memory is counted, see `mezzotint.tools.memory`. Time is the run's FLOP over the device's peak rate
times an efficiency; the plan states both. For some large presets on an H200 or H100 the efficiency
is modelled. On this machine's CPU both are measured, the efficiency by real steps where the network
is small enough.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from mezzotint.backbones import get_backbone, native_side, native_size, text_width
from mezzotint.backbones.blocks import repeated_blocks
from mezzotint.backbones.checkpointing import Checkpointing
from mezzotint.backbones.flops import GIGA, count_macs
from mezzotint.config import Engine, Recipe
from mezzotint.core.registry import build
from mezzotint.data.loader import check_batch, largest_share
from mezzotint.data.text_encoder import MAX_TOKENS
from mezzotint.models import build_model, preset_info
from mezzotint.process import objectives
from mezzotint.process.denoiser import Model
from mezzotint.tools.accelerators import GIB, get_accelerator
from mezzotint.tools.benchmark import (
    BenchmarkSettings,
    Work,
    make_benchmark_model,
    make_training_step,
    measure_matmul_flops,
)
from mezzotint.tools.host_memory import describe_host_memory, host_memory
from mezzotint.tools.memory import StepMemoryEstimator
from mezzotint.tools.step_times import modelled_flops
from mezzotint.tools.summary import format_count
from mezzotint.train.optim import make_optimisers
from mezzotint.train.parallel import check_sharding
from mezzotint.train.precision import Precision, choose_precision
from mezzotint.train.step import PREFETCHED_BATCHES

FLOAT = 4  # bytes of a float32: weights, gradients, averages and the optimiser's moments

# Part of the peak rate that a training step reaches: the first target for DiMR-XL/2R on an H200
# (290 images/s). A memory-aware model of that network ends near 0.69, and small networks, float32
# norms and slow links stay below 0.35.
EFFICIENCY = 0.35
# On a CPU: the side of the measured matrices; the fewest images of a timed step, and the seconds
# that they may take; the seconds of a step that is long enough to be timed.
CPU_MATRIX_SIDE = 768
TIMED_IMAGES, MOST_SECONDS, STEP_SECONDS = 8, 2.0, 0.3
# Part of the memory kept free for the CUDA context (about half a GiB), kernels' workspaces and
# fragmentation. Our choice.
MEMORY_MARGIN = 0.08
# Parts of a rank's memory, in the order of the printed table.
MEMORY_PARTS = (
    "weights",
    "gradients",
    "optimiser",
    "averages",
    "batches",
    "gathered",
    "activations",
)


def plan(
    recipe: Recipe,
    *,
    gpus: int = 1,
    device: str = "h200",
    efficiency: float | None = None,
    compare: bool = True,
) -> dict[str, Any]:
    """Return the memory, the time and the FLOP that a recipe needs.

    Counting takes seconds, or a minute for the largest networks, and allocates nothing.

    Args:
        recipe: its batch is split over the ranks; `engine` sets strategy, precision, microbatch and
            checkpointing.
        gpus: ranks, one process each; on a CPU each has a machine to itself.
        device: key of `ACCELERATORS`.
        efficiency: part of the device's peak rate that a step reaches, 0 to 1. By default that of a
            step timed here for a CPU and a network small enough, that of `tools.step_times` for
            what is modelled there, else `EFFICIENCY`.
        compare: also count the other strategy and every kind of checkpointing.

    Returns:
        JSON-ready: params, gmac (one forward pass of one image), per_rank_batch, microbatch;
        flops, the device's rate; efficiency, and `timed`, the words that say how it was found;
        `memory`, one entry per strategy and checkpointing, see `memory_per_rank`; `host_memory`, of
        a machine's own memory, see `tools.host_memory`; seconds_per_step,
        images_per_second (all ranks), days; flop (of the run as papers count it: 3 forward passes
        per image, 4 of consistency tuning, without recomputation); advice, in sentences.

    Errors: ValueError for an unknown preset or device, and for a batch that the ranks cannot share.
    """
    chip = get_accelerator(device)
    _check_plan(recipe, gpus, efficiency)
    precision = choose_precision(recipe.engine, device)
    rank_batch = largest_share(recipe.batch, gpus)
    info = preset_info(recipe.preset, **recipe.model)
    with _countable(native_side(info.config)):
        with torch.device("meta"):
            model = build_model(info)
        macs = count_macs(get_backbone(model), MAX_TOKENS if text_width(info.config) else 0)
        shared = {"precision": precision, "gpus": gpus, "device": device}
        memory = [
            memory_per_rank(recipe, model, strategy=strategy, checkpointing=how, **shared)
            for strategy, how in _layouts(recipe.engine, gpus, compare)
        ]
        host = host_memory(recipe, model, gpus, optimiser_bytes(recipe, model))
    # A backward pass costs two forward passes, and full checkpointing repeats the forward pass.
    passes = 3 + objectives.EXTRA_PASSES.get(recipe.objective.name, 0)
    repeated = 1 if recipe.engine.checkpointing == "full" else 0
    # One multiply-accumulate is two floating-point operations.
    flop_per_image = (passes + repeated) * 2 * macs.computed
    peak_flops, timed = getattr(chip, precision), "assumed"
    if peak_flops is None:
        peak_flops = measure_matmul_flops("cpu", precision, CPU_MATRIX_SIDE)
        images = min(TIMED_IMAGES, _microbatch(recipe, gpus))
        fast = images * flop_per_image < MOST_SECONDS * EFFICIENCY * peak_flops
        if efficiency is None and fast:
            images, step_seconds = time_step(recipe, precision, images, _microbatch(recipe, gpus))
            efficiency = images * flop_per_image / (step_seconds * peak_flops)
            timed = f"a step of {images} images timed here: {step_seconds:.3g} s"
    if efficiency is None and precision == "bf16":
        reached = modelled_flops(recipe, device)
        if reached is not None:
            efficiency = reached / peak_flops
            kind = "compiled" if recipe.engine.compile else "eager"
            timed = f"modelled kernel by kernel for {kind} blocks, not measured"
    efficiency = EFFICIENCY if efficiency is None else efficiency
    seconds = rank_batch * flop_per_image / (efficiency * peak_flops)
    result = {
        "preset": recipe.preset,
        "params": sum(p.numel() for p in model.parameters()),
        "gmac": macs.published / GIGA,
        "gpus": gpus,
        "device": device,
        "device_memory": chip.memory,
        "source": chip.source,
        "precision": precision,
        "flops": peak_flops,
        "efficiency": efficiency,
        "timed": timed,
        "batch": recipe.batch,
        "per_rank_batch": rank_batch,
        "microbatch": _microbatch(recipe, gpus),
        "memory": memory,
        "host_memory": host,
        "seconds_per_step": seconds,
        "images_per_second": recipe.batch / seconds,
        "images": recipe.images,
        "days": recipe.images / recipe.batch * seconds / 86400,
        "flop": passes * 2 * macs.published * recipe.images,
    }
    return {**result, "advice": _advise(result, recipe.engine)}


def time_step(
    recipe: Recipe, precision: Precision, images: int, most_images: int, device: str = "cpu"
) -> tuple[int, float]:
    """Return a number of images and the seconds of one training step on them on this machine.

    `images` double until they are `most_images`, a step on a CPU is long enough, or a GPU's memory
    is full: small networks are slow on few images. The time is the median of three steps by the
    wall clock, as training logs it.

    Args:
        device: cpu or cuda.
    """
    settings = BenchmarkSettings(
        preset=recipe.preset,
        overrides=recipe.model,
        precision=precision,
        device=device,
        checkpointing=recipe.engine.checkpointing,
        compile=recipe.engine.compile,
        objective=recipe.objective,
    )
    model = make_benchmark_model(settings).train()

    def read_seconds(step: Work) -> float:
        start = _read_wall_clock(device)
        step()
        return _read_wall_clock(device) - start

    step: Work | None = None
    fitting = 0  # images of `step`
    while True:
        try:
            larger = make_training_step(model, dataclasses.replace(settings, batch=images))
            larger()  # memory is allocated, and the optimiser's moments
            seconds = read_seconds(larger)
        except torch.OutOfMemoryError:
            if step is None:
                raise
            images = fitting
            break
        step, fitting = larger, images
        enough = seconds > (STEP_SECONDS if images >= TIMED_IMAGES else MOST_SECONDS)
        if images == most_images or (device == "cpu" and enough):
            break
        images = min(2 * images, most_images)
    return images, statistics.median(read_seconds(step) for _ in range(3))


def _read_wall_clock(device: str) -> float:
    """Return the seconds of the wall clock after all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _check_plan(recipe: Recipe, gpus: int, efficiency: float | None) -> None:
    if efficiency is not None and not 0 < efficiency <= 1:
        raise ValueError(f"efficiency {efficiency} must be above 0 and at most 1")
    if gpus < 1:
        raise ValueError(f"gpus {gpus} must be at least 1")
    check_batch(recipe.batch, gpus)
    check_sharding(recipe.engine, gpus, recipe.batch)


def _microbatch(recipe: Recipe, gpus: int) -> int:
    """Images per forward pass on one rank."""
    rank_batch = largest_share(recipe.batch, gpus)
    return min(recipe.engine.microbatch or rank_batch, rank_batch)


def _strategy(engine: Engine, gpus: int) -> str:
    return engine.strategy if gpus > 1 else "one process"


def _layouts(engine: Engine, gpus: int, compare: bool) -> list[tuple[str, Checkpointing]]:
    """(strategy, checkpointing) of every column of the table."""
    if not compare:
        return [(_strategy(engine, gpus), engine.checkpointing)]
    strategies = ("ddp", "fsdp") if gpus > 1 else ("one process",)
    return [(s, checkpointing) for s in strategies for checkpointing in get_args(Checkpointing)]


@contextmanager
def _countable(size: int) -> Iterator[None]:
    """Raise ValueError where a tensor has more elements than PyTorch can number."""
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(f"size {size} is too large to count; try a smaller model.size") from error


def memory_per_rank(
    recipe: Recipe,
    model: Model,
    *,
    strategy: str,
    checkpointing: Checkpointing,
    precision: str,
    gpus: int,
    device: str,
) -> dict[str, Any]:
    """Return the bytes that one rank holds at the peak of a step.

    Returns:
        weights, optimiser, averages;
        batches: images and noise of the prefetched batches, and of the present one beyond the
            microbatch at work;
        gradients: those that stay from step to step or from microbatch to microbatch;
        gathered: what FSDP holds of other ranks' weights and gradients for a moment;
        activations: everything that comes and goes with the step: the microbatch, what autograd
            keeps, weights cast for autocast, temporaries of the backward pass and, where
            `gradients` is 0, the gradients;
        total: the sum; fits: whether it leaves `MEMORY_MARGIN` of the device free;
        largest_microbatch: the most images per forward pass that fit.
    """
    micro = _microbatch(recipe, gpus)
    rank_batch = largest_share(recipe.batch, gpus)
    sharded = strategy == "fsdp"
    shards = recipe.engine.shard_ranks or gpus if sharded else 1
    params = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # As `train.parallel.wrap` sets it: FSDP gathers weights in bf16 on a GPU only.
    gather_bf16 = sharded and precision == "bf16" and device != "cpu"
    # With several ranks or microbatches, gradients live in buffers of their own between passes.
    gradients_stay = gpus > 1 or micro < rank_batch
    estimator = StepMemoryEstimator(
        model,
        build(objectives.registry, recipe.objective),
        weights=torch.bfloat16 if gather_bf16 else torch.float32,
        bf16=precision == "bf16",
        checkpointing=checkpointing,
        gradients_leave=gradients_stay,
    )
    waiting_images = (PREFETCHED_BATCHES + 1) * rank_batch - micro
    numel = model.info.config.channels * math.prod(native_size(model.info.config))
    # As `caption_embeddings` stores them.
    text_bytes = MAX_TOKENS * text_width(model.info.config) * torch.float16.itemsize
    state = {
        "weights": _state_bytes(model) // shards,
        "optimiser": optimiser_bytes(recipe, model) // shards,
        "averages": (1 + len(recipe.ema.power_stds)) * FLOAT * params // shards,
        # Each image comes with its noise, and with its caption where the network reads text.
        "batches": waiting_images * (2 * FLOAT * numel + text_bytes),
        "gradients": FLOAT * trained // shards if gradients_stay else 0,
        "gathered": gathered_bytes(model, 2 if gather_bf16 else FLOAT) if sharded else 0,
    }
    available = int((1 - MEMORY_MARGIN) * get_accelerator(device).memory) - sum(state.values())
    # The optimiser needs all gradients at once, when the activations are gone.
    activations = max(estimator.peak(micro), 0 if gradients_stay else FLOAT * trained)
    return {
        "strategy": strategy,
        "checkpointing": checkpointing,
        **state,
        "activations": activations,
        "total": sum(state.values()) + activations,
        "fits": activations <= available,
        "largest_microbatch": estimator.largest_batch(available, micro),
    }


def _state_bytes(model: Model) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def optimiser_bytes(recipe: Recipe, model: Model) -> int:
    """Return the bytes of the moments: AdamW keeps two per weight, Muon one."""
    return sum(
        (1 if isinstance(optimiser, torch.optim.Muon) else 2) * FLOAT * p.numel()
        for optimiser in make_optimisers(recipe.optim, get_backbone(model), fused=False)
        for group in optimiser.param_groups
        for p in group["params"]
    )


def gathered_bytes(model: Model, weight_bytes: int) -> int:
    """Return the bytes of FSDP2's working set at the peak of the backward pass.

    Args:
        weight_bytes: of one gathered weight of a block.

    Weights outside blocks stay gathered, in float32. The block at work and the prefetched one are
    held twice, as gathered and as copied out. The first also has its gradients, and a float32 copy
    of them on its way to the other ranks.
    """

    def num_params(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    blocks = [num_params(block) for block in repeated_blocks(model.backbone)]
    largest, outside = max(blocks, default=0), num_params(model.backbone) - sum(blocks)
    return outside * FLOAT + largest * (4 * weight_bytes + weight_bytes + FLOAT)


def _suffix(checkpointing: Checkpointing, joint: str) -> str:
    """Return " with full checkpointing" for joint " with ", and nothing for "none"."""
    return "" if checkpointing == "none" else f"{joint}{checkpointing} checkpointing"


def _advise(result: dict[str, Any], engine: Engine) -> list[str]:
    """Say whether the recipe's strategy and checkpointing fit, and if not, which settings would."""
    strategy, checkpointing = _strategy(engine, result["gpus"]), engine.checkpointing
    column = next(
        c
        for c in result["memory"]
        if (c["strategy"], c["checkpointing"]) == (strategy, checkpointing)
    )
    name = strategy + _suffix(checkpointing, " with ")
    rank_batch, micro = result["per_rank_batch"], result["microbatch"]
    largest = column["largest_microbatch"]
    counts = f"{micro} images per forward pass, at most about {largest}"
    if column["fits"]:
        return [f"{name} fits: {counts}."]
    advice = [f"{name} does not fit: {counts}."]
    if largest:
        # The fewest parts that fit, as equal as they can be.
        parts = math.ceil(rank_batch / min(largest, rank_batch))
        even = math.ceil(rank_batch / parts)
        advice.append(f"Set engine.microbatch={even}: the same gradient in {parts} parts.")
    fitting = [c for c in result["memory"] if c["fits"]]
    for c in fitting:
        changes = [f"engine.strategy={c['strategy']}"] * (c["strategy"] != strategy)
        if c["checkpointing"] != checkpointing:
            changes.append(f"engine.checkpointing={c['checkpointing']}")
        advice.append(f"It fits with {' '.join(changes)}.")
    if not largest and not fitting:
        more = (
            "a machine with more memory"
            if result["device"] == "cpu"
            else ("more GPUs with engine.strategy=fsdp")
        )
        advice.append(f"Take {more}, or a smaller network.")
    return advice


def render_plan(result: dict[str, Any]) -> RenderableType:
    """Lay out a plan for a terminal: a column per strategy and checkpointing, time, advice."""
    r, columns = result, result["memory"]
    grid = Table(
        title=f"{r['preset']}: {format_count(r['params'])} parameters, "
        f"{r['gmac']:.2f} GMAC per image; {r['precision']}",
        title_justify="left",
    )
    grid.add_column("GiB per rank")
    for c in columns:
        grid.add_column(c["strategy"] + _suffix(c["checkpointing"], ", "), justify="right")
    for key in (*MEMORY_PARTS, "total"):
        if any(c[key] for c in columns):
            last = key in ("activations", "total")
            grid.add_row(key, *[_format_gib(c[key]) for c in columns], end_section=last)
    grid.add_row("fits", *["yes" if c["fits"] else "no" for c in columns])
    grid.add_row("images per forward pass", *[str(r["microbatch"])] * len(columns))
    grid.add_row("  most that fit", *[str(c["largest_microbatch"]) for c in columns])
    return Group(
        grid,
        f"{r['gpus']} x {r['device']}: {r['device_memory'] / GIB:.0f} GiB, "
        f"{MEMORY_MARGIN:.0%} of it kept free; "
        f"{r['flops'] / 1e12:,.4g} TFLOP/s ({r['source']}), "
        f"{r['efficiency']:.2g} of it reached by a step ({r['timed']})",
        describe_host_memory(r["host_memory"]),
        f"batch {r['batch']:,} ({r['per_rank_batch']:,} per rank): "
        f"{r['seconds_per_step']:.3g} s per step, {r['images_per_second']:,.4g} images/s",
        f"{r['images']:,} images take {_format_days(r['days'])} and {r['flop']:.3g} FLOP",
        *r["advice"],
    )


def _format_days(days: float) -> str:
    """Return a duration in days, or below one in hours or minutes."""
    if days >= 1:
        return f"{days:,.3g} days"
    return f"{days * 24:.3g} hours" if days * 24 >= 1 else f"{days * 1440:.3g} minutes"


def _format_gib(count: int) -> str:
    return f"{count / GIB:.3f}" if count < GIB else f"{count / GIB:.2f}"
