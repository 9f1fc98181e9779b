"""Few steps of a consistency-tuned model (arXiv 2303.01469, algorithm 1; specs/consistency.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mezzotint.process.denoiser import Cond, Denoiser, Image, Schedule
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import Grid, Noise, gaussian, intervals, level, sampler
from mezzotint.process.samplers.grids import finish_grid, grid

# Steps -> sigma before each of them. ECT gives those of 1 and 2; the middle of 4 is our choice.
SIGMAS = {1: (80.0,), 2: (80.0, 0.821), 4: (80.0, 5.0, 0.821, 0.2)}


@grid("consistency")
def consistency_levels(schedule: Schedule, steps: int) -> Tensor:
    """Return the log-SNRs of 1, 2 or 4 steps, from sigma 80, whatever the schedule.

    ECT's two steps meet at sigma 0.821; four at 5, 0.821 and 0.2.
    """
    if steps not in SIGMAS:
        raise ValueError(
            f"{steps} steps of a consistency model; it takes 1, 2 or 4, e.g. steps=2, and gets no "
            "better with more"
        )
    return finish_grid(
        torch.tensor([-2 * math.log(s) for s in SIGMAS[steps]], device="cpu").double(), clean=True
    )


@sampler("consistency")
def consistency(
    denoise: Denoiser, z: Image, grid: Grid, cond: Cond, *, noise: Noise = gaussian
) -> Image:
    """Sample by turns: denoise at once, then add fresh noise for the next, cleaner level.

    One to four steps of a network tuned by the objective of that name; of any other the first step
    is a blurred mean.

    Args:
        z: state at grid[0].
    """
    for i, (t, s) in enumerate(intervals(grid)):
        x = denoise(z, level(t, z), cond).x
        # x + sigma_s n, scaled by alpha_s; the last level is clean
        fresh = sigma(s) * noise(i, z) if s.isfinite() else 0
        z = (alpha(s) * x + fresh).to(z.dtype)
    return z
