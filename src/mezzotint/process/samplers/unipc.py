"""UniPC (arXiv 2302.04867) in data prediction."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mezzotint.process.denoiser import Cond, Denoiser, Image
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import Grid, intervals_with_orders, level, sampler

solve: Callable[[Tensor, Tensor], Tensor] = torch.linalg.solve  # pyright: ignore


@sampler("unipc")
def unipc(
    denoise: Denoiser,
    z: Image,
    grid: Grid,
    cond: Cond,
    *,
    order: int = 3,
    lower_order_final: bool = True,
    variant: str = "bh2",
) -> Image:
    """Predict at `order` and correct with the next step's call; one network call per step.

    The corrector adds one to the predictor's order (UniPC section 3): measured 2, 3 and 4 for 1, 2
    and 3 without `lower_order_final`. A step to +inf returns x; the last step has no corrector,
    which would cost one more call.

    Args:
        z: state at grid[0].
        order: of the predictor, 1 to 3. The first steps use what history there is.
        lower_order_final: lower the order to 2 and 1 in the last two steps to a finite end, as the
            authors' code does. False keeps `order` for many steps even in log-SNR.
        variant: the paper's B(h), "bh1" for h and "bh2" for exp(h) - 1. It acts where one
            difference is known: in a predictor of order 2 and a corrector of order 1. The paper
            takes bh1 without guidance in few steps, bh2 with guidance.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order {order} must be 1, 2 or 3")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant {variant!r} must be bh1 or bh2")
    past: list[tuple[Tensor, Image]] = []  # (log-SNR, x), newest first, at most `order`
    before = z
    for t, s, highest in intervals_with_orders(grid, order, lower_order_final):
        x = denoise(z, level(t, z), cond).x
        if past:
            z = update(before, past[0][0], t, [*past[:1], (t, x), *past[1:]], variant)
        past = [(t, x), *past[: highest - 1]]
        if s.isinf():
            return x
        before, z = z, update(z, t, s, past, variant)
    return z


def update(
    z: Image, t: Tensor, s: Tensor, known: list[tuple[Tensor, Image]], variant: str
) -> Image:
    """Return z at s from z at t by UniPC's predictor, or its corrector if x at s is known.

    UniPC section 3.

    Args:
        known: the network's answers (log-SNR, x), the one at t first.
    """
    h = (s - t) / 2  # step in lambda = log(alpha / sigma)
    x = known[0][1]
    z = sigma(s) / sigma(t) * z - alpha(s) * torch.expm1(-h) * x
    if len(known) == 1:
        return z
    r = torch.stack([(at - t) / (s - t) for at, _ in known[1:]])
    weight = coefficients(h, r, variant)
    for r_m, weight_m, (_, x_m) in zip(r, weight, known[1:], strict=True):
        z = z - alpha(s) * weight_m / r_m * (x_m - x)
    return z


def coefficients(h: Tensor, r: Tensor, variant: str) -> Tensor:
    """Return the weights B(h) rho of the differences at fractions r of the step h.

    UniPC section 3: R(h) rho = b / B(h). B(h) cancels but for one unknown, whose rho is
    1/2, its limit for h -> 0, as in the paper, which keeps the order.
    """
    if len(r) == 1:
        return (-h if variant == "bh1" else torch.expm1(-h)) / 2 * torch.ones_like(r)
    # Data prediction: phi_1 = (exp(-h) - 1) / -h, phi_{k+1} = (phi_k - 1 / k!) / -h.
    phi = torch.expm1(-h) / -h
    b: list[Tensor] = []
    for k in range(1, len(r) + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        b.append(-h * phi * math.factorial(k))
    powers = r[None] ** torch.arange(len(r), dtype=r.dtype, device=r.device)[:, None]
    return solve(powers, torch.stack(b))
