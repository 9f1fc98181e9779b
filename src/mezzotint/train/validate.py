"""The error of a denoiser on held-out images at fixed log-SNRs, comparable across families."""

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
    dataset: ImageDataset,
    levels: Sequence[float] = LEVELS,
    count: int = 256,
    seed: int = 0,
    batch: int = 64,
    labels: bool = True,
) -> dict[float, float]:
    """Return the mean squared error of the predicted noise at each log-SNR, with fixed noise.

    Predicting eps = 0 scores 1 at every level.

    Args:
        levels: natural log-SNRs.
        count: images, evenly spread over the dataset.
        batch: images at a time.
        labels: whether a class-conditional network gets the labels, or the null label.
    """
    count = min(count, len(dataset))
    spread = [i * len(dataset) // count for i in range(count)]  # datasets are often sorted by class
    device = next(model.parameters()).device
    totals = torch.zeros(len(levels), dtype=torch.float64)
    training = model.training
    model.eval()
    for start in range(0, count, batch):
        indices = spread[start : start + batch]
        pixels, label = dataset.batch(indices)
        x = to_model_range(pixels.to(device))
        eps = rng.normal("noise", seed, indices, tuple(pixels.shape[1:])).to(device)
        conditional = labels and model.info.config.num_classes > 0
        cond = Cond(label=label.to(device)) if conditional and label is not None else Cond()
        for i, level in enumerate(levels):
            logsnr = torch.full((len(indices),), level, device=device)
            totals[i] += squared_error(model, x, eps, logsnr, cond).double().sum().cpu()
    model.train(training)
    return dict(zip(levels, (totals / count).tolist(), strict=True))


def squared_error(model: Model, x: Tensor, eps: Tensor, logsnr: Tensor, cond: Cond) -> Tensor:
    """Return the mean over elements of (eps - eps_hat)^2, (b,)."""
    return (model(diffuse(x, eps, logsnr), logsnr, cond).eps - eps).square().flatten(1).mean(1)
