"""The demo: train on handwritten digits for a few minutes, and count the readable samples."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
from rich.table import Table

from mezzotint import config
from mezzotint.cli.outputs import RUN_PARTS
from mezzotint.config import Recipe
from mezzotint.core.boxed import boxed_models
from mezzotint.core.console import open_console
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import open_images
from mezzotint.data.transforms import to_uint8
from mezzotint.models import create_model, load_model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.job import make_job
from mezzotint.sampling.sample import sample
from mezzotint.train.loop import train
from mezzotint.train.run_folder import run_lock
from mezzotint.train.validate import eps_mse_by_level

SIZE = 16  # pixels; the digits themselves are 8 x 8
NUM_SAMPLES = 500  # images that the classifier reads
STEPS = 25
SHEET = "digits.png"
BOXED_IMAGES, BOXED_STEPS = 16, 20  # of each model in the box


def demo_recipe(images: int | None, seed: int) -> Recipe:
    """Return unet-tiny, class-conditional, on grey handwritten digits, for `images` images."""
    return config.override(
        recipe_for("unet-tiny"),
        [
            f"model.size={SIZE}",
            "model.channels=1",
            "model.num_classes=10",
            "data.source=digits",
            f"images={images or 90_000}",
            f"seed={seed}",
            "batch=64",
            "optim.warmup_images=3000",
            "optim.decay=cosine",
            "samples.every_images=1000000000",
            "log_every_images=6400",
        ],
    )


def is_demo(recipe: Recipe) -> bool:
    """Return whether a run's recipe, resolved by training, is of a demo of any length and seed."""
    demo = demo_recipe(recipe.images, recipe.seed)
    fields = ("preset", "optim", "samples", "log_every_images")
    same = all(getattr(recipe, name) == getattr(demo, name) for name in fields)
    return same and recipe.data.source == demo.data.source and recipe.model == demo.model


def remove_demo(out: Path) -> None:
    """Remove an earlier demo's files from `out`, and no others.

    Errors: ValueError for a run that is no demo, a run that another process trains, and a folder of
        other files.
    """
    with run_lock(out):
        if not (out / "recipe.yaml").exists():
            return
        found = config.from_yaml(out / "recipe.yaml")
        if not is_demo(found):
            raise ValueError(
                f"{out} is a run of {found.preset} on {found.data.source} and no demo; choose "
                "another --out"
            )
        for name in (*RUN_PARTS, SHEET, *(f"{model}.png" for model in boxed_models())):
            path = out / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif name not in (".lock", "recipe.yaml"):  # the lock we hold; what makes it a run
                path.unlink(missing_ok=True)


def run_demo(out: Path, images: int | None = None, seed: int = 0) -> None:
    """Train, sample and evaluate; print the numbers and write digits.png to `out`."""
    from mezzotint.evaluate.digit_classifier import train_digit_classifier

    # All threads are faster alone, but very slow when another job shares the cores.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    console = open_console()
    recipe = demo_recipe(images, seed)
    remove_demo(out)
    start = time.monotonic()
    console.print(
        f"training {recipe.preset} on {SIZE} px handwritten digits, {recipe.images:,} images"
    )
    held_out = open_images("digits:test", size=SIZE, channels=1)
    train(recipe, out)

    model = load_model(out / "model").eval()
    torch.manual_seed(recipe.seed)
    untrained = create_model(recipe.preset, **recipe.model)
    errors = {
        "untrained": eps_mse_by_level(untrained, held_out),
        "trained": eps_mse_by_level(model, held_out),
    }
    classifier = train_digit_classifier(seed)
    labels = torch.arange(NUM_SAMPLES) * 10 // NUM_SAMPLES
    seeds = list(range(NUM_SAMPLES))
    pixels = to_uint8(sample(model, seeds=seeds, label=labels, steps=STEPS))
    correct = int((classifier.predict(pixels) == labels).sum())
    first_ten = torch.cat([torch.nonzero(labels == digit).flatten()[:10] for digit in range(10)])
    save_png(make_grid(pixels[first_ten], columns=10, zoom=3), out / SHEET)

    console.print(_render_errors(errors))
    console.print(
        f"{recipe.images:,} images seen in {time.monotonic() - start:.0f} s, evaluation included"
    )
    console.print(
        f"samples read as the requested digit: {correct} of {NUM_SAMPLES} "
        f"({correct / NUM_SAMPLES:.1%}); "
        f"the classifier reads {classifier.accuracy:.1%} of real held-out digits"
    )
    console.print(f"image grid: {out / SHEET} (rows are the digits 0 to 9)")
    for name in boxed_models():
        save_boxed_grid(name, out / f"{name}.png")
        console.print(f"image grid: {out / name}.png (a model that comes with mezzotint: {name})")
    console.print(
        "\nOn your own folder of images:\n"
        "  mezzotint prepare FOLDER my-images --size 64\n"
        "  mezzotint train unet-tiny --data my-images model.size=64 --out runs/mine\n"
        "  mezzotint sample runs/mine -n 16 --out samples.png",
        highlight=False,
    )


def save_boxed_grid(name: str, path: Path) -> None:
    """Sample a model in the box, its classes in turn, into a grid."""
    job = make_job(name, {"sampler": Spec("dpmpp_2m"), "steps": BOXED_STEPS})
    save_png(make_grid(job.draw(list(range(BOXED_IMAGES)))), path)


def _render_errors(errors: dict[str, dict[float, float]]) -> Table:
    """Lay out mean squared errors by log-SNR, one row per network."""
    table = Table(title="mean squared error of the noise on 256 held-out digits")
    table.add_column("log-SNR")
    for level in errors["trained"]:
        table.add_column(f"{level:+g}", justify="right")
    for name, by_level in errors.items():
        table.add_row(name, *(f"{error:.4f}" for error in by_level.values()))
    return table
