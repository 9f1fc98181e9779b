"""DPM-Solver++ single-step, orders 1 to 3 (arXiv 2211.01095).

With the "fast" plan of DPM-Solver (arXiv 2206.00927).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import Grid, level, points, sampler


def fast_plan(calls: int, order: int) -> list[int]:
    """Return the orders of the steps that use `calls` >= 1 network calls.

    DPM-Solver section 3.4; specs/dimr.md 6.1.
    """
    if order < 3:
        return [order] * (calls // order) + [1] * (calls % order)
    threes, rest = divmod(calls, 3)
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


def step_orders(grid_intervals: int, order: int, plan: str, clean: bool) -> list[int]:
    """Return the order of each step, which is also the number of intervals that it jumps over.

    Args:
        plan: "fast", or "fixed" for steps of `order` only (DPM-Solver's `singlestep_fixed`).
        clean: the last interval goes to +inf, in a step of order 1 of its own.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order {order} must be 1, 2 or 3")
    if plan not in ("fast", "fixed"):
        raise ValueError(f"plan {plan!r} must be fast or fixed")
    if plan == "fast":
        orders = fast_plan(grid_intervals, order)
        return [*orders[:-1], orders[-1] - 1, 1] if clean and orders[-1] > 1 else orders
    whole, rest = divmod(grid_intervals - clean, order)
    if rest:
        raise ValueError(
            f"plan fixed needs a multiple of order {order} steps{', and one' if clean else ''}; "
            f"given {grid_intervals}, try {order * (whole + 1) + clean}"
        )
    return [order] * whole + [1] * clean


@sampler("dpmpp_singlestep")
def dpmpp_singlestep(
    denoise: Denoiser, z: Image, grid: Grid, cond: Cond, *, order: int = 3, plan: str = "fast"
) -> Image:
    """Sample by Runge-Kutta steps in data prediction; one network call per interval of the grid.

    A step of order k jumps over k intervals and calls the network at the points between; k = 3 is
    third order where those lie at 1/3 and 2/3 in log-SNR. The fast plan ends in lower orders; an
    interval to +inf is a step of order 1 of its own, which returns x.

    Args:
        z: state at grid[0].
        order: 1, 2 or 3. DiMR samples with 3 on the grid even(..., end=1e-3, clean=False).
        plan: "fast", or "fixed" for steps of `order` only; the grid must then have a multiple of
            `order` intervals, and one more to +inf.
    """
    logsnr = points(grid)
    start = 0
    for size in step_orders(len(logsnr) - 1, order, plan, bool(logsnr[-1].isinf())):
        z = step(denoise, z, logsnr[start : start + size + 1], cond)
        start += size
    return z


def step(denoise: Denoiser, z: Image, at: list[Tensor], cond: Cond) -> Image:
    """Step from log-SNR at[0] to at[-1]; the order is the number of intervals in `at`."""
    t, s = at[0], at[-1]
    h = (s - t) / 2  # in lambda = log(alpha / sigma)

    def phi(a: Tensor) -> Tensor:
        return torch.expm1(-a)

    def linear(to: Tensor) -> Image:
        # DPM-Solver++ proposition 4.1 with x constant: DDIM's step (specs/dimr.md 6.1, o1).
        return sigma(to) / sigma(t) * z - alpha(to) * phi((to - t) / 2) * d0

    d0 = denoise(z, level(t, z), cond).x
    if len(at) == 2:
        return linear(s)

    # DPM-Solver++ algorithm 1 with r1 given by the grid (specs/dimr.md 6.1, o2).
    r1 = (at[1] - t) / (s - t)
    d1 = denoise(linear(at[1]), level(at[1], z), cond).x - d0
    if len(at) == 3:
        return linear(s) - alpha(s) * phi(h) / (2 * r1) * d1

    # DPM-Solver-3 of arXiv 2206.00927, algorithm 2, in data prediction (specs/dimr.md 6.1, o3).
    r2 = (at[2] - t) / (s - t)
    u2 = linear(at[2]) + r2 / r1 * alpha(at[2]) * (phi(r2 * h) / (r2 * h) + 1) * d1
    d2 = denoise(u2, level(at[2], z), cond).x - d0
    return linear(s) + alpha(s) / r2 * (phi(h) / h + 1) * d2
