"""DPM-Solver++(3M) (arXiv 2211.01095), the multistep solver at third order, and its SDE's."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import (
    Grid,
    Noise,
    gaussian,
    intervals_with_orders,
    level,
    sampler,
)


@sampler("dpmpp_3m")
def dpmpp_3m(
    denoise: Denoiser, z: Image, grid: Grid, cond: Cond, *, lower_order_final: bool = True
) -> Image:
    """Sample at third order, multistep and deterministic; one network call per step.

    A step to +inf returns x. We differ from the authors' code in two ways, without which the
    measured order is 2. The parabola's weight is twice theirs. And the first step, which is of
    order 1 without history, is corrected once the next call gives x at its far end (UniPC's free
    corrector).

    Args:
        z: state at grid[0].
        lower_order_final: take the last two steps to a finite end at orders 2 and 1. The authors'
            code does so in runs of fewer than 10 steps, diffusers of fewer than 15; it helps beyond
            on grids even in u. False keeps order 3 for many steps even in log-SNR.
    """
    return solve(denoise, z, grid, cond, 0.0, gaussian, lower_order_final)


@sampler("sde_dpmpp_3m")
def sde_dpmpp_3m(
    denoise: Denoiser,
    z: Image,
    grid: Grid,
    cond: Cond,
    *,
    eta: Annotated[float, Range(0, 1000)] = 1.0,
    lower_order_final: bool = True,
    noise: Noise = gaussian,
) -> Image:
    """Sample the reverse SDE by the multistep solver with a parabola; one network call per step.

    A step to +inf returns x and draws no noise. k-diffusion's solver of this name gives the
    parabola half our weight, and does not correct the first step.

    Args:
        z: state at grid[0].
        eta: noise put back; 1 is the reverse SDE, 0 is `dpmpp_3m`.
        lower_order_final: as in `dpmpp_3m`.
        noise: draws.
    """
    if eta < 0:
        raise ValueError(f"eta {eta} must be 0 or more")
    return solve(denoise, z, grid, cond, eta, noise, lower_order_final)


def solve(
    denoise: Denoiser,
    z: Image,
    grid: Grid,
    cond: Cond,
    eta: float,
    noise: Noise,
    lower_order_final: bool,
) -> Image:
    """Integrate the reverse SDE with `eta` times its noise, by the parabola through the past."""
    past: list[tuple[Tensor, Image]] = []  # (log-SNR, x), newest first, at most two
    for i, (t, s, order) in enumerate(intervals_with_orders(grid, 3, lower_order_final)):
        x = denoise(z, level(t, z), cond).x
        if s.isinf():
            return x
        if len(past) == 1:
            z = z + slope_weight(past[0][0], t, eta) * (x - past[0][1])
        past = past[: order - 1]
        h = (s - t) / 2  # step in lambda = log(alpha / sigma)
        k = (1 + eta) * h
        # Proposition 4.1, and section 5 for the SDE (eta = 1): z_s = (sigma_s / sigma_t)
        # exp(-eta h) z_t + noise + alpha_s times the integral of (1 + eta) x(lambda)
        # exp((1 + eta) (lambda - lambda_s)), for the parabola through the last three x in Newton's
        # form, in units of the step.
        drawn = sigma(s) * (-torch.expm1(-2 * eta * h)).sqrt() * noise(i, z) if eta else 0.0
        z = sigma(s) / sigma(t) * torch.exp(-eta * h) * z - alpha(s) * torch.expm1(-k) * x
        if past:
            r0 = (t - past[0][0]) / (s - t)
            slope = (x - past[0][1]) / r0
            if len(past) == 2:
                r1 = (past[0][0] - past[1][0]) / (s - t)
                half_bend = (slope - (past[0][1] - past[1][1]) / r1) / (r0 + r1)
                slope = slope + r0 * half_bend
                # 2: half_bend, the second divided difference, is half of the second derivative.
                z = z - alpha(s) * ((torch.expm1(-k) + k) / k**2 - 0.5) * 2 * half_bend
            z = z + slope_weight(t, s, eta) * slope
        z = z + drawn
        past = [(t, x), *past[:1]]
    return z


def slope_weight(t: Tensor, s: Tensor, eta: float) -> Tensor:
    """Return what a rise of x by one along the step from t to s adds to z."""
    k = (1 + eta) * (s - t) / 2
    return alpha(s) * (torch.expm1(-k) / k + 1)
