"""The error of a denoiser on held-out images at fixed log-SNRs, comparable across every family and prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mezzotint.core import rng
from mezzotint.data.image_dataset import ImageDataset
from mezzotint.data.transforms import to_model_range
from mezzotint.process.denoiser import Cond, Model
from mezzotint.process.logsnr import diffuse

LEVELS = (-6.0, -3.0, 0.0, 3.0, 6.0)  # natural log-SNR, from nearly noise to nearly clean


@torch.no_grad()
def eps_mse_by_level(
    model: Model,
    images: ImageDataset,
    levels: Sequence[float] = LEVELS,
    count: int = 256,
    seed: int = 0,
    batch: int = 64,
) -> dict[float, float]:
    """Mean squared error of the implied noise, per log-SNR, on `count` images spread over the set, with fixed noise.

    Predicting eps = 0 scores 1 at every level. Labels are given where the network takes them.
    """
    count = min(count, len(images))
    spread = [i * len(images) // count for i in range(count)]  # sets are often sorted by class
    device = next(model.parameters()).device
    totals = torch.zeros(len(levels), dtype=torch.float64)
    training = model.training
    model.eval()
    for start in range(0, count, batch):
        numbers = spread[start : start + batch]
        pixels, labels = images.batch(numbers)
        x = to_model_range(pixels.to(device))
        eps = rng.normal("noise", seed, numbers, tuple(pixels.shape[1:])).to(device)
        conditional = model.info.config.num_classes > 0
        cond = Cond(label=labels.to(device)) if conditional and labels is not None else Cond()
        for i, level in enumerate(levels):
            logsnr = torch.full((len(numbers),), level, device=device)
            totals[i] += squared_error(model, x, eps, logsnr, cond).double().sum().cpu()
    model.train(training)
    return dict(zip(levels, (totals / count).tolist(), strict=True))


def squared_error(model: Model, x: Tensor, eps: Tensor, logsnr: Tensor, cond: Cond) -> Tensor:
    """||eps - eps_hat||^2 per element, one number per image."""
    return (model(diffuse(x, eps, logsnr), logsnr, cond).eps - eps).square().flatten(1).mean(1)
