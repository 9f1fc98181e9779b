"""The training loop. Setup in named functions above it; the loop itself is `run`, in plain sight.

Progress is counted in images seen. To resume, call it again with the same recipe and folder.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.data.images import Images, open_images
from mezzotint.data.loader import batches
from mezzotint.models import Card, build_model, preset_card, save_model
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Model, Schedule
from mezzotint.registry import build
from mezzotint.train import distributed, ema, log, state
from mezzotint.train.console import Console
from mezzotint.train.distributed import World
from mezzotint.train.optim import make_optimisers
from mezzotint.train.preview import save_grid
from mezzotint.train.step import Objective, make_batch, step

# Fields that may differ when a run is continued: how long, how fast, how often; never what is learnt.
CHANGEABLE = ("images", "engine", "save", "grid", "log_every_images")


@dataclass
class Run:
    """A run that is set up: what `run` needs, and nothing it does."""

    recipe: Recipe
    folder: Path
    world: World
    images: Images
    card: Card
    model: Model  # as the step calls it, wrapped for the world
    objective: Objective
    schedule: Schedule
    state: state.State


def resolve(recipe: Recipe, images: Images) -> Recipe:
    """The recipe with everything that depended on the data or the machine written out.

    Errors: ValueError where data and network do not fit: labels, channels.
    """
    card = preset_card(recipe.preset, **recipe.model)
    model = dict(recipe.model)
    if images.num_classes and "num_classes" not in model:
        model["num_classes"] = images.num_classes
    card = preset_card(recipe.preset, **model)
    wanted = card.config.num_classes
    if wanted and not images.num_classes:
        raise ValueError(
            f"{recipe.preset} is conditioned on {wanted} classes but {recipe.data.source} has no labels; "
            "use class subfolders, or train it without: model.num_classes=0"
        )
    if wanted and images.num_classes > wanted:
        raise ValueError(
            f"{recipe.data.source} has {images.num_classes} classes, model.num_classes={wanted} is too few; "
            f"set model.num_classes={images.num_classes}"
        )
    precision = recipe.engine.precision
    if precision == "auto":
        precision = "bf16" if _bf16_is_fast() else "float32"
    return dataclasses.replace(
        recipe,
        model=model,
        schedule=recipe.schedule or card.schedule,
        engine=dataclasses.replace(recipe.engine, precision=precision),
    )


def _bf16_is_fast() -> bool:
    """Whether this machine multiplies bf16 matrices faster than float32 ones."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def claim_folder(folder: Path, recipe: Recipe) -> None:
    """Write recipe.yaml, or check that the one there is of the same run; ValueError lists the differences."""
    path = folder / "recipe.yaml"
    if path.exists():
        old, new = config.to_dict(config.from_yaml(path)), config.to_dict(recipe)
        differing = [
            f"  {k}: {old.get(k)} there, {new[k]} asked" for k in new if k not in CHANGEABLE and old.get(k) != new[k]
        ]
        if differing:
            raise ValueError(
                f"{folder} belongs to another recipe:\n" + "\n".join(differing) + "\nUse another --out, or ask for the same."
            )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "recipe.yaml.partial"
    temporary.write_text(config.to_yaml(recipe))
    temporary.replace(path)


def setup(recipe: Recipe, folder: Path, world: World, say: Any = print) -> Run:
    """Open the data, build and wrap the network, make the optimisers, and restore the newest intact checkpoint."""
    card = preset_card(recipe.preset, **recipe.model)
    images = open_images(
        recipe.data.source, size=card.config.size, channels=card.config.channels, crop=recipe.data.crop
    )
    recipe = resolve(recipe, images)
    if world.main:
        claim_folder(folder, recipe)
    card = dataclasses.replace(
        preset_card(recipe.preset, **recipe.model), schedule=recipe.schedule, labels=images.label_names
    )
    torch.manual_seed(recipe.seed)
    model = build_model(card).to(world.device)
    backbone = model.backbone
    backbone.checkpointing = recipe.engine.checkpointing
    model.backbone = distributed.wrap(backbone, recipe.engine, recipe.engine.precision, world)
    weights = dict(backbone.named_parameters())
    names = ["ema", *(f"power-{std:g}" for std in recipe.ema.power_stds)]
    current = state.State(
        backbone=backbone,
        optimisers=make_optimisers(recipe.optim, backbone, fused=True),
        averages={name: ema.snapshot(weights) for name in names},
        window=log.new_window(world.device),
    )
    checkpoint, passed = state.newest_intact(folder)
    for sentence in passed:
        say(sentence)
    if checkpoint is not None:
        state.restore(current, checkpoint, world)
        say(f"resuming at {current.images:,} images")
    return Run(
        recipe=recipe,
        folder=folder,
        world=world,
        images=images,
        card=card,
        model=model,
        objective=build(objectives.registry, recipe.objective),
        schedule=build(schedules.registry, recipe.schedule),
        state=current,
    )


def averaged_model(run: Run, name: str = "ema") -> Model:
    """A separate model with an average's weights (gathered when sharded), in eval mode; all ranks call this together."""
    card = dataclasses.replace(run.card, images=run.state.images)
    with torch.device("meta"):
        model = build_model(card)
    weights = {k: distributed.whole(w) for k, w in run.state.averages[name].items()}
    # Buffers are constants of the config; they come from the trained module.
    buffers = {k: distributed.whole(b) for k, b in run.state.backbone.named_buffers()}
    model.backbone.load_state_dict({**buffers, **weights}, assign=True, strict=False)
    return model.eval().requires_grad_(False)


def update_averages(run: Run) -> None:
    """Every average of the weights after one step."""
    weights = dict(run.state.backbone.named_parameters())
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


def train(recipe: Recipe, folder: str | Path, quiet: bool = False) -> Path:
    """Train `recipe` in `folder` until `recipe.images` have been seen; continue if it was begun. Returns the folder.

    Leaves recipe.yaml, log.jsonl, samples/, checkpoints/ and model/ (the averaged weights) in the folder.

    Errors: ValueError for a recipe, data or folder that do not fit; NotFinite before a non-finite update;
    OSError when a checkpoint cannot be written (earlier ones stay).
    """
    world = distributed.start()
    folder = Path(folder)
    console = Console(quiet or not world.main)
    stop = Stop()
    try:
        with stop.listening():
            loop(setup(recipe, folder, world, console.say), console, stop)
    finally:
        console.close()
        distributed.stop()
    return folder


def loop(run: Run, console: Console, stop: Stop) -> None:
    """Until the images are seen: batch, step, averages; log, grid and checkpoint when due."""
    recipe, state_, world = run.recipe, run.state, run.world
    lines = log.Log(run.folder / "log.jsonl", state_.images) if world.main else None
    run.model.train()
    console.start(recipe.images, state_.images)
    feed = batches(
        run.images,
        seed=recipe.seed,
        start_image=state_.images,
        batch=recipe.batch,
        rank=world.rank,
        world=world.size,
        workers=max(1, recipe.data.workers),
        processes=recipe.data.workers > 0,
    )
    since, began = state_.images, time.monotonic()
    while state_.images < recipe.images:
        batch = make_batch(recipe, run.card.config.num_classes, next(feed), world.device)
        step(recipe, run.model, run.objective, run.schedule, state_, batch, world)
        update_averages(run)

        if due(run, recipe.log_every_images):
            speed = (state_.images - since) / max(time.monotonic() - began, 1e-9)
            record = {"images": state_.images, **log.summary(state_.window, world), "images_per_second": round(speed, 2)}
            if lines is not None:
                lines.write(record)
            console.progress(state_.images, record)
            since, began = state_.images, time.monotonic()
        else:
            console.progress(state_.images)
        stopping = distributed.any_rank(stop.asked, world)
        if due(run, recipe.grid.every_images):
            save_grid(averaged_model(run), run.folder, recipe.grid, recipe.seed, world)
        if due(run, recipe.save.every_images) or stopping:
            state.save(state_, run.folder, world, recipe.save.keep, recipe.save.keep_every_images)
            model = averaged_model(run)
            if world.main:
                save_model(model, run.folder / "model")
        if stopping:
            console.say(f"stopped at {state_.images:,} images; run the same command again to go on")
            raise SystemExit(0)
