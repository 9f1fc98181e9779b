"""Evaluation during training: an evaluator measures samples of the averaged weights, on all ranks.

An evaluator that fails ends its evaluation on every rank, and training continues.
`evaluate.during_training` makes evaluators; this package knows only their type.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mezzotint.config import Recipe
from mezzotint.core.distributed import any_rank, broadcast_from_rank0, raise_on_all_ranks
from mezzotint.process.denoiser import Model
from mezzotint.train import log
from mezzotint.train.setup import Run, averaged_model

# evaluator(averaged model, folder for its results, should_stop) -> a value for each metric. All
# ranks call it together and get the same values. It raises soon after should_stop() has become
# true.
Evaluator = Callable[[Model, Path, Callable[[], bool]], dict[str, float]]


def check_evaluator(recipe: Recipe, evaluator: Evaluator | None) -> None:
    """Raise ValueError where an evaluator is missing or has no use."""
    every = recipe.evaluate.every_images
    if every > 0 and evaluator is None:
        raise ValueError(
            f"evaluate.every_images={every} and no evaluator; pass evaluator="
            "mezzotint.evaluate.during_training.make_evaluator(recipe)"
        )
    if every == 0 and evaluator is not None:
        raise ValueError(
            "evaluate.every_images=0 and an evaluator; set evaluate.every_images or leave it out"
        )


def is_recorded(run: Run) -> bool:
    """Return whether the log has an evaluation at the images seen; all ranks call this together."""
    recorded = False
    if run.world.is_rank0:
        evaluations = log.read_evaluations(run.folder / "log.jsonl")
        recorded = any(record["images"] == run.state.images for record in evaluations)
    return broadcast_from_rank0(recorded, run.world)


def evaluate_average(
    run: Run, evaluator: Evaluator, should_stop: Callable[[], bool]
) -> tuple[dict[str, Any] | None, str | None]:
    """Evaluate the averaged weights as they are now; all ranks call this together.

    Returns: the record for the log and None, or None and the reason of a failure, or None twice
        where the evaluation ended because of `should_stop`.
    """
    metrics: dict[str, float] = {}
    model, error = averaged_model(run), None
    try:
        metrics = evaluator(model, run.folder / "evaluations", should_stop)
    except Exception as failure:
        # Without its traceback, which would keep every tensor of the evaluation alive.
        error = failure.with_traceback(None)
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()  # training does not reuse blocks of the sampler's sizes
    try:
        raise_on_all_ranks(error, run.world)
    except Exception as reason:
        stopped = any_rank(should_stop(), run.world)
        return None, None if stopped else f"{type(reason).__name__}: {reason}"
    return {"images": run.state.images, "evaluation": metrics}, None
