"""A judge of tiny runs: distances on the features of a small random network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mezzotint.config import Recipe
from mezzotint.data.images import open_images
from mezzotint.evaluate.features import FeatureSet, from_module
from mezzotint.evaluate.references import make_reference
from mezzotint.evaluate.sources import of_images
from mezzotint.recipes.judge import judge_for
from mezzotint.train.judging import Judge
from runs import small


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
    make_reference(of_images(open_images("digits", size=8, channels=1), "digits", 120), path, [seen()], keep=60)
    return str(path)


def judged(real: str, *overrides: str) -> Recipe:
    """The small run, judged by 50 samples at every 64 images and at its end."""
    words = ["evaluate.every_images=64", "evaluate.n=50", "evaluate.steps=2", "evaluate.batch=16"]
    return small(*words, f"evaluate.reference={real}", *overrides)


def judge(recipe: Recipe) -> Judge | None:
    """The recipe's judge, with the features above."""
    return judge_for(recipe, [seen()])
