"""SDE-DPM-Solver++(2M), the 2M solver of the reverse SDE (arXiv 2211.01095 section 5, appendix)."""

from __future__ import annotations

import torch

from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import Grid, Noise, gaussian, intervals, level, sampler


@sampler("sde_dpmpp_2m")
def sde_dpmpp_2m(
    denoise: Denoiser, z: Image, grid: Grid, cond: Cond, *, noise: Noise = gaussian
) -> Image:
    """Sample by a stochastic multistep solver; one network call per step.

    A step to +inf returns x and draws no noise. On Gaussian data the variance of its samples
    converges at second order, that of `ancestral` at first.

    Args:
        z: state at grid[0].
        noise: draws.
    """
    past: Image | None = None
    h_past = torch.zeros((), device="cpu")
    for i, (t, s) in enumerate(intervals(grid)):
        x = denoise(z, level(t, z), cond).x
        if s.isinf():
            return x
        h = (s - t) / 2  # step in lambda = log(alpha / sigma)
        d = x if past is None else x + h / (2 * h_past) * (x - past)
        # SDE-DPM-Solver++(2M), midpoint form: twice the data term's exponent, and z loses exp(-h)
        # more to fresh noise.
        fresh = -torch.expm1(-2 * h)
        z = (
            sigma(s) / sigma(t) * torch.exp(-h) * z
            + alpha(s) * fresh * d
            + sigma(s) * fresh.sqrt() * noise(i, z)
        )
        past, h_past = x, h
    return z
