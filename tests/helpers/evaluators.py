"""Evaluators of tiny runs: distances on the features of a small random network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from helpers.runs import small
from mezzotint.config import Recipe
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate.during_training import make_evaluator
from mezzotint.evaluate.features import FeatureSet, from_module
from mezzotint.evaluate.image_source import from_dataset
from mezzotint.evaluate.references import make_reference
from mezzotint.train.evaluation import Evaluator


class RandomNet(nn.Module):
    """Four numbers per image, from fixed random weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        generator = torch.Generator().manual_seed(5)
        for parameter in self.conv.parameters():
            parameter.data.normal_(generator=generator)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


def random_features() -> FeatureSet:
    """Return the feature set "random"."""
    return from_module(RandomNet(), name="random", dims=4, size=8, channels=1)


def digits_reference(path: Path) -> str:
    """Write statistics of 120 digits at 8 px."""
    images = from_dataset(open_images("digits", size=8, channels=1), "digits", 120)
    make_reference(images, path, [random_features()], keep=60)
    return str(path)


def evaluated_recipe(reference: str, *overrides: str) -> Recipe:
    """Return the small recipe with an evaluation of 50 samples at 64, 128 and 160 images."""
    settings = [
        "evaluate.every_images=64", "evaluate.num_images=50", "evaluate.steps=2",
        "evaluate.batch=16",
    ]  # fmt: skip
    return small(*settings, f"evaluate.reference={reference}", *overrides)


def random_evaluator(recipe: Recipe) -> Evaluator | None:
    """Return the recipe's evaluator, with the feature set "random"."""
    return make_evaluator(recipe, [random_features()])
