"""Commands of a training run: demo, train, ema, replay, report."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from mezzotint.cli.arguments import (
    NUMBER,
    Data,
    Hours,
    Images,
    OptionalFile,
    Out,
    Overrides,
    Preset,
    Seed,
    Switch,
)
from mezzotint.cli.outputs import check_outside_run
from mezzotint.cli.recipe import choose_for_hours, choose_recipe
from mezzotint.core.console import echo
from mezzotint.core.fields import MOST_IMAGES, Range

if TYPE_CHECKING:
    from mezzotint.config import Recipe

Run = Positional[Annotated[Path, arg(metavar="RUN", help_behavior_hint="")]]


def demo(
    out: Path = Path("runs/demo"),
    images: Annotated[int, NUMBER, Range(0, MOST_IMAGES, "images")] = 0,
    seed: Seed = 0,
) -> None:
    """Train a tiny network on handwritten digits and check its samples: 3 minutes on 2 CPU cores.

    A small classifier counts how many of 500 samples show the digit of their label.

    Args:
        out: Run folder; an earlier demo there is replaced.
        images: Training length in images; 0, the default, is the recipe's.
        seed: Seed of every random draw; 0 by default.
    """
    from mezzotint.cli.demo import run_demo

    run_demo(out, images or None, seed)


def train(
    preset: Preset,
    overrides: Overrides = (),
    /,
    *,
    data: Data = "",
    out: Out = None,
    hours: Hours = None,
    recipe: OptionalFile = None,
    init_from: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None,
    dry_run: Switch = False,
    accept_changed_data: Switch = False,
) -> None:
    """Train a preset on your images. Run the same command again to resume.

    Args:
        preset: Network and recipe, e.g. unet-tiny (`mezzotint info` lists them); or auto, which
            chooses them for --hours, your images and this machine; or unet-tiny-few-steps, which
            tunes a trained unet-tiny (--init-from) to sample in 1, 2 or 4 steps.
        overrides: Fields of the recipe, e.g. images=2e6 batch=64 optim.lr=3e-4 model.size=64.
        data: Folder, zip, prepared dataset, parquet, hub name, or built-in "digits" or "shapes:64".
        out: Run folder; runs/PRESET by default.
        hours: Train for about so many hours on this machine; the learning rate decays to zero.
        recipe: Use this recipe.yaml instead of the preset's recipe.
        init_from: Start from the weights of this model; size and classes may differ.
        dry_run: Make every check of a start and write nothing; print recipe, data, memory, time,
            and what this machine lacks.
        accept_changed_data: Resume on other data; every class keeps its number by its name.
    """
    from mezzotint import config
    from mezzotint.core import distributed
    from mezzotint.evaluate.during_training import make_evaluator
    from mezzotint.recipes import describe_changes
    from mezzotint.train import loop
    from mezzotint.train.dataset import data_notes, describe_data
    from mezzotint.train.run_folder import has_started

    # First, so that a rank whose command is wrong ends the others, which would wait for it.
    with distributed.process_group() as world:
        out = out or Path("runs") / preset
        if hours is None:
            chosen = distributed.all_ranks(lambda: choose_recipe(preset, overrides, data, recipe))
        else:
            chosen = choose_for_hours(
                hours, preset, overrides, data=data, file=recipe, out=out, world=world
            )
        if dry_run:
            echo(config.to_yaml(chosen))
            echo(describe_changes(chosen))
        init_weights = None
        few_steps = chosen.objective.name == "consistency"
        if few_steps and init_from is None and world.is_rank0 and not has_started(out):
            echo(
                "! tuning for few steps starts from a trained model, --init-from; here: from noise"
            )
        if init_from is not None:
            from mezzotint.convert.adapt import initialise_from

            init_weights = initialise_from(init_from)
        evaluator = distributed.all_ranks(lambda: make_evaluator(chosen))
        if dry_run:
            lacking: list[str] = []
            start = loop.check(chosen, out, init_weights, evaluator, accept_changed_data, lacking)
            echo(f"data: {describe_data(start.recipe, start.dataset)}")
            for line in data_notes(start.info, start.dataset):
                echo(f"! {line}")
            for line in lacking:
                echo(f"! a start here would stop: {line}")
            print_plan(chosen)
            return
        folder = loop.train(
            chosen,
            out,
            init_weights=init_weights,
            evaluator=evaluator,
            accept_changed_data=accept_changed_data,
        )
    echo(f"done: {folder}/model holds the averaged weights, {folder}/samples the sample grids")
    unreadable = Path(folder) / "unreadable.txt"
    if unreadable.is_file():
        count = len(unreadable.read_text("utf-8", "replace").splitlines())
        noun = "image" if count == 1 else "images"
        echo(f"! {count:,} {noun} could not be read, others took the place: {unreadable}")
    # A model tuned for few steps is drawn as its own sample grids are.
    few = chosen.samples.sampler.startswith("consistency")
    how = f" --sampler consistency --steps {chosen.samples.steps}" if few else ""
    echo(f"next: mezzotint sample {quote(str(folder))}{how} -n 16 --out samples.png")


def print_plan(recipe: Recipe) -> None:
    """Print what one process needs on this machine's device, and the command that shows more."""
    from mezzotint.core.console import open_console
    from mezzotint.tools.accelerators import detect_device
    from mezzotint.tools.plan import plan, render_plan

    if (device := detect_device()) is not None:
        open_console().print(render_plan(plan(recipe, device=device, compare=False)))
    echo(f"more: mezzotint plan {recipe.preset} --gpus N --device NAME")


def ema(
    run: Run,
    /,
    *,
    width: Annotated[float, arg(metavar="WIDTH"), Range(0.001, 0.2886, "EDM2 uses 0.05 and 0.10")],
    images: Images = None,
    out: Out = None,
) -> None:
    """Compute an average of a run's weights of any width, from its snapshots.

    Args:
        run: Run folder; its recipe must have set ema.power_stds.
        width: Relative width of the power-function average, e.g. 0.08 (EDM2); below 0.2887.
        images: Images seen at the end of the average; those of the newest snapshot by default.
        out: Model folder to write; RUN/model-WIDTH by default.
    """
    from mezzotint.train.posthoc_ema import save_reconstruction

    check_outside_run(out)
    folder, rebuilt = save_reconstruction(run, width, images, out)
    snapshots = len(rebuilt.sources)
    echo(f"{folder}: width {width:g} at {rebuilt.images:,} images, from {snapshots} snapshots")
    echo(f"relative error of its profile: {rebuilt.distance:.2g} (0.1 and above is coarse)")


def replay(
    bundle: Positional[Annotated[Path, arg(metavar="BUNDLE", help_behavior_hint="")]],
    /,
    *,
    data: Data = "",
) -> None:
    """Repeat a non-finite training step from its bundle and name the layer where it began.

    Args:
        bundle: Folder RUN/bundles/IMAGES.
        data: Where the training data is now, if it moved.
    """
    from mezzotint.train.replay import replay as replay_bundle

    echo(replay_bundle(bundle, data or None))


def report(run: Run, /, *, out: Out = None) -> None:
    """Write one HTML page of a run, finished or not: curves, sample grids, recipe, environment.

    Args:
        run: Run folder.
        out: File to write; RUN/report.html by default.
    """
    from mezzotint import config
    from mezzotint.recipes import describe_changes
    from mezzotint.train.report import write_report

    check_outside_run(out)
    recipe = run / "recipe.yaml"
    # Without a recipe `write_report` says that there is no run to report.
    changes = describe_changes(config.from_yaml(recipe)) if recipe.is_file() else ""
    echo(write_report(run, out or run / "report.html", changes))
