"""JiT's sampler (arXiv 2511.13720; specs/jit.md section 2): Heun's method in z along t."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Cond, Denoiser, Image, Schedule
from mezzotint.process.samplers import Grid, level, points, sampler
from mezzotint.process.samplers.grids import check_steps, finish_grid, grid, line

NoiseScale = Annotated[float, Range(1e-3, 1000, "JiT's size / 256")]
FIRST = 1e-9  # of t, since t = 0 is log-SNR -inf


@grid("flow")
def flow(
    schedule: Schedule, steps: int, *, noise_scale: NoiseScale = 1.0, clean: bool = True
) -> Tensor:
    """Step evenly in t of z = t x + (1 - t) e from noise (t = 1e-9) to the image (t = 1).

    Args:
        noise_scale: standard deviation s of e; log-SNR = 2 ln(t / ((1 - t) s)).
        clean: whether the last point is t = 1, log-SNR +inf; else it is t = 1 - 1 / (steps + 1).
    """
    check_steps(steps)
    t = line(0.0, 1.0, steps + 1 if clean else steps + 2)[:-1]
    t[0] = FIRST
    return finish_grid(2 * (torch.logit(t) - math.log(noise_scale)), clean)


@sampler("flow_heun")
def flow_heun(
    denoise: Denoiser,
    z: Image,
    grid: Grid,
    cond: Cond,
    *,
    noise_scale: NoiseScale = 1.0,
    clamp: Annotated[float, Range(0, 1, "JiT's is 0.05")] = 0.05,
) -> Image:
    """Sample by Heun's method on dz/dt = v = (x - z) / max(1 - t, clamp); the last step is Euler's.

    It averages v, EDM's `heun` eps. With the clamp the last steps do not finish: with a perfect
    denoiser 50 steps end 0.017 of the way back to the noise, 2.2 grey levels at s = 1. The
    published FIDs contain it; clamp=0 leaves it out.

    Args:
        z: state at grid[0].
        noise_scale: the network's, see `flow`; the grid is free.
        clamp: least 1 - t of the division.
    """
    shift = math.log(noise_scale)

    def scale(logsnr: Tensor) -> Tensor:
        # z_jit = sqrt(t^2 + (1 - t)^2 s^2) z
        t = torch.sigmoid(logsnr / 2 + shift)
        return torch.hypot(t, torch.sigmoid(-logsnr / 2 - shift) * noise_scale)

    def velocity(state: Image, logsnr: Tensor) -> Image:
        x = denoise((state / scale(logsnr)).to(z.dtype), level(logsnr, z), cond).x
        rest = torch.sigmoid(-logsnr / 2 - shift).clamp(min=clamp)
        return (x - state) / rest

    levels = points(grid)
    state = scale(levels[0]) * z
    for now, then in pairwise(levels):
        # 1 - t is exact near the clean end, t is not.
        step = torch.sigmoid(-now / 2 - shift) - torch.sigmoid(-then / 2 - shift)
        v = velocity(state, now)
        if then is not levels[-1]:
            v = (v + velocity(state + step * v, then)) / 2
        state = state + step * v
    return state / scale(levels[-1])
