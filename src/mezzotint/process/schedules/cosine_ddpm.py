"""Cosine schedule of Improved DDPM, discrete and continuous."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Schedule
from mezzotint.process.schedules import in_float64, schedule
from mezzotint.process.schedules.ddpm import Table, TableSteps, checked_steps


def _check(s: float) -> None:
    if not s > 0:
        raise ValueError(f"offset s {s} must be positive; Improved DDPM uses 0.008")


@schedule("cosine_vp")
def cosine_vp(
    s: Annotated[float, Range(0, 1000, "Improved DDPM uses 0.008", above=True)] = 0.008,
) -> Schedule:
    """Return the curve of Improved DDPM eq. 17 with u = t: +inf at t = 0, pure noise at t = 1."""
    _check(s)

    @in_float64
    def logsnr(u: Tensor) -> Tensor:
        # Improved DDPM eq. 17: alpha^2 = f(t) / f(0), f(t) = cos^2(pi/2 (t + s) / (1 + s)).
        angle = math.pi / 2 * (u + s) / (1 + s)
        start = math.pi / 2 * s / (1 + s)
        # cos(pi/2 (t + s) / (1 + s)) = sin(pi/2 (1 - t) / (1 + s)), which is exactly 0 at t = 1;
        # f(0) - f(t) = sin(a + b) sin(a - b), which does not cancel near t = 0.
        return 2 * torch.log(torch.sin(math.pi / 2 * (1 - u) / (1 + s))) - torch.log(
            torch.sin(angle + start) * torch.sin(angle - start)
        )

    return logsnr


@schedule("cosine_ddpm")
def cosine_ddpm(
    steps: TableSteps = 1000,
    s: Annotated[float, Range(0, 1000, "Improved DDPM uses 0.008", above=True)] = 0.008,
) -> Table:
    """Return Improved DDPM's cosine table: the betas of eq. 17 at t = n / N, none above 0.999."""
    _check(s)
    t = torch.arange(checked_steps(steps) + 1, dtype=torch.float64, device="cpu") / steps
    f = torch.cos(math.pi / 2 * (t + s) / (1 + s)) ** 2
    return Table((1 - f[1:] / f[:-1]).clamp(max=0.999))
