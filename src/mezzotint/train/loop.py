"""The training loop: batch, gradient, update, averages; log, checkpoint, grid, evaluation.

Progress is counted in images seen. To resume, call `train` again with the same recipe and folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mezzotint.config import Recipe
from mezzotint.core import distributed
from mezzotint.data.loader import load_batches
from mezzotint.models import save_model, saved_images
from mezzotint.process.denoiser import Model
from mezzotint.train import (
    agreement,
    checkpoint,
    checkpoint_store,
    ema,
    environment,
    evaluation,
    log,
    nonfinite,
    posthoc_ema,
    trackers,
)
from mezzotint.train.evaluation import Evaluator
from mezzotint.train.progress import ProgressDisplay
from mezzotint.train.run_folder import check_run_folder, run_lock
from mezzotint.train.sample_grid import grid_path, save_sample_grid
from mezzotint.train.setup import (
    Run,
    Start,
    averaged_model,
    check_start,
    count_training_flop,
    empty_model,
    fill_model,
    setup,
)
from mezzotint.train.signals import StopSignal
from mezzotint.train.staging import gather_to_host
from mezzotint.train.step import (
    Batch,
    gradient,
    gradient_norms,
    make_batch,
    prefetch,
    reduce_step,
    update,
)
from mezzotint.train.transfer import SideStream


class Listeners(NamedTuple):
    """Functions that get every record of log.jsonl or events.jsonl; none on ranks other than 0."""

    log: Sequence[Callable[[dict[str, Any]], None]] = ()
    events: Sequence[Callable[[dict[str, Any]], None]] = ()


def train(
    recipe: Recipe,
    folder: str | Path,
    quiet: bool = False,
    init_weights: Callable[[Model], None] | None = None,
    evaluator: Evaluator | None = None,
    accept_changed_data: bool = False,
) -> Path:
    """Train `recipe` in `folder` until `recipe.images` are seen; resume a run that has started.

    Writes recipe.yaml, environment.json, log.jsonl, samples/, checkpoints/, model/ (the averaged
    weights) and model-raw/ (the weights without averaging).

    Args:
        quiet: print nothing.
        init_weights: called on the network before its first step, e.g. to load weights to
            fine-tune; not on resume.
        evaluator: makes the evaluations of `recipe.evaluate`; see `evaluate.during_training`.
        accept_changed_data: resume on other data, see `train.data_record.decide`.

    Returns: the folder.

    Errors: ValueError for a recipe, data or folder that do not fit together, and for ranks that
        differ; NonFiniteError before a non-finite update; OSError when a checkpoint cannot be
        written (earlier ones stay), when the folder is moved or deleted meanwhile, and when
        another rank fails or ends. SystemExit after a signal, see `StopSignal`.
    """
    folder = Path(folder)
    world = distributed.init_distributed()
    progress = ProgressDisplay(show=not quiet and world.is_rank0)
    stop = StopSignal()
    with ExitStack() as stack:
        stack.callback(distributed.shutdown_distributed)
        stack.callback(progress.close)
        stack.enter_context(stop.listening())
        # Ctrl-C during the start ends one process at once: nothing is trained yet. Several agree
        # below, because one that left would keep the others waiting.
        stop.interrupting = world.size == 1
        stack.enter_context(distributed.lost_ranks(world))
        # What fails on one rank ends all; so every check is made together.
        distributed.all_ranks(lambda: check_extras(recipe, evaluator), world)
        agreement.check_same_recipe_and_code(recipe, init_weights is not None, world)
        lock, checks = run_lock(folder, recipe.data.source), []
        distributed.on_rank0(lambda: checks.append(stack.enter_context(lock)), world)
        store = recipe.save.store
        if store:
            checkpoint_store.fetch_run(store, folder, world, progress.print_line)
        if not store or evaluator is not None:  # an evaluation gathers its images in files
            agreement.check_shared_folder(folder, world)
        run = setup(recipe, folder, world, progress.print_line, init_weights, accept_changed_data)
        stack.callback(run.writer.close)
        if store:
            checkpoint_store.drop_fetched(folder, world)
            # Shows, before anything is trained, that the store can be written to.
            distributed.on_rank0(lambda: checkpoint_store.upload_records(folder, store), world)
        stop.interrupting = False
        if checks:  # on rank 0, which holds the lock
            run.check_folder = checks[0]
        if distributed.any_rank(stop.requested, world):
            exit_gracefully(run, progress, stop)
        environment.record(run)
        writers = []
        if world.is_rank0:
            writers = stack.enter_context(trackers.open_trackers(run, progress.print_line))
        loop(run, progress, stop, writers, evaluator)
    return folder


def check(
    recipe: Recipe,
    folder: str | Path,
    init_weights: Callable[[Model], None] | None = None,
    evaluator: Evaluator | None = None,
    accept_changed_data: bool = False,
    lacking: list[str] | None = None,
) -> Start:
    """Make every check of `train`, with its errors, and write nothing to the folder.

    Args:
        lacking: gets what this machine lacks in place of an error, see `check_start`.
    """
    check_extras(recipe, evaluator)
    check_run_folder(Path(folder), recipe.data.source)
    world = distributed.init_distributed()
    return check_start(recipe, Path(folder), world, init_weights, accept_changed_data, lacking)


def check_extras(recipe: Recipe, evaluator: Evaluator | None) -> None:
    """Raise ValueError for missing data or trackers, or an evaluator missing or without use."""
    check_data_given(recipe)
    trackers.check_installed(recipe.trackers)
    evaluation.check_evaluator(recipe, evaluator)


def check_data_given(recipe: Recipe) -> None:
    """Raise ValueError for a recipe without data."""
    if not recipe.data.source:
        raise ValueError(
            "no data given; add --data FOLDER, a zip, a hub name, or the built-in --data digits"
        )


def loop(
    run: Run,
    progress: ProgressDisplay,
    stop: StopSignal,
    tracker_writers: trackers.Trackers = (),
    evaluator: Evaluator | None = None,
) -> None:
    """Train until `recipe.images` images have been seen; all ranks call this together."""
    recipe, state, world = run.recipe, run.state, run.world
    listeners = open_listeners(run, progress, tracker_writers)
    emit(run.data_event, listeners.events)
    flop = count_training_flop(run.meta_model, recipe.objective.name)
    run.model.train()
    progress.start(recipe.images, state.images)
    # The last process may have ended between a checkpoint and what is made from it: the models, the
    # snapshots, the grid or evaluation due with it.
    save_pending(run)
    if grid_pending(run):
        draw_grid(run, progress)
    if evaluator is not None and evaluation_pending(run):
        run_evaluation(run, evaluator, stop, progress, listeners)
    batches = training_batches(run)
    batch = next(batches)
    distributed.wait_for_ranks(world)
    logged_images, logged_at = state.images, time.monotonic()

    while state.images < recipe.images:
        # Forward and backward pass. The norms stay on the device: reading them here would stall it.
        losses = gradient(run, batch)
        norms = gradient_norms(run)

        # The next batch, while the device computes. Threads load and draw several ahead, so this
        # rarely waits for the data; where it does on one rank, the others wait for it here and not
        # in a collective of the device.
        following = next(batches)
        distributed.wait_for_ranks(world)

        # All ranks agree whether the step is finite, and whether to stop. Before the update, so
        # that nothing has to be undone; the step's only wait for the device.
        result = reduce_step(losses, norms[0], stop.requested, run.writer.failed, world)
        if result.failing:
            run.writer.wait()  # raises the error of the failed write

        # A non-finite gradient never reaches the weights: this raises, or skips the step.
        if result.finite:
            update(run, norms[0])
            log.add_step(state.metrics_window, losses.loss, losses.logsnr, norms, world)
            event = nonfinite.detect_spike(run, result)
        else:
            event = nonfinite.handle_nonfinite(run, batch, losses, result)

        batch = following

        # Skipped images count as seen: data order, draws and learning rate are functions of this.
        state.images += recipe.batch

        # After the count, because the length of each average depends on the images seen.
        update_averages(run)

        # Before the checkpoint, which holds the metrics since the last log line: a resumed run logs
        # the same lines.
        record = None
        if due(run, recipe.log_every_images):
            seconds = time.monotonic() - logged_at
            record = log_record(run, state.images - logged_images, seconds, flop)
            logged_images, logged_at = state.images, time.monotonic()
        emit(record, listeners.log)
        emit(event, listeners.events)
        if grid_due(run):
            emit(ema.horizon_event(recipe.ema, state.images), listeners.events)
        progress.update(state.images, record)

        # Before the grid and the evaluation: if either fails, the next start repeats it from here.
        evaluation_due = evaluator is not None and due(run, recipe.evaluate.every_images)
        save_if_due(run, result.stopping or evaluation_due)
        if result.stopping:
            exit_gracefully(run, progress, stop)

        # Last, because both sample from the averages, which are on disk by now.
        paused_at = time.monotonic()
        if grid_due(run):
            draw_grid(run, progress)
        if evaluator is not None and evaluation_due:
            run_evaluation(run, evaluator, stop, progress, listeners)
        # The log measures the speed of training alone.
        logged_at += time.monotonic() - paused_at
    if recipe.save.store:  # the grid and the evaluation of the end
        save(run, False, False, ())
    run.writer.wait()


def open_listeners(
    run: Run, progress: ProgressDisplay, tracker_writers: trackers.Trackers
) -> Listeners:
    """Open log.jsonl and events.jsonl; a resumed run drops what they hold beyond its checkpoint."""
    if not run.world.is_rank0:
        return Listeners()
    lines = log.Log(run.folder / "log.jsonl", run.state.images, run.check_folder)
    events = log.Log(run.folder / "events.jsonl", run.state.images, run.check_folder)
    run.logs = (lines, events)
    return Listeners([lines.write, *tracker_writers], [events.write, progress.print_event])


def training_batches(run: Run) -> Iterator[Batch]:
    """Yield this rank's batches from `state.images` on, drawn and loaded ahead of the loop."""
    recipe, world = run.recipe, run.world
    loaded = load_batches(
        run.dataset,
        seed=recipe.seed,
        start_image=run.state.images,
        batch=recipe.batch,
        rank=world.rank,
        world=world.size,
        workers=max(1, recipe.data.workers),
        processes=recipe.data.workers > 0,
    )
    num_classes = run.info.config.num_classes
    return prefetch(
        loaded,
        lambda batch: make_batch(recipe, run.dataset, num_classes, batch, world.device),
        SideStream(world.device),
    )


def update_averages(run: Run) -> None:
    """Update every average of the weights after a step."""
    weights = ema.weights_of(run.state.backbone)
    images, batch = run.state.images, run.recipe.batch
    beta = ema.exponential_beta(run.recipe.ema, images, batch)
    ema.update(run.state.averages["ema"], weights, beta)
    for std in run.recipe.ema.power_stds:
        beta = ema.power_beta(std, images, batch)
        ema.update(run.state.averages[f"power-{std:g}"], weights, beta)


def due(run: Run, every: int) -> bool:
    """Return whether this step crossed a multiple of `every` images or ended the run; no for 0."""
    images, batch = run.state.images, run.recipe.batch
    return every > 0 and (
        images // every > (images - batch) // every or images >= run.recipe.images
    )


def grid_due(run: Run) -> bool:
    """Return whether this step ends at a sample grid."""
    return run.recipe.samples.count > 0 and due(run, run.recipe.samples.every_images)


def log_record(run: Run, images: int, seconds: float, flop_per_image: float) -> dict[str, Any]:
    """Return the log line of the latest `images`, trained in `seconds`; all ranks call it."""
    peak_tflops = run.recipe.engine.peak_tflops
    return {
        "images": run.state.images,
        **log.reset_window(run.state.metrics_window, list(run.parts), run.world),
        "skipped_steps": run.state.skipped,
        "spikes": run.state.spikes,
        **log.measure_speed(images, seconds, flop_per_image, peak_tflops, run.world),
    }


def emit(
    record: dict[str, Any] | None, listeners: Sequence[Callable[[dict[str, Any]], None]]
) -> None:
    """Pass a record, if there is one, to every listener."""
    if record is not None:
        for listener in listeners:
            listener(record)


def save_if_due(run: Run, checkpoint_due: bool) -> None:
    """Save a checkpoint, snapshots of the power averages, or both, where this step is due for them.

    Args:
        checkpoint_due: save a checkpoint whatever the images seen.
    """
    finished = run.state.images >= run.recipe.images
    checkpoint_due = checkpoint_due or finished or due(run, run.recipe.save.every_images)
    stds = run.recipe.ema.power_stds if snapshots_due(run) else ()
    if checkpoint_due or stds:
        save(run, checkpoint_due, checkpoint_due, stds)


def snapshots_due(run: Run) -> bool:
    """Return whether this step ends at snapshots of the power averages."""
    recipe = run.recipe
    every = recipe.ema.snapshot_every_images or recipe.save.every_images
    return run.state.images >= recipe.images or due(run, every)


def save_pending(run: Run) -> None:
    """Write the models and snapshots of the restored checkpoint that are missing or older.

    All ranks call this together.
    """
    images, folder = run.state.images, run.folder
    if images == 0:
        return

    def find() -> tuple[bool, list[float]]:
        models = any(saved_images(folder / name) < images for name in ("model", "model-raw"))
        stds = run.recipe.ema.power_stds if snapshots_due(run) else ()
        paths = {std: posthoc_ema.snapshot_path(folder, images, std) for std in stds}
        return models, [std for std, path in paths.items() if not path.is_file()]

    with_models, stds = distributed.on_rank0(find, run.world)
    if with_models or stds or run.recipe.save.store:  # which may lack what is here
        save(run, False, with_models, stds)


def save(
    run: Run, with_checkpoint: bool, with_models: bool, snapshot_stds: Sequence[float]
) -> None:
    """Copy the state to the CPU, and write it in the background; all ranks call this together.

    The models are model/ (the averaged weights) and model-raw/ (those without averaging); with a
    checkpoint goes unreadable.txt. Training waits only for an earlier write that has not ended.
    """
    run.writer.wait()
    distributed.on_rank0(run.check_folder, run.world)
    for lines in run.logs:
        lines.flush()
    tasks: list[Callable[[], object]] = []
    together: list[Callable[[], object]] = []
    images, keep, store = run.state.images, run.recipe.save, run.recipe.save.store
    for std in snapshot_stds:
        weights = gather_to_host(run.state.averages[f"power-{std:g}"], run.world)
        if run.world.is_rank0:
            tasks.append(partial(posthoc_ema.write_snapshot, run.folder, weights, images, std))
    if with_checkpoint:
        nonfinite.record_unreadable(run)
        target = checkpoint_store.StoreTarget(store, run.folder) if store else None
        finish = checkpoint.begin_checkpoint(run.state, run.folder, run.writer, target)
        # The ranks upload it together: no other task of one of them may fail before it.
        (together if store else tasks).append(finish)
        prune = partial(checkpoint.prune_checkpoints, run.folder, images)
        if store:
            prune = partial(checkpoint_store.prune_store, store, images)
        if run.world.is_rank0:
            tasks.append(partial(prune, keep.keep, keep.keep_every_images))
    if with_models:
        buffers = dict(run.state.backbone.named_buffers())
        kinds = {
            "model": run.state.averages["ema"],
            "model-raw": ema.weights_of(run.state.backbone),
        }
        model = empty_model(run) if run.world.is_rank0 else None
        for name, weights in kinds.items():
            copies = gather_to_host({**buffers, **weights}, run.world)
            if model is not None:
                raw = name == "model-raw"
                tasks.append(partial(write_model, model, copies, run.folder / name, raw))
    if store and run.world.is_rank0:
        tasks.append(partial(checkpoint_store.upload_run, run.folder, store))
    if tasks or together:
        write = partial(checkpoint.run_tasks, run.folder, run.check_folder, images, tasks)
        run.writer.start(lambda: [task() for task in (*together, write)])


def write_model(model: Model, weights: ema.Weights, folder: Path, raw: bool) -> None:
    """Save a model with these weights, which then leave the memory.

    raw: whether they are not averaged, which evaluations say.
    """
    extra = {k: v for k, v in model.info.extra.items() if k != "raw_weights"}
    extra |= {"raw_weights": True} if raw else {}
    model.info = replace(model.info, extra=extra)
    save_model(fill_model(model, weights), folder)
    weights.clear()


def draw_grid(run: Run, progress: ProgressDisplay) -> None:
    """Sample a grid from the averaged weights; all ranks call this together.

    Samples that are not finite leave no grid, and training continues.
    """
    distributed.on_rank0(run.check_folder, run.world)
    model, recipe = averaged_model(run), run.recipe
    try:
        save_sample_grid(model, run.folder, recipe.samples, recipe.seed, run.world, run.dataset)
    except (FloatingPointError, distributed.RankFailed) as error:
        progress.print_line(f"no sample grid at {run.state.images:,} images: {error}")


def grid_pending(run: Run) -> bool:
    """Return whether the grid of the restored checkpoint is missing; all ranks call it."""
    exists = run.world.is_rank0 and grid_path(run.folder, run.state.images).exists()
    exists = distributed.broadcast_from_rank0(exists, run.world)
    return not exists and run.state.images > 0 and grid_due(run)


def evaluation_pending(run: Run) -> bool:
    """Return whether the evaluation of the restored checkpoint is missing; all ranks call it."""
    was_due = run.state.images > 0 and due(run, run.recipe.evaluate.every_images)
    return was_due and not evaluation.is_recorded(run)


def run_evaluation(
    run: Run,
    evaluator: Evaluator,
    stop: StopSignal,
    progress: ProgressDisplay,
    listeners: Listeners,
) -> None:
    """Evaluate the averaged weights; log the metrics or the failure; exit when asked to stop."""
    distributed.on_rank0(run.check_folder, run.world)
    images, settings = run.state.images, run.recipe.evaluate
    kinds = ["samples"] if settings.reference or not settings.bits_per_dim else []
    kinds += ["bits per dimension"] if settings.bits_per_dim else []
    progress.print_line(f"evaluating {' and '.join(kinds)} at {images:,} images")
    record, failure = evaluation.evaluate_average(run, evaluator, lambda: stop.requested)
    if record is not None:
        emit(record, listeners.log)
        metrics = record["evaluation"].items()
        progress.print_line(", ".join(f"{metric} {value:.6g}" for metric, value in metrics))
    elif failure is not None:
        event = {"images": images, "event": "evaluation failed", "why": failure}
        emit(event, listeners.events)
    else:
        exit_gracefully(run, progress, stop)


def exit_gracefully(run: Run, progress: ProgressDisplay, stop: StopSignal) -> NoReturn:
    """Wait for the checkpoint, say how to resume, and exit; for the status see `StopSignal`."""
    run.writer.wait()
    command = environment.command_line()
    resume = f": {command}" if run.world.size == 1 else ", under the same launcher"
    progress.print_line(
        f"stopped at {run.state.images:,} images; run the same command again to go on{resume}"
    )
    raise SystemExit(stop.exit_status())
