"""Which stream of random numbers a run draws from."""

from __future__ import annotations

from pathlib import Path

import torch

from mezzotint.config import Recipe
from mezzotint.core.rng import Draws, Stream
from mezzotint.train.run_folder import started_recipe


def draws_of(recipe: Recipe, device: torch.device) -> Draws:
    """Return the random numbers of a recipe's run on `device`.

    For "auto" that is philox4x32 on a GPU, which draws where the noise is used, and else
    philox4x64, which is faster on a CPU. On a GPU the draws of a compiled run are compiled too.
    """
    stream: Stream = "philox4x32" if device.type == "cuda" else "philox4x64"
    return Draws(
        seed=recipe.seed,
        stream=stream if recipe.stream == "auto" else recipe.stream,
        device=device,
        compiled=recipe.engine.compile and device.type == "cuda",
    )


def resolve_stream(recipe: Recipe, folder: Path, device: torch.device) -> Stream:
    """Return the stream of the run in `folder`; where none has started, that of the recipe.

    A run that resumes on another kind of device keeps its stream. A recipe that names another one
    does not resume it, see `run_folder.check_same_recipe`.
    """
    started = started_recipe(folder) if recipe.stream == "auto" else None
    return draws_of(started or recipe, device).stream
