"""Commands that count, plan, measure and check: info, plan, bench, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mezzotint.cli.arguments import Count, Given, Switch


def info(preset: Positional[str] = "", /, *, json: bool = False) -> None:
    """List every published size with parameters and multiply-accumulates, counted and claimed.

    Args:
        preset: Show this one's layers by resolution instead of the table.
        json: One JSON object per preset, for programs.
    """
    from json import dumps

    from rich.console import Console

    from mezzotint.tools import summary as counts

    if json:
        for row in [counts.describe(preset)] if preset else counts.table():
            print(dumps(row))
    elif preset:
        Console().print(counts.render_layers(preset, counts.layers(preset)))
    else:
        Console().print(counts.render_table(counts.table()))


def plan(
    preset: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    gpus: int = 1,
    batch: Given = None,
    device: str = "h200",
    strategy: Literal["ddp", "fsdp"] | None = None,
    precision: Literal["float32", "bf16"] | None = None,
    checkpointing: Literal["none", "selective", "full"] | None = None,
    efficiency: float | None = None,
    json: Switch = False,
) -> None:
    """Say what a recipe will need: memory per rank, the largest batch that fits, step time, days, FLOP.

    Args:
        preset: Network and recipe, as for train.
        overrides: Fields of the recipe, e.g. model.size=128 engine.microbatch=32.
        gpus: Ranks, one process each.
        batch: Images per step over all ranks; the recipe's own by default.
        device: h200, b200, h100, a100, a100-40gb, l40s, rtx4090 or cpu.
        strategy: Which of the two to judge; both are shown.
        precision: Of the forward and backward pass.
        checkpointing: Of activations; every way is shown.
        efficiency: Part of the device's ceiling that a step reaches, 0 to 1; 0.35 by default.
        json: One JSON object, for programs.
    """
    from json import dumps

    from rich.console import Console

    from mezzotint import config
    from mezzotint.recipes import recipe_for
    from mezzotint.tools import plan as planning

    asked = {"batch": batch, "engine.strategy": strategy, "engine.precision": precision}
    asked["engine.checkpointing"] = checkpointing
    named = [f"{k}={v}" for k, v in asked.items() if v is not None]
    recipe = config.override(recipe_for(preset), [*overrides, *named])
    answer = planning.plan(
        recipe,
        gpus=gpus,
        device=device,
        efficiency=planning.EFFICIENCY if efficiency is None else efficiency,
    )
    if json:
        print(dumps(answer))
    else:
        Console().print(planning.render(answer))


def bench(
    preset: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    train: bool = False,
    sample: bool = False,
    batch: int = 8,
    precision: Literal["float32", "bf16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: bool = False,
    checkpointing: Literal["none", "selective", "full"] = "none",
    graphs: bool = False,
    rounds: int = 5,
    json: bool = False,
) -> None:
    """Measure a preset here: throughput, latency, peak memory, and the share of this machine's matrix-product rate.

    Args:
        preset: Network, e.g. dimr-xl-2r-256; its recipe's loss is trained.
        overrides: Fields of its config, e.g. size=64 num_classes=10.
        train: Measure a training step; without --train and --sample both are.
        sample: Measure a guided network call.
        batch: Images per step or call.
        precision: float32, or bf16 autocast over float32 weights.
        device: auto is the GPU where there is one.
        compile: torch.compile of each repeated block.
        checkpointing: What is computed again in the backward pass: nothing, what is cheap, or each block.
        graphs: Replay sampling from CUDA graphs.
        rounds: Measured repetitions; the median counts.
        json: One JSON object per measurement, for programs.
    """
    from json import dumps

    import torch
    from rich.console import Console

    from mezzotint import config
    from mezzotint.recipes import recipe_for
    from mezzotint.tools import benchmark as measure

    recipe = config.override(recipe_for(preset), [f"model.{o}" for o in overrides])
    settings = measure.BenchmarkSettings(
        preset=preset,
        overrides=recipe.model,
        batch=batch,
        precision=precision,
        device=("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device,
        compile=compile,
        checkpointing=checkpointing,
        graphs=graphs,
        rounds=rounds,
        objective=recipe.objective,
    )
    modes: list[Literal["train", "sample"]] = []
    if train or not sample:
        modes.append("train")
    if sample or not train:
        modes.append("sample")
    rows = [measure.run_benchmark(settings, mode) for mode in modes]
    if json:
        for row in rows:
            print(dumps(row))
        return
    Console().print(measure.render(rows))


def doctor(
    data: Positional[str] = "",
    /,
    *,
    size: Given = None,
    channels: Count = 3,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("runs"),
    json: Switch = False,
) -> None:
    """Look at this machine and at your data for half a minute, and list what deserves a look before training.

    Args:
        data: As for train; without it only the machine is looked at.
        size: Height and width in pixels to train at; by default the largest usual one that half the pictures reach.
        channels: 1 (grey) or 3 (RGB).
        out: Where runs will be written.
        json: One JSON object, for programs.
    """
    from json import dumps

    from mezzotint.tools.doctor import examine, render

    found = examine(data, size=size, channels=channels, folder=out)
    print(dumps(found) if json else render(found))
