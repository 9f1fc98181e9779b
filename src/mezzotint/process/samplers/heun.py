"""EDM's sampler (arXiv 2206.00364): Heun's method in sigma, with churn."""

from __future__ import annotations

import math
from typing import Annotated

import torch

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha
from mezzotint.process.samplers import Grid, Noise, gaussian, intervals, level, sampler


@sampler("heun")
def heun(
    denoise: Denoiser,
    z: Image,
    grid: Grid,
    cond: Cond,
    *,
    s_churn: Annotated[float, Range(0, 1e6)] = 0.0,
    s_min: Annotated[float, Range(0, 1e6)] = 0.0,
    s_max: float = math.inf,
    s_noise: Annotated[float, Range(0, 1000)] = 1.0,
    noise: Noise = gaussian,
) -> Image:
    """Sample by EDM's algorithm 2, at second order; two network calls per step, one to +inf.

    EDM's state is y = x + sigma eps with sigma = exp(-logsnr / 2): y = z / alpha here, and dy /
    dsigma = eps.

    Args:
        z: state at grid[0].
        s_churn: noise put back per run, 0 for the deterministic sampler; spread evenly over the
            steps.
        s_min, s_max: EDM's sigma between which churn acts.
        s_noise: standard deviation of the noise put back.
        noise: draws, used when s_churn > 0.
    """
    if min(s_churn, s_min, s_noise) < 0 or not s_min <= s_max:
        raise ValueError(
            f"s_churn {s_churn}, s_noise {s_noise} and s_min {s_min} <= s_max {s_max} must be at "
            "least 0"
        )
    steps = len(grid) - 1
    for i, (t, s) in enumerate(intervals(grid)):
        y = z / alpha(t)
        now, then = torch.exp(-t / 2), torch.exp(-s / 2)
        if s_churn > 0 and s_min <= now <= s_max:
            # Algorithm 2, lines 5-6: up to sigma (1 + gamma), gamma = min(s_churn / N, sqrt(2) -
            # 1).
            hat = now * (1 + min(s_churn / steps, math.sqrt(2) - 1))
            y = y + (hat**2 - now**2).sqrt() * s_noise * noise(i, y)
            now, t = hat, -2 * hat.log()
        x, d, _ = denoise(alpha(t) * y, level(t, z), cond)
        if s.isinf():
            return x
        # Lines 8-11: Euler's step, then the mean of the slopes at both ends.
        z = alpha(s) * (y + (then - now) * d)
        d_then = denoise(z, level(s, z), cond).eps
        z = alpha(s) * (y + (then - now) * (d + d_then) / 2)
    return z
