"""DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2)."""

from __future__ import annotations

import torch

from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import Grid, intervals, level, sampler


@sampler("dpmpp_2m")
def dpmpp_2m(denoise: Denoiser, z: Image, grid: Grid, cond: Cond) -> Image:
    """Sample at second order, multistep and deterministic; one network call per step.

    A step to +inf returns x. The first step has no history and is first order; a single one keeps
    the order.
    """
    past: Image | None = None
    h_past = torch.zeros((), device="cpu")
    for t, s in intervals(grid):
        x = denoise(z, level(t, z), cond).x
        if s.isinf():
            return x
        h = (s - t) / 2  # step in lambda = log(alpha / sigma)
        # Algorithm 2: D = (1 + 1 / 2r) x - (1 / 2r) x_past, r = h_past / h
        d = x if past is None else x + h / (2 * h_past) * (x - past)
        # Proposition 4.1 with x constant: z_s = (sigma_s / sigma_t) z_t - alpha_s (exp(-h) - 1) D
        z = sigma(s) / sigma(t) * z - alpha(s) * torch.expm1(-h) * d
        past, h_past = x, h
    return z
