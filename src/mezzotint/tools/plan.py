"""What a run will need before it is started: memory per rank, the largest batch that fits, step time, days, FLOP.

Memory is counted, see `mezzotint.tools.memory`; time is arithmetic over a ceiling times an efficiency, both stated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.backbones import dummy_condition
from mezzotint.backbones.blocks import repeated_blocks
from mezzotint.backbones.checkpointing import Checkpointing
from mezzotint.config import Engine, Recipe
from mezzotint.core.registry import build, suggest
from mezzotint.models import build_model, preset_info
from mezzotint.process import objectives
from mezzotint.process.denoiser import Model
from mezzotint.tools.memory import StepMemoryEstimator
from mezzotint.tools.summary import GIGA, si
from mezzotint.train.optim import make_optimisers

GIB = 2**30
FLOAT = 4  # bytes of a float32: weights, gradients, averages and the optimiser's moments

# Part of the ceiling that a training step reaches: the first target for DiMR-XL/2R on an H200 (290 images/s). A
# memory-aware model of that network ends near 0.69, and small networks, float32 norms and slow links stay below 0.35.
EFFICIENCY = 0.35
# Part of a datasheet's dense rate that a large matrix product reaches: the H200's 790 of 989 TFLOP/s.
REACHED = 0.8
# Part of the memory left alone, for the context (about half a GiB), kernels' workspaces and fragmentation. Our choice.
MEMORY_MARGIN = 0.08
# Batches that `train.step.ahead` has on the device before they are needed.
AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A device's memory in bytes and its ceilings in FLOP/s, by precision, with the source of each."""

    memory: float
    bf16: float
    float32: float
    source: str


def _datasheet(memory_gb: float, bf16: float, float32: float) -> Accelerator:
    """From a datasheet: memory in 1e9 bytes, dense rates in TFLOP/s without sparsity and without TF32."""
    return Accelerator(
        memory=memory_gb * 1e9,
        bf16=REACHED * bf16 * 1e12,
        float32=REACHED * float32 * 1e12,
        source=f"datasheet, {bf16:g} bf16 and {float32:g} float32 TFLOP/s, times {REACHED}",
    )


ACCELERATORS = {
    "h200": Accelerator(
        memory=139 * GIB,
        bf16=790e12,
        float32=REACHED * 67e12,
        source=f"bf16 matrix product and memory measured; float32 datasheet, 67 TFLOP/s, times {REACHED}",
    ),
    "b200": _datasheet(180, 2250, 75),
    "h100": _datasheet(80, 989, 67),
    "a100": _datasheet(80, 312, 19.5),
    "a100-40gb": _datasheet(40, 312, 19.5),
    "l40s": _datasheet(48, 362, 91.6),
    "rtx4090": _datasheet(24, 165, 82.6),
    "cpu": Accelerator(
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        bf16=1015e9,
        float32=234e9,
        source="memory of this machine; matrix products measured on 2 cores with AVX512-BF16",
    ),
}


def accelerator(name: str) -> Accelerator:
    """A row of `ACCELERATORS`; ValueError lists near names."""
    if name not in ACCELERATORS:
        raise ValueError(f"unknown device {name!r}; {suggest(name, ACCELERATORS)}")
    return ACCELERATORS[name]


def detect_device() -> str | None:
    """This machine's row of `ACCELERATORS`, by the GPU's name and memory; "cpu" without one, None if unknown."""
    if not torch.cuda.is_available():
        return "cpu"
    words, (_, total) = (
        torch.cuda.get_device_name().lower().replace(" ", ""),
        torch.cuda.mem_get_info(),
    )
    named = [name for name in ACCELERATORS if name.split("-")[0] in words]
    return min(named, key=lambda name: abs(ACCELERATORS[name].memory - total), default=None)


def plan(
    recipe: Recipe,
    *,
    gpus: int = 1,
    device: str = "h200",
    efficiency: float = EFFICIENCY,
    compare: bool = True,
) -> dict[str, Any]:
    """Memory, time and FLOP of a recipe, in some seconds of counting (a minute for the largest); nothing is allocated.

    Args:
        recipe: its batch is shared by the ranks; engine says strategy, precision, microbatch, checkpointing.
        gpus: ranks, one process each. device: of `ACCELERATORS`.
        efficiency: part of the device's ceiling that a step reaches, 0 to 1.
        compare: count the other strategy, and every way of checkpointing, too.

    Returns:
        JSON-ready: params, gmac (one forward pass of one image), per_rank_batch, microbatch; `memory`, one entry per
        strategy and checkpointing with bytes per rank (see `column`) and largest_microbatch, the most images per
        forward pass that fit; seconds_per_step, images_per_second (all ranks), days; flop (of the run as papers count
        it: 3 forward passes per image, without what checkpointing repeats); advice, in sentences.

    Errors: ValueError for an unknown preset or device, or a batch that the ranks cannot share.
    """
    chip = accelerator(device)
    if not 0 < efficiency <= 1:
        raise ValueError(
            f"efficiency {efficiency} is a part of the ceiling; it lies above 0 and up to 1"
        )
    if gpus < 1:
        raise ValueError(f"gpus {gpus} must be at least 1")
    if recipe.batch % gpus:
        least = max(1, round(recipe.batch / gpus)) * gpus
        raise ValueError(
            f"batch {recipe.batch} cannot be shared by {gpus} ranks evenly; try batch={least}"
        )
    precision = _precision(recipe.engine, device)
    share = recipe.batch // gpus
    micro = min(recipe.engine.microbatch or share, share)
    card = preset_info(recipe.preset, **recipe.model)
    with _countable(card.config.size):
        with torch.device("meta"):
            model = build_model(card)
        macs, skipped = _forward_macs(model)
    asked = (recipe.engine.strategy if gpus > 1 else "one process", recipe.engine.checkpointing)
    ways = [
        (way, again)
        for way in (("ddp", "fsdp") if gpus > 1 else ("one process",))
        for again in get_args(Checkpointing)
    ]
    with _countable(card.config.size):
        columns = [
            memory_per_rank(
                recipe,
                model,
                chip,
                strategy=way,
                checkpointing=again,
                precision=precision,
                gpus=gpus,
                device=device,
            )
            for way, again in ways
            if compare or (way, again) == asked
        ]
    passes = (
        4 if recipe.engine.checkpointing == "full" else 3
    )  # a backward pass costs two forward passes
    per_image = passes * 2 * macs  # one multiply-accumulate is two floating-point operations
    seconds = share * per_image / (efficiency * getattr(chip, precision))
    answer = {
        "preset": recipe.preset,
        "params": sum(p.numel() for p in model.parameters()),
        "gmac": (macs + skipped) / GIGA,
        "gpus": gpus,
        "device": device,
        "device_memory": chip.memory,
        "source": chip.source,
        "precision": precision,
        "flops": getattr(chip, precision),
        "efficiency": efficiency,
        "batch": recipe.batch,
        "per_rank_batch": share,
        "microbatch": micro,
        "memory": columns,
        "seconds_per_step": seconds,
        "images_per_second": recipe.batch / seconds,
        "images": recipe.images,
        "days": recipe.images / recipe.batch * seconds / 86400,
        "flop": 3 * 2 * (macs + skipped) * recipe.images,
    }
    return {**answer, "advice": _advice(answer, asked)}


def _precision(engine: Engine, device: str) -> str:
    """What "auto" becomes on the device: bf16, but on a CPU only where it is fast."""
    if engine.precision != "auto":
        return engine.precision
    return "bf16" if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


@contextmanager
def _countable(size: int) -> Iterator[None]:
    """ValueError where a tensor has more elements than PyTorch can number."""
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(
            f"size {size} is beyond what can be counted; give a smaller model.size"
        ) from error


def _forward_macs(model: Model) -> tuple[int, int]:
    """Multiply-accumulates of a forward pass of one image: those done, and those without effect that are not."""
    config = model.info.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        z = torch.empty(1, config.channels, config.size, config.size)
        model.backbone(z, torch.empty(1), dummy_condition(config, z))
    return counter.get_total_flops() // 2, getattr(model.backbone, "skipped_macs", 0)


def memory_per_rank(
    recipe: Recipe,
    model: Model,
    chip: Accelerator,
    *,
    strategy: str,
    checkpointing: Checkpointing,
    precision: str,
    gpus: int,
    device: str,
) -> dict[str, Any]:
    """Bytes that one rank holds at the fullest moment of a step.

    Returns:
        weights, optimiser, averages; batches: images and noise of the batches ahead, and of the present one beyond
        the microbatch at work; gradients that stay from step to step or microbatch to microbatch; gathered: what
        FSDP holds of other ranks' weights and gradients for a moment; activations: everything that comes and goes with
        the step: the batch, what autograd keeps, weights cast for autocast, the backward pass's temporaries and, where
        gradients are 0, the gradients. total is their sum, fits says whether it leaves `SPARE` of the device,
        largest_microbatch how many images per forward pass would.
    """
    share = recipe.batch // gpus
    micro = min(recipe.engine.microbatch or share, share)
    sharded = strategy == "fsdp"
    part = gpus if sharded else 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # As `distributed.wrap` sets it: gathered weights are bf16 on a GPU only.
    low = sharded and precision == "bf16" and device != "cpu"
    resident = gpus > 1 or micro < share
    player = StepMemoryEstimator(
        model,
        build(objectives.registry, recipe.objective),
        weights=torch.bfloat16 if low else torch.float32,
        bf16=precision == "bf16",
        checkpointing=checkpointing,
        gradients_leave=resident,
    )
    state = {
        "weights": _bytes(model) // part,
        "optimiser": optimiser_bytes(recipe, model) // part,
        "averages": (1 + len(recipe.ema.power_stds))
        * FLOAT
        * sum(p.numel() for p in model.parameters())
        // part,
        "batches": ((AHEAD + 1) * share - micro)
        * 2
        * FLOAT
        * model.info.config.channels
        * model.info.config.size**2,
        "gradients": FLOAT * trained // part if resident else 0,
        "gathered": gathered_bytes(model, 2 if low else FLOAT) if sharded else 0,
    }
    room = int((1 - MEMORY_MARGIN) * chip.memory) - sum(state.values())
    # The optimiser meets all gradients at once, when the activations are gone.
    activations = max(player.peak(micro), 0 if resident else FLOAT * trained)
    return {
        "strategy": strategy,
        "checkpointing": checkpointing,
        **state,
        "activations": activations,
        "total": sum(state.values()) + activations,
        "fits": activations <= room,
        "largest_microbatch": player.largest(room, micro),
    }


def _bytes(model: Model) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def optimiser_bytes(recipe: Recipe, model: Model) -> int:
    """AdamW keeps two moments of every trained weight, Muon one of its matrices."""
    return sum(
        (1 if isinstance(optimiser, torch.optim.Muon) else 2) * FLOAT * p.numel()
        for optimiser in make_optimisers(recipe.optim, model.backbone, fused=False)
        for group in optimiser.param_groups
        for p in group["params"]
    )


def gathered_bytes(model: Model, width: int) -> int:
    """FSDP2's working set, in the worst moment of the backward pass; `width` in bytes of a gathered weight.

    The weights outside blocks stay whole. The block at work and the one fetched ahead are held twice, as gathered and
    as copied out; the first has its gradients too, and a float32 copy of them on its way to the other ranks.
    """

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    sizes = [size(block) for block in repeated_blocks(model.backbone)]
    largest, outside = max(sizes, default=0), size(model.backbone) - sum(sizes)
    return outside * width + largest * (4 * width + width + FLOAT)


def _suffix(checkpointing: Checkpointing, joint: str) -> str:
    """ " with full checkpointing", say; nothing where there is none."""
    return "" if checkpointing == "none" else f"{joint}{checkpointing} checkpointing"


def _advice(answer: dict[str, Any], asked: tuple[str, Checkpointing]) -> list[str]:
    """Whether the strategy and checkpointing asked for fit, and if not, what to set."""
    strategy, checkpointing = asked
    chosen = next(c for c in answer["memory"] if (c["strategy"], c["checkpointing"]) == asked)
    named = strategy + _suffix(checkpointing, " with ")
    share, micro, most = (
        answer["per_rank_batch"],
        answer["microbatch"],
        chosen["largest_microbatch"],
    )
    if chosen["fits"]:
        return [f"{named} fits: {micro} images per forward pass, about {most} would."]
    said = [f"{named} does not fit: {micro} images per forward pass, about {most} would."]
    if most:
        even = max(n for n in range(1, min(most, share) + 1) if share % n == 0)
        said.append(f"Set engine.microbatch={even}: the same gradient in {share // even} parts.")
    better = [c for c in answer["memory"] if c["fits"]]
    for c in better:
        other = [f"engine.strategy={c['strategy']}"] * (c["strategy"] != strategy)
        again = [f"engine.checkpointing={c['checkpointing']}"] * (
            c["checkpointing"] != checkpointing
        )
        said.append(f"It fits with {' '.join(other + again)}.")
    if not most and not better:
        said.append("Take more GPUs with engine.strategy=fsdp, or a smaller network.")
    return said


def render(answer: dict[str, Any]) -> RenderableType:
    """`plan` for a terminal: a column per strategy and checkpointing, then time."""
    a = answer
    title = f"{a['preset']}: {si(a['params'])} parameters, {a['gmac']:.2f} GMAC per image; {a['precision']}"
    heads = [c["strategy"] + _suffix(c["checkpointing"], ", ") for c in a["memory"]]
    grid = Table(title=title, title_justify="left")
    grid.add_column("GiB per rank")
    for head in heads:
        grid.add_column(head, justify="right")
    for key in (
        "weights",
        "gradients",
        "optimiser",
        "averages",
        "batches",
        "gathered",
        "activations",
        "total",
    ):
        if any(c[key] for c in a["memory"]):
            grid.add_row(
                key,
                *[_gib(c[key]) for c in a["memory"]],
                end_section=key in ("activations", "total"),
            )
    grid.add_row("fits", *["yes" if c["fits"] else "no" for c in a["memory"]])
    grid.add_row("images per forward pass", *[str(a["microbatch"])] * len(heads))
    grid.add_row("  most that fit", *[str(c["largest_microbatch"]) for c in a["memory"]])
    return Group(
        grid,
        f"{a['gpus']} x {a['device']}: {a['device_memory'] / GIB:.0f} GiB, of which {MEMORY_MARGIN:.0%} are left alone; "
        f"{a['flops'] / 1e12:,.4g} TFLOP/s ({a['source']}), of which a step is taken to reach {a['efficiency']:.0%}",
        f"batch {a['batch']:,} ({a['per_rank_batch']:,} per rank): {a['seconds_per_step']:.3g} s per step, "
        f"{a['images_per_second']:,.4g} images/s",
        f"{a['images']:,} images take {a['days']:,.3g} days and {a['flop']:.3g} FLOP",
        *a["advice"],
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.3f}" if count < GIB else f"{count / GIB:.2f}"
