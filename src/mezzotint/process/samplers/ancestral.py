"""Ancestral sampling: DDPM (arXiv 2006.11239), with simple diffusion's or a learned variance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha
from mezzotint.process.samplers import Grid, Noise, gaussian, intervals, level, sampler

MIX = {"posterior": 0.0, "upper": 1.0}


def mean_and_bounds(z: Image, x: Image, t: Tensor, s: Tensor) -> tuple[Image, Tensor, Tensor]:
    """Return the mean and the logs of the smallest and largest variance of the step from t to s.

    Args:
        z: state at t.
        x: the denoised image.
        t, s: log-SNRs with s > t, float64 scalars; s may be +inf, where the mean is x and both logs
            are -inf.
    """
    # simple diffusion appendix: c = 1 - exp(logsnr_t - logsnr_s), mean = alpha_s ((1 - c) z /
    # alpha_t + c x)
    c = -torch.expm1(t - s)
    mean = alpha(s) * ((1 - c) / alpha(t) * z + c * x)
    # DDPM section 3.2: the posterior's variance c sigma_s^2, and c sigma_t^2 (beta_t of a table).
    return mean, c.log() + logsigmoid(-s), c.log() + logsigmoid(-t)


@sampler("ancestral")
def ancestral(
    denoise: Denoiser,
    z: Image,
    grid: Grid,
    cond: Cond,
    *,
    variance: str | float = "posterior",
    last: str = "sample",
    noise: Noise = gaussian,
) -> Image:
    """Sample by DDPM's steps on any grid; one network call per step.

    The step to +inf returns x and draws no noise.

    Args:
        z: state at grid[0].
        variance: "posterior" (or 0), "upper" (or 1), a number between for simple diffusion's
            mixture of the two in log (its value in the paper is not known; 0 is our default), or
            "learned" for a denoiser that returns `Denoised.var`.
        last: where the grid ends with noise left (clean=False): "sample" draws at its last step as
            at every other, "mean" returns the mean of that step, as lucidrains' continuous-time
            DDPM does.
        noise: draws.
    """
    mix = MIX.get(variance, variance) if isinstance(variance, str) else variance
    if mix != "learned" and (isinstance(mix, str) or not 0 <= mix <= 1):
        raise ValueError(
            f"variance {variance!r} must be posterior, upper, learned or a number between 0 and 1"
        )
    if last not in ("sample", "mean"):
        raise ValueError(f"last {last!r} must be sample or mean")
    for i, (t, s) in enumerate(intervals(grid)):
        x, _, var = denoise(z, level(t, z), cond)
        if s.isinf():
            return x
        z, low, high = mean_and_bounds(z, x, t, s)
        if last == "mean" and i == len(grid) - 2:
            return z
        if isinstance(mix, str):
            if var is None:
                raise ValueError(
                    "variance 'learned' needs a denoiser that predicts one; try posterior or upper"
                )
            # Improved DDPM eq. 15: the network's answer in -1 ... 1 moves between the logs.
            fraction = (var + 1) / 2
        else:
            fraction = mix
        z = z + torch.exp((fraction * high + (1 - fraction) * low) / 2) * noise(i, z)
    return z
