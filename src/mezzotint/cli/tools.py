"""Commands that count, plan, measure and check: info, plan, bench, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from mezzotint.cli.arguments import (
    NUMBER,
    Batch,
    Channels,
    OptionalBatch,
    OptionalFile,
    Overrides,
    Preset,
    Size,
    Switch,
)
from mezzotint.cli.outputs import check_outside_run
from mezzotint.core.console import echo
from mezzotint.core.fields import Range

Precision = Literal["float32", "bf16"]
Checkpointing = Literal["none", "selective", "full"]
NO_HINT = arg(help_behavior_hint="")


def info(
    preset: Positional[Annotated[str, arg(metavar="[NAME]", help_behavior_hint="")]] = "",
    /,
    *,
    json: Switch = False,
) -> None:
    """List the presets with their parameters and multiply-accumulates, and the trained models.

    Figures are counted, and as published. The trained models come with mezzotint.

    Args:
        preset: Show the layers of this preset by resolution, or the card of this trained model.
        json: Print one JSON object per preset, or that of the one named.
    """
    from mezzotint.core.boxed import boxed_models, read_boxed
    from mezzotint.tools import summary

    is_boxed = preset in boxed_models()
    if json:
        from json import dumps

        read = read_boxed if is_boxed else summary.read_summary
        for row in [read(preset)] if preset else summary.read_summaries():
            echo(dumps(row))
        return
    from mezzotint.core.console import open_console

    if is_boxed:
        open_console().print(summary.render_boxed([read_boxed(preset)]))
    elif preset:
        open_console().print(summary.render_layers(preset, summary.read_layers(preset)))
    else:
        open_console().print(summary.render_presets(summary.read_summaries()))
        if boxed := boxed_models():
            open_console().print()
            open_console().print(summary.render_boxed([read_boxed(name) for name in boxed]))


def plan(
    preset: Preset,
    overrides: Overrides = (),
    /,
    *,
    gpus: Annotated[int, NUMBER, Range(1, 1_000_000)] = 1,
    batch: OptionalBatch = None,
    device: str = "h200",
    strategy: Annotated[Literal["ddp", "fsdp"] | None, NO_HINT] = None,
    precision: Annotated[Precision | None, NO_HINT] = None,
    checkpointing: Annotated[Checkpointing | None, NO_HINT] = None,
    efficiency: Annotated[
        float | None, arg(metavar="PART", help_behavior_hint=""), Range(0, 1, "a part", above=True)
    ] = None,
    json: Switch = False,
) -> None:
    """Estimate what a recipe needs: memory per rank, the largest batch that fits, time, FLOP.

    Args:
        preset: Network and recipe, as for train.
        overrides: Fields of the recipe, e.g. model.size=128 engine.microbatch=32.
        gpus: Number of ranks, one process each; 1 by default. On a CPU each has a machine to
            itself.
        batch: Images per step over all ranks; the recipe's by default.
        device: h200, b200, h100, a100, a100-40gb, l40s, rtx4090 or cpu.
        strategy: The one to advise on; both are shown.
        precision: Precision of the forward and backward pass.
        checkpointing: The one to advise on; all are shown.
        efficiency: Part of the peak rate that a step reaches, 0 to 1; by default modelled for some
            presets on h200 and h100, timed on a CPU, else 0.35.
        json: Print one JSON object.
    """
    from json import dumps

    from mezzotint import config
    from mezzotint.core.console import open_console
    from mezzotint.recipes import recipe_for
    from mezzotint.tools import plan as planning

    options = {
        "batch": batch,
        "engine.strategy": strategy,
        "engine.precision": precision,
        "engine.checkpointing": checkpointing,
    }
    changes = [f"{k}={v}" for k, v in options.items() if v is not None]
    result = planning.plan(
        config.override(recipe_for(preset), [*overrides, *changes]),
        gpus=gpus,
        device=device,
        efficiency=efficiency,
    )
    if json:
        echo(dumps(result))
    else:
        open_console().print(planning.render_plan(result))


def bench(
    preset: Preset,
    overrides: Overrides = (),
    /,
    *,
    train: Switch = False,
    sample: Switch = False,
    batch: Batch = 8,
    precision: Precision = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: Switch = False,
    checkpointing: Checkpointing = "none",
    graphs: Switch = False,
    rounds: Annotated[int, NUMBER, Range(1, 10_000)] = 5,
    json: Switch = False,
) -> None:
    """Measure the speed and peak memory of a preset on this machine.

    Args:
        preset: Network, e.g. dimr-xl-2r-256, trained with its recipe's loss.
        overrides: Fields of its config, e.g. model.size=64 model.num_classes=10.
        train: Measure a training step; by default both are measured.
        sample: Measure a guided network call.
        batch: Images per step or call; 8 by default.
        precision: float32, or bf16 autocast over float32 weights.
        device: auto is the GPU if there is one.
        compile: Compile each repeated block with torch.compile.
        checkpointing: Recompute nothing, cheap operations or whole blocks in the backward pass.
        graphs: Replay sampling from CUDA graphs.
        rounds: Repetitions; their median counts; 5 by default.
        json: Print one JSON object per measurement.
    """
    from json import dumps

    from mezzotint import config
    from mezzotint.core.console import open_console
    from mezzotint.core.distributed import default_device
    from mezzotint.recipes import recipe_for
    from mezzotint.tools.benchmark import BenchmarkSettings, render_benchmark, run_benchmark

    # As `train` and `plan` take them too.
    fields = [f"model.{field.removeprefix('model.')}" for field in overrides]
    recipe = config.override(recipe_for(preset), fields)
    settings = BenchmarkSettings(
        preset=recipe.preset,
        overrides=recipe.model,
        batch=batch,
        precision=precision,
        device=default_device().type if device == "auto" else device,
        compile=compile,
        checkpointing=checkpointing,
        graphs=graphs,
        rounds=rounds,
        objective=recipe.objective,
    )
    rows = []
    if train or not sample:
        rows.append(run_benchmark(settings, "train"))
    if sample or not train:
        rows.append(run_benchmark(settings, "sample"))
    if json:
        for row in rows:
            echo(dumps(row))
    else:
        open_console().print(render_benchmark(rows))


def doctor(
    data: Positional[Annotated[str, arg(metavar="[DATA]", help_behavior_hint="")]] = "",
    /,
    *,
    size: Size = None,
    channels: Channels = 3,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("runs"),
    samples: OptionalFile = None,
    json: Switch = False,
) -> None:
    """Check this machine and your data for half a minute, and list concerns before training.

    Of data it shows how it was understood: source, split, columns, classes in order, captions,
    files that are ignored, and twelve pictures as one PNG. Splits are listed if you have to choose.

    Args:
        data: Source as for train; by default only the machine is checked.
        size: Training size in pixels; by default the largest usual one that half the images reach.
        channels: 1 (grey) or 3 (RGB, the default).
        out: Where runs will be written.
        samples: PNG of pictures of the data to write, outside of it; doctor-samples.png by default.
        json: Print one JSON object.
    """
    from json import dumps

    from mezzotint.data.splits import SplitError
    from mezzotint.tools.describe_data import default_samples, render_splits
    from mezzotint.tools.doctor import diagnose, render_diagnosis

    sheet = (samples or default_samples(data)) if data else None
    check_outside_run(sheet)
    try:
        result = diagnose(data, size=size, channels=channels, folder=out, samples=sheet)
    except SplitError as error:
        echo(dumps({"splits": error.splits}) if json else render_splits(error.splits))
        raise
    echo(dumps(result) if json else render_diagnosis(result))
