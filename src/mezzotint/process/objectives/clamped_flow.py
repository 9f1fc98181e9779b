"""JiT's loss (arXiv 2511.13720): the flow velocity's error, its division clamped."""

from __future__ import annotations

import math
from typing import Annotated

import torch

from mezzotint.core.fields import Range
from mezzotint.process import prediction
from mezzotint.process.denoiser import Cond, Image, Model, PerImage
from mezzotint.process.objectives import Objective, objective
from mezzotint.process.objectives.regression import mean_square, residual


@objective("clamped_flow")
def clamped_flow(
    noise_scale: Annotated[float, Range(1e-3, 1000, "JiT's size / 256")] | None = None,
    clamp: Annotated[float, Range(1e-6, 1, "JiT's is 0.05")] = 0.05,
) -> Objective:
    """Return the mean squared error of v = (x - z) / max(1 - t, clamp), z = t x + (1 - t) e.

    Args:
        noise_scale: standard deviation s of e, t = sigmoid(logsnr / 2 + ln s); None is that of the
            network's config, 1 where it has none.
        clamp: least 1 - t of the division.
    """

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        own = getattr(getattr(model.info, "config", None), "noise_scale", 1.0)
        scale = own if noise_scale is None else noise_scale
        # specs/jit.md section 1: the x-MSE times max(1 - t, 0.05)^-2
        rest = torch.sigmoid(-logsnr / 2 - math.log(scale)).clamp(min=clamp)
        error = mean_square(residual(model, x, eps, logsnr, cond, prediction.x))
        return error * (rest**-2).to(error.dtype)

    return loss
