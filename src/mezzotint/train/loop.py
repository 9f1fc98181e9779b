"""The training loop in plain sight: batch, step, averages; log, grid and checkpoint when due.

Progress is counted in images seen. To resume, call `train` again with the same recipe and folder.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mezzotint import ranks
from mezzotint.config import Recipe
from mezzotint.data.loader import batches
from mezzotint.models import save_model
from mezzotint.process.denoiser import Model
from mezzotint.train import ema, log, state
from mezzotint.train.console import Console
from mezzotint.train.preview import save_grid
from mezzotint.train.setup import Run, averaged_model, setup
from mezzotint.train.step import make_batch, step


def update_averages(run: Run) -> None:
    """Every average of the weights after one step."""
    weights = ema.weights_of(run.state.backbone)
    images, batch = run.state.images, run.recipe.batch
    ema.update(run.state.averages["ema"], weights, ema.exponential_beta(run.recipe.ema, images, batch))
    for std in run.recipe.ema.power_stds:
        ema.update(run.state.averages[f"power-{std:g}"], weights, ema.power_beta(std, images, batch))


def due(run: Run, every: int) -> bool:
    """Whether the step just done crossed a multiple of `every` images, or ended the run."""
    images, batch = run.state.images, run.recipe.batch
    return images // every > (images - batch) // every or images >= run.recipe.images


class Stop:
    """Set by SIGTERM or SIGUSR1: finish the step, save, leave. A second signal leaves at once."""

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.asked = False

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            sys.exit(128 + number)
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals within the block; outside the main thread there is nothing to catch."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in self.signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train(
    recipe: Recipe,
    folder: str | Path,
    quiet: bool = False,
    initialise: Callable[[Model], None] | None = None,
) -> Path:
    """Train `recipe` in `folder` until `recipe.images` have been seen; continue if it was begun. Returns the folder.

    Leaves recipe.yaml, log.jsonl, samples/, checkpoints/ and model/ (the averaged weights) in the folder.

    Errors: ValueError for a recipe, data or folder that do not fit; NotFinite before a non-finite update;
    OSError when a checkpoint cannot be written (earlier ones stay).
    """
    world = ranks.start()
    console = Console(quiet or not world.main)
    stop = Stop()
    try:
        with stop.listening():
            loop(setup(recipe, Path(folder), world, console.say, initialise), console, stop)
    finally:
        console.close()
        ranks.stop()
    return Path(folder)


def loop(run: Run, console: Console, stop: Stop) -> None:
    """Until the images are seen: batch, step, averages; log, grid and checkpoint when due."""
    recipe, now, world = run.recipe, run.state, run.world
    lines = log.Log(run.folder / "log.jsonl", now.images) if world.main else None
    run.model.train()
    console.start(recipe.images, now.images)
    feed = batches(
        run.images,
        seed=recipe.seed,
        start_image=now.images,
        batch=recipe.batch,
        rank=world.rank,
        world=world.size,
        workers=max(1, recipe.data.workers),
        processes=recipe.data.workers > 0,
    )
    since, began = now.images, time.monotonic()
    while now.images < recipe.images:
        batch = make_batch(recipe, run.card.config.num_classes, next(feed), world.device)
        step(recipe, run.model, run.objective, run.schedule, now, batch, world)
        update_averages(run)

        record = None
        if due(run, recipe.log_every_images):
            speed = (now.images - since) / max(time.monotonic() - began, 1e-9)
            record = {"images": now.images, **log.summary(now.window, world), "images_per_second": round(speed, 2)}
            if lines is not None:
                lines.write(record)
            since, began = now.images, time.monotonic()
        console.progress(now.images, record)
        stopping = ranks.any_rank(stop.asked, world)
        if due(run, recipe.grid.every_images):
            save_grid(averaged_model(run), run.folder, recipe.grid, recipe.seed, world)
        if due(run, recipe.save.every_images) or stopping:
            save(run)
        if stopping:
            console.say(f"stopped at {now.images:,} images; run the same command again to go on")
            raise SystemExit(0)


def save(run: Run) -> None:
    """The checkpoint of this moment, and the averaged weights as a model folder."""
    keep = run.recipe.save
    state.save(run.state, run.folder, run.world, keep.keep, keep.keep_every_images)
    model = averaged_model(run)
    if run.world.main:
        save_model(model, run.folder / "model")
