"""Training data of a recipe, opened without a run."""

from __future__ import annotations

import torch

from mezzotint.config import Recipe
from mezzotint.core.distributed import World
from mezzotint.data.dataset import Dataset
from mezzotint.models import preset_info
from mezzotint.train.dataset import open_data


def open_recipe_data(recipe: Recipe) -> Dataset:
    """Open a recipe's data as one process on the CPU does."""
    world = World(rank=0, size=1, device=torch.device("cpu"))
    return open_data(recipe, preset_info(recipe.preset, **recipe.model), world)
