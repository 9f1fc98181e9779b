"""Evaluation along the way: the averaged weights' samples are judged by whoever was given, on all ranks together.

A judge's failure ends that evaluation everywhere and training goes on. What judges is not this package's business.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mezzotint.config import Recipe
from mezzotint.core.distributed import any_rank, broadcast_from_rank0, raise_on_all_ranks
from mezzotint.process.denoiser import Model
from mezzotint.sampling.protocols import parse_sampler
from mezzotint.train import log
from mezzotint.train.setup import Run, averaged_model

# judge(averaged model, folder to keep cards and pieces in, whether to stop) -> a value for each metric. All ranks call
# it together and get the same; it raises on all of them or on none, soon after `whether to stop` has become true.
Evaluator = Callable[[Model, Path, Callable[[], bool]], dict[str, float]]


def check_evaluator(recipe: Recipe, judge: Evaluator | None) -> None:
    """ValueError where the recipe asks for evaluations and nobody judges, or the other way round; for its sampler."""
    if (recipe.evaluate.every_images > 0) != (judge is not None):
        raise ValueError(
            f"evaluate.every_images={recipe.evaluate.every_images} and {'no' if judge is None else 'a'} judge do not "
            "fit together; mezzotint.evaluate.during_training.make_evaluator(recipe) makes the recipe's own"
        )
    try:
        parse_sampler(recipe.evaluate.sampler)
    except ValueError as error:
        raise ValueError(f"evaluate.sampler={recipe.evaluate.sampler}: {error}") from None


def is_recorded(run: Run) -> bool:
    """Whether the log has an evaluation at the images seen; all ranks call this together."""
    path, found = run.folder / "log.jsonl", False
    if run.world.is_rank0 and path.exists():
        found = any(record["images"] == run.state.images for record in log.read_evaluations(path))
    return broadcast_from_rank0(found, run.world)


def evaluate_average(
    run: Run, judge: Evaluator, stopping: Callable[[], bool]
) -> tuple[dict[str, Any] | None, str | None]:
    """Have the average judged as it is now; all ranks call this together.

    Returns:
        The line for the log, or None and why there is none; twice None where it ended because training is to stop.
    """
    found: dict[str, float] = {}
    model, error = averaged_model(run), None
    try:
        found = judge(model, run.folder / "evaluations", stopping)
    except Exception as failure:
        # Without its traceback, which would keep every tensor of the evaluation alive.
        error = failure.with_traceback(None)
    if run.world.device.type == "cuda":
        torch.cuda.empty_cache()  # blocks of the samplers' sizes are of no use to training
    try:
        raise_on_all_ranks(error, run.world)
    except Exception as reason:
        return None, None if any_rank(
            stopping(), run.world
        ) else f"{type(reason).__name__}: {reason}"
    return {"images": run.state.images, "evaluation": found}, None
