"""DDIM (arXiv 2010.02502), deterministic or stochastic."""

from __future__ import annotations

import torch

from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import Grid, Noise, gaussian, intervals, level, sampler


@sampler("ddim")
def ddim(
    denoise: Denoiser,
    z: Image,
    grid: Grid,
    cond: Cond,
    *,
    eta: float = 0.0,
    noise: Noise = gaussian,
) -> Image:
    """Sample at first order; one network call per step.

    Args:
        z: state at grid[0].
        eta: 0 is deterministic (the probability flow), 1 is DDPM's ancestral step with the
            posterior variance.
        noise: draws, used when eta > 0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must lie between 0 (deterministic) and 1 (ancestral)")
    for i, (t, s) in enumerate(intervals(grid)):
        x, eps, _ = denoise(z, level(t, z), cond)
        # DDIM eq. 16: the noise's variance is eta^2 c sigma_s^2, c = 1 - exp(logsnr_t - logsnr_s).
        fresh = eta**2 * -torch.expm1(t - s)
        # DDIM eq. 12
        z = alpha(s) * x + sigma(s) * (1 - fresh).sqrt() * eps
        if eta > 0 and s.isfinite():
            z = z + sigma(s) * fresh.sqrt() * noise(i, z)
    return z
