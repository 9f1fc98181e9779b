"""`mezzotint demo`: from nothing to readable digits in a few minutes, with numbers that say how readable."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data.image_dataset import open_images
from mezzotint.data.transforms import to_uint8
from mezzotint.models import load_model
from mezzotint.process.denoiser import Model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.sample import sample
from mezzotint.train.loop import train
from mezzotint.train.validate import eps_mse_by_level

SIZE = 16  # pixels; the digits themselves are 8 x 8
SAMPLES = 500  # images that the classifier reads
STEPS = 25


def demo_recipe(images: int | None, seed: int) -> Recipe:
    """unet-tiny on the real digits, class-conditional, grey, `images` long."""
    return config.override(
        recipe_for("unet-tiny"),
        [
            f"model.size={SIZE}",
            "model.channels=1",
            "model.num_classes=10",
            "data.source=digits",
            f"images={images or 90_000}",
            f"seed={seed}",
            "optim.decay=cosine",
            "samples.every_images=1000000000",
            "log_every_images=6400",
        ],
    )


def run_demo(out: Path, images: int | None = None, seed: int = 0) -> None:
    """Train, sample, judge; print the numbers and write digits.png in `out`."""
    from mezzotint.evaluate.digit_classifier import train_digit_classifier

    # Two threads are faster alone but collapse when another job shares the cores.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    console = Console()
    recipe = demo_recipe(images, seed)
    if out.exists():
        if not (out / "recipe.yaml").exists() and any(out.iterdir()):
            raise ValueError(f"{out} holds files that are not a run's; choose another --out")
        shutil.rmtree(out)
    began = time.monotonic()
    console.print(
        f"training {recipe.preset} on {SIZE} px handwritten digits, {recipe.images:,} images"
    )
    held_out = open_images("digits:test", size=SIZE, channels=1)
    train(recipe, out)
    model = load_model(out / "model").eval()
    after = eps_mse_by_level(model, held_out)
    before = eps_mse_by_level(_untrained(recipe), held_out)
    reader = train_digit_classifier(seed)
    labels = torch.arange(SAMPLES) * 10 // SAMPLES
    pixels = to_uint8(sample(model, seeds=list(range(SAMPLES)), label=labels, steps=STEPS))
    right = int((reader.read(pixels) == labels).sum())
    first = torch.cat([torch.nonzero(labels == digit).flatten()[:10] for digit in range(10)])
    save_png(make_grid(pixels[first], columns=10, zoom=3), out / "digits.png")
    _report(console, out, recipe, before, after, right, reader.accuracy, time.monotonic() - began)


def _untrained(recipe: Recipe) -> Model:
    from mezzotint.models import create_model

    torch.manual_seed(recipe.seed)
    return create_model(recipe.preset, **recipe.model)


def _report(
    console: Console,
    out: Path,
    recipe: Recipe,
    before: dict[float, float],
    after: dict[float, float],
    right: int,
    accuracy: float,
    seconds: float,
) -> None:
    table = Table(title="mean squared error of the noise on 256 held-out digits")
    table.add_column("log-SNR")
    for level in before:
        table.add_column(f"{level:+g}", justify="right")
    table.add_row("untrained", *(f"{e:.4f}" for e in before.values()))
    table.add_row("trained", *(f"{e:.4f}" for e in after.values()))
    console.print(table)
    console.print(
        f"images seen: {recipe.images:,} in {seconds:.0f} s, training and judging together"
    )
    console.print(
        f"samples read as the digit asked for: {right} of {SAMPLES} ({right / SAMPLES:.1%}); "
        f"the classifier reads {accuracy:.1%} of real held-out digits"
    )
    console.print(f"picture: {out / 'digits.png'} (rows are the digits 0 to 9)")
    console.print(
        "\nOn your own folder of images:\n"
        "  mezzotint prepare FOLDER my-images --size 64\n"
        "  mezzotint train unet-tiny --data my-images model.size=64 --out runs/mine\n"
        "  mezzotint sample runs/mine -n 16 --out samples.png",
        highlight=False,
    )
