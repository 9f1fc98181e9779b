"""simple diffusion's multiscale loss of eps (specs/simple-diffusion.md section 3)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch.nn.functional import avg_pool2d

from mezzotint.core.fields import Range
from mezzotint.process import prediction
from mezzotint.process.denoiser import Cond, Image, Model, PerImage
from mezzotint.process.objectives import Objective, objective
from mezzotint.process.objectives.regression import mean_square, residual


def multiscale_mse(target: Image, output: Image, smallest: int = 32) -> PerImage:
    """Return the sum over scales s of 1/s times the mean squared error, pooled to side s.

    Args:
        target, output: (b, c, h, w), e.g. eps and its prediction. The scales are h and its halves
            down to `smallest`; an image below `smallest` has one scale, its own. Where the image is
            not square, s is the shorter side (our choice, as is stopping before an odd side).
        smallest: pixels, at least 1.

    Returns:
        (b,), mean over channels and pixels; the paper's norm sums the channels. Weights are not
        normalised.
    """
    if smallest < 1:
        raise ValueError(
            f"smallest scale {smallest} must be at least 1 pixel; the paper starts at 32"
        )
    error = output - target
    error = error.to(torch.promote_types(error.dtype, torch.float32))
    # sum over s in {32, 64, ..., d} of (1/s) L^s, with L^s = (1/s^2) ||D^s[eps] - D^s[eps_hat]||^2
    loss = mean_square(error) / min(error.shape[2:])
    while min(error.shape[2:]) >= 2 * smallest and not any(side % 2 for side in error.shape[2:]):
        error = avg_pool2d(error, 2)
        loss = loss + mean_square(error) / min(error.shape[2:])
    return loss


@objective("multiscale")
def multiscale(smallest: Annotated[int, Range(1, 16_384, "pixels")] = 32) -> Objective:
    """Return `multiscale_mse` of eps, for any prediction, in pixels; it helps above 256 pixels."""

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        error = residual(model, x, eps, logsnr, cond, prediction.eps)
        return multiscale_mse(torch.zeros_like(error), error, smallest)

    return loss
