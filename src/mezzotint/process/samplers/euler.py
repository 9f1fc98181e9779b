"""Euler's method along the straight line of rectified flow (arXiv 2209.03003)."""

from __future__ import annotations

import torch

from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha
from mezzotint.process.samplers import Grid, intervals, level, sampler


@sampler("euler")
def euler(denoise: Denoiser, z: Image, grid: Grid, cond: Cond) -> Image:
    """Sample at first order, deterministic; one network call per step.

    The state of flow matching is y = (1 - time) x + time eps with velocity eps - x, so time =
    sigmoid(-logsnr / 2) and y = z (1 - time) / alpha. Where a denoiser's x and eps agree with z,
    the step is DDIM's (eta = 0).
    """
    for t, s in intervals(grid):
        x, eps, _ = denoise(z, level(t, z), cond)
        now, then = torch.sigmoid(-t / 2), torch.sigmoid(-s / 2)
        # Rectified flow eq. 1: dy / dtime = eps - x
        y = torch.sigmoid(t / 2) / alpha(t) * z + (then - now) * (eps - x)
        z = alpha(s) / torch.sigmoid(s / 2) * y
    return z
