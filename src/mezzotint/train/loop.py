"""The training loop in plain sight: batch, step, averages; log, grid and checkpoint when due.

Progress is counted in images seen. To resume, call `train` again with the same recipe and folder.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from mezzotint.config import Recipe
from mezzotint.core import distributed
from mezzotint.core.distributed import World
from mezzotint.data.loader import load_batches
from mezzotint.models import save_model
from mezzotint.process.denoiser import Model
from mezzotint.train import (
    checkpoint,
    ema,
    environment,
    evaluation,
    log,
    nonfinite,
    posthoc_ema,
    trackers,
)
from mezzotint.train.distributed import full_tensor
from mezzotint.train.evaluation import Evaluator
from mezzotint.train.progress import ProgressDisplay
from mezzotint.train.sample_grid import grid_path, save_sample_grid
from mezzotint.train.setup import (
    Run,
    averaged_model,
    check_run_folder,
    copy_to_cpu,
    flop_per_image,
    setup,
)
from mezzotint.train.step import (
    Batch,
    gradient,
    gradient_norms,
    make_batch,
    prefetch,
    reduce_step,
    update,
)

Listeners = Sequence[Callable[[dict[str, Any]], None]]


def update_averages(run: Run) -> None:
    """Every average of the weights after one step."""
    weights = ema.weights_of(run.state.backbone)
    images, batch = run.state.images, run.recipe.batch
    ema.update(
        run.state.averages["ema"], weights, ema.exponential_beta(run.recipe.ema, images, batch)
    )
    for std in run.recipe.ema.power_stds:
        ema.update(
            run.state.averages[f"power-{std:g}"], weights, ema.power_beta(std, images, batch)
        )


def due(run: Run, every: int) -> bool:
    """Whether the step just done crossed a multiple of `every` images, or ended the run; never where `every` is 0."""
    images, batch = run.state.images, run.recipe.batch
    return every > 0 and (
        images // every > (images - batch) // every or images >= run.recipe.images
    )


def grid_due(run: Run) -> bool:
    """Whether a grid shows the images seen."""
    return run.recipe.samples.count > 0 and due(run, run.recipe.samples.every_images)


class StopSignal:
    """Set by SIGTERM or SIGUSR1: finish the step, save, leave. A second signal leaves at once."""

    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.asked = False

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(128 + number)  # no waiting for threads; the next start clears up
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
    judge: Evaluator | None = None,
) -> Path:
    """Train `recipe` in `folder` until `recipe.images` have been seen; continue if it was begun. Returns the folder.

    Leaves recipe.yaml, environment.json, log.jsonl, samples/, checkpoints/, model/ (the averaged weights) and
    model-raw/ (those without average) there.

    Args:
        judge: makes the evaluations of `recipe.evaluate`; see `evaluate.during_training`.

    Errors: ValueError for a recipe, data or folder that do not fit; NotFinite before a non-finite update;
    OSError when a checkpoint cannot be written (earlier ones stay).
    """
    trackers.check(recipe.trackers)
    evaluation.check_evaluator(recipe, judge)
    world = distributed.init_distributed()
    console = ProgressDisplay(quiet or not world.is_rank0)
    stop = StopSignal()
    with ExitStack() as stack:
        stack.callback(distributed.shutdown_distributed)
        stack.callback(console.close)
        stack.enter_context(stop.listening())
        lock_run_folder(Path(folder), recipe.data.source, world, stack)
        run = setup(recipe, Path(folder), world, console.say, initialise)
        stack.callback(run.writer.close)
        environment.record(run)
        track = stack.enter_context(trackers.opened(run)) if world.is_rank0 else []
        loop(run, console, stop, track, judge)
    return Path(folder)


def lock_run_folder(folder: Path, source: str, world: World, stack: ExitStack) -> None:
    """Make the run's folder and keep other processes out of it until `stack` ends; all ranks fail if it cannot be.

    source: of the data, among which a run has no place.
    """
    error = None
    if world.is_rank0:
        try:
            check_run_folder(folder, source)
            stack.enter_context(checkpoint.run_lock(folder))
        except ValueError as reason:
            error = reason
        except OSError as reason:
            error = OSError(
                f"the run's folder {folder} cannot be written: {reason}; mend it or use another --out"
            )
    distributed.raise_on_all_ranks(error, world)


def training_batches(run: Run) -> Iterator[Batch]:
    """This rank's batches from the images seen on, drawn and loaded ahead of the loop."""
    recipe, world = run.recipe, run.world
    loaded = load_batches(
        run.images,
        seed=recipe.seed,
        start_image=run.state.images,
        batch=recipe.batch,
        rank=world.rank,
        world=world.size,
        workers=max(1, recipe.data.workers),
        processes=recipe.data.workers > 0,
    )
    return prefetch(
        loaded,
        lambda batch: make_batch(
            recipe, run.images, run.info.config.num_classes, batch, world.device
        ),
    )


def loop(
    run: Run,
    console: ProgressDisplay,
    stop: StopSignal,
    track: trackers.Trackers = (),
    judge: Evaluator | None = None,
) -> None:
    """Until the images are seen: batch, gradient, agreement, update, averages; log, grid, save and judge when due."""
    recipe, now, world = run.recipe, run.state, run.world
    lines = [log.Log(run.folder / "log.jsonl", now.images).write, *track] if world.is_rank0 else []
    events = (
        [log.Log(run.folder / "events.jsonl", now.images).write, console.event]
        if world.is_rank0
        else []
    )
    flop = flop_per_image(run.shell)
    run.model.train()
    console.start(recipe.images, now.images)
    if grid_pending(run):
        draw_grid(run)
    if (
        judge is not None
        and evaluation_pending(run)
        and not run_evaluation(run, judge, stop, console, lines, events)
    ):
        exit_gracefully(run, console)
    feed = training_batches(run)
    since, began = now.images, time.monotonic()
    while now.images < recipe.images:
        batch = next(feed)
        losses = gradient(run, batch)
        norms = gradient_norms(run)
        verdict = reduce_step(
            losses, norms[0], stop.asked, run.writer.failed, world
        )  # the step's one wait for the device
        if verdict.failing:
            run.writer.settle()  # raises what went wrong
        if verdict.finite:
            update(run, norms[0])
            log.add(now.window, losses.loss, losses.logsnr, norms, world)
            event = nonfinite.detect_spike(run, verdict)
        else:
            event = nonfinite.handle_nonfinite(
                run, batch, losses, verdict
            )  # raises, or leaves the weights as they were
        now.images += recipe.batch
        update_averages(run)

        record = None
        if due(run, recipe.log_every_images):
            seconds = time.monotonic() - began
            speed = log.measure_speed(
                now.images - since, seconds, flop, recipe.engine.peak_tflops, world
            )
            means = log.summary(now.window, list(run.parts), world)
            record = {
                "images": now.images,
                **means,
                "skipped_steps": now.skipped,
                "spikes": now.spikes,
                **speed,
            }
            since, began = now.images, time.monotonic()
        emit(record, lines)
        emit(event, events)
        console.progress(now.images, record)
        if grid_due(run):
            emit(ema.horizon_event(recipe.ema, now.images), events)
        judging_due = judge is not None and due(run, recipe.evaluate.every_images)
        # A grid may fail, an evaluation take long: what was reached is saved before, and the next start takes them up.
        ended = now.images >= recipe.images
        save_due = due(run, recipe.save.every_images) or ended or judging_due or verdict.stopping
        snapshots = due(run, recipe.ema.snapshot_every_images or recipe.save.every_images) or ended
        if save_due or snapshots:
            save(run, save_due, recipe.ema.power_stds if snapshots else ())
        stopping = verdict.stopping
        if grid_due(run) and not stopping:
            draw_grid(run)
        if judge is not None and judging_due and not stopping:
            paused = time.monotonic()
            stopping = not run_evaluation(run, judge, stop, console, lines, events)
            began += time.monotonic() - paused
        if stopping:
            exit_gracefully(run, console)
    run.writer.settle()


def exit_gracefully(run: Run, console: ProgressDisplay) -> NoReturn:
    """End the process in good order, its state being saved."""
    run.writer.settle()
    again = f": {environment.command()}" if run.world.size == 1 else ", under the same launcher"
    console.say(
        f"stopped at {run.state.images:,} images; run the same command again to go on{again}"
    )
    raise SystemExit(0)


def draw_grid(run: Run) -> None:
    """Sample the averaged weights as they are now; all ranks call this together."""
    save_sample_grid(
        averaged_model(run), run.folder, run.recipe.samples, run.recipe.seed, run.world, run.images
    )


def grid_pending(run: Run) -> bool:
    """Whether the process before ended between a checkpoint and its grid; all ranks call this together."""
    there = run.world.is_rank0 and grid_path(run.folder, run.state.images).exists()
    return (
        not distributed.broadcast_from_rank0(there, run.world)
        and run.state.images > 0
        and grid_due(run)
    )


def evaluation_pending(run: Run) -> bool:
    """Whether the process before ended between a checkpoint and its evaluation; all ranks call this together."""
    milestone = run.state.images > 0 and due(run, run.recipe.evaluate.every_images)
    return milestone and not evaluation.is_recorded(run)


def run_evaluation(
    run: Run,
    judge: Evaluator,
    stop: StopSignal,
    console: ProgressDisplay,
    lines: Listeners,
    events: Listeners,
) -> bool:
    """Have the averaged weights judged and tell what was found, or why nothing; False where training is to stop."""
    console.say(
        f"judging {run.recipe.evaluate.num_images:,} samples at {run.state.images:,} images"
    )
    found, failure = evaluation.evaluate_average(run, judge, lambda: stop.asked)
    emit(found, lines)
    if found is not None:
        console.say(
            ", ".join(f"{metric} {value:.6g}" for metric, value in found["evaluation"].items())
        )
    if failure is not None:
        emit({"images": run.state.images, "event": "evaluation failed", "why": failure}, events)
    return found is not None or failure is not None


def emit(record: dict[str, Any] | None, readers: Listeners) -> None:
    """Give a record, if there is one, to everyone who reads such."""
    if record is not None:
        for reader in readers:
            reader(record)


def save(run: Run, with_checkpoint: bool, snapshot_stds: Sequence[float]) -> None:
    """Copy what is to be kept to the CPU now, and have it written behind training.

    A checkpoint brings along model/, the averaged weights, model-raw/, those without average, and unreadable.txt.
    Training waits only where the writing before is not yet done. All ranks call this together.
    """
    run.writer.settle()
    tasks: list[Callable[[], object]] = []
    images, keep = run.state.images, run.recipe.save
    for std in snapshot_stds:
        average = run.state.averages[f"power-{std:g}"]
        weights = {name: full_tensor(w).to("cpu", copy=True) for name, w in average.items()}
        if run.world.is_rank0:
            tasks.append(partial(posthoc_ema.write_snapshot, run.folder, weights, images, std))
    if with_checkpoint:
        nonfinite.record_unreadable(run)
        tasks.append(checkpoint.begin_checkpoint(run.state, run.folder, run.writer))
        model, raw = copy_to_cpu(averaged_model(run)), copy_to_cpu(averaged_model(run, None))
        if run.world.is_rank0:
            tasks.append(
                partial(checkpoint.prune_checkpoints, run.folder, keep.keep, keep.keep_every_images)
            )
            tasks.append(partial(save_model, model, run.folder / "model"))
            tasks.append(partial(save_model, raw, run.folder / "model-raw"))
    if tasks:
        run.writer.start(lambda: [task() for task in tasks])
