"""The held-out error of the predicted noise, against its definition."""

from __future__ import annotations

import pytest
import torch

import mezzotint as mz
from mezzotint.core import rng
from mezzotint.data.image_dataset import open_images
from mezzotint.data.transforms import to_model_range
from mezzotint.process.denoiser import Cond
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.train.validate import eps_mse_by_level


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = mz.create_model("uvit-tiny", size=8, channels=1, width=16, depth=2, heads=2)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("labels", [True, False])
def test_it_is_the_mean_over_images_spread_over_the_set(model, labels):
    data = open_images("digits", size=8, channels=1)
    found = eps_mse_by_level(
        model, data, levels=(-2.0, 3.0), count=5, seed=3, batch=2, labels=labels
    )
    where = [i * len(data) // 5 for i in range(5)]
    pixels, label = data.batch(where)
    x, eps = to_model_range(pixels), rng.normal("noise", 3, where, (1, 8, 8))
    model.eval()
    for level, error in found.items():
        logsnr = torch.full((5,), level)
        a, s = float(alpha(logsnr[0])), float(sigma(logsnr[0]))
        with torch.no_grad():
            guess = model(a * x + s * eps, logsnr, Cond(label=label if labels else None)).eps
        assert error == pytest.approx(float((guess - eps).square().mean()), rel=1e-5)
    other = eps_mse_by_level(model, data, levels=(-2.0,), count=5, seed=3, labels=not labels)
    assert other[-2.0] != found[-2.0]


def test_it_leaves_the_mode_as_it_was(model):
    data = open_images("digits", size=8, channels=1)
    for training in (True, False):
        model.train(training)
        eps_mse_by_level(model, data, levels=(0.0,), count=2)
        assert model.training is training
