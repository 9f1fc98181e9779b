"""A judge of tiny runs: distances on the features of a small random network."""

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


class Net(nn.Module):
    """Four numbers of an image, always the same four."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        draw = torch.Generator().manual_seed(5)
        for parameter in self.conv.parameters():
            parameter.data.normal_(generator=draw)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


def seen() -> FeatureSet:
    """The features "seen"."""
    return from_module(Net(), name="seen", dims=4, size=8, channels=1)


def reference(path: Path) -> str:
    """Statistics of the digits at 8 px."""
    make_reference(
        from_dataset(open_images("digits", size=8, channels=1), "digits", 120),
        path,
        [seen()],
        keep=60,
    )
    return str(path)


def judged(real: str, *overrides: str) -> Recipe:
    """The small run, judged by 50 samples at every 64 images and at its end."""
    words = [
        "evaluate.every_images=64",
        "evaluate.num_images=50",
        "evaluate.steps=2",
        "evaluate.batch=16",
    ]
    return small(*words, f"evaluate.reference={real}", *overrides)


def judge(recipe: Recipe) -> Evaluator | None:
    """The recipe's judge, with the features above."""
    return make_evaluator(recipe, [seen()])
