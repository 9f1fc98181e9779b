"""Commands of a training run: train, its averages, its failed steps, its page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from mezzotint.config import Recipe


def demo(out: Path = Path("runs/demo"), images: int = 0, seed: int = 0) -> None:
    """Train a tiny class-conditional network on real handwritten digits (about 3 minutes on 2 CPU cores), then count
    how many of 500 samples a small classifier reads as the digit that was asked for.

    Args:
        out: Run folder; it is started anew each time.
        images: Training length in images; 0 for the demo's own.
        seed: Of every random draw.
    """
    from mezzotint.cli.demo import run_demo

    run_demo(out, images or None, seed)


def train(
    preset: Positional[str],
    overrides: Positional[tuple[str, ...]] = (),
    /,
    *,
    data: Annotated[str, arg(aliases=["-d"])] = "",
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
    recipe: Path | None = None,
    init_from: str | None = None,
    dry_run: bool = False,
) -> None:
    """Train a preset on your images. The same command again resumes. Progress counts images seen.

    Args:
        preset: Network and recipe, e.g. unet-tiny or uvit-256 (`mezzotint info` lists them).
        overrides: Fields of the recipe, e.g. images=2e6 batch=64 optim.lr=3e-4 model.size=64.
        data: Folder, zip, prepared set, parquet, hub name, or the built-in "digits" or "shapes:64".
        out: Run folder; runs/PRESET by default.
        recipe: Start from this recipe.yaml instead of the preset's own recipe.
        init_from: Start from the weights of this model folder, other sizes or classes allowed.
        dry_run: Print the resolved recipe, its differences from the paper, what the data is and the plan for this
            device; train nothing.
    """
    from mezzotint import config
    from mezzotint.evaluate.during_training import make_evaluator
    from mezzotint.recipes import difference, recipe_for
    from mezzotint.train.loop import train as run
    from mezzotint.train.dataset import describe_data

    chosen = config.from_yaml(recipe) if recipe else recipe_for(preset)
    if chosen.preset != preset:
        raise ValueError(
            f"{recipe} is a recipe for {chosen.preset}, not {preset}; name that preset"
        )
    if data:
        chosen = config.override(chosen, [f"data.source={data!r}"])
    chosen = config.override(chosen, overrides)
    if dry_run:
        print(config.to_yaml(chosen))
        print(difference(chosen))
        print(f"data: {describe_data(chosen)}")
        print_plan(chosen)
        return
    if not chosen.data.source:
        raise ValueError(
            "no data given; add --data FOLDER, a zip, a hub name, or the built-in --data digits"
        )
    initialise = None
    if init_from is not None:
        from mezzotint.convert.adapt import initialise_from

        initialise = initialise_from(init_from)
    folder = run(
        chosen,
        out or Path("runs") / preset,
        init_weights=initialise,
        evaluator=make_evaluator(chosen),
    )
    print(f"done: {folder}/model holds the averaged weights, {folder}/samples the grids")
    print(f"next: mezzotint sample {folder} -n 16 --out samples.png")


def print_plan(recipe: Recipe) -> None:
    """What one process on this machine's device needs for the recipe, with a pointer to more."""
    from rich.console import Console

    from mezzotint.tools.accelerators import detect_device
    from mezzotint.tools.plan import plan, render_plan

    if (device := detect_device()) is not None:
        Console().print(render_plan(plan(recipe, device=device, compare=False)))
    print(f"more: mezzotint plan {recipe.preset} --gpus N --device NAME")


def ema(
    run: Positional[Path],
    /,
    *,
    width: float,
    images: int | None = None,
    out: Annotated[Path | None, arg(aliases=["-o"])] = None,
) -> None:
    """Average a run's weights anew, with any width, from the snapshots it kept (ema.power_stds in its recipe).

    Args:
        run: Run folder.
        width: Relative width of the power-function average, e.g. 0.08 (EDM2); below 0.2887.
        images: Average up to so many images seen; the newest snapshot by default.
        out: Model folder to write; RUN/model-WIDTH by default.
    """
    from mezzotint.train.posthoc_ema import save_reconstruction

    folder, rebuilt = save_reconstruction(run, width, images, out)
    print(
        f"{folder}: relative width {width:g} at {rebuilt.images:,} images, of {len(rebuilt.sources)} snapshots"
    )
    print(
        f"relative distance of its profile from the one asked for: {rebuilt.distance:.2g} (0.1 and above is coarse)"
    )


def replay(
    bundle: Positional[Path], /, *, data: Annotated[str | None, arg(aliases=["-d"])] = None
) -> None:
    """Repeat a training step that was not finite, from the bundle it left, and name the layer where it began.

    Args:
        bundle: Folder RUN/bundles/IMAGES.
        data: Where the training data is now, if it moved.
    """
    from mezzotint.train.replay import replay as run

    print(run(bundle, data))


def report(
    run: Positional[Path], /, *, out: Annotated[Path | None, arg(aliases=["-o"])] = None
) -> None:
    """Make one self-contained HTML page of a run, finished or not: curves, grids over time, recipe, environment.

    Args:
        run: Run folder.
        out: File to write; RUN/report.html by default.
    """
    from mezzotint import config
    from mezzotint.recipes import difference
    from mezzotint.train.report import write_report

    kept = run / "recipe.yaml"
    changes = (
        difference(config.from_yaml(kept)) if kept.is_file() else ""
    )  # without one there is no run to report
    print(write_report(run, out or run / "report.html", changes))
