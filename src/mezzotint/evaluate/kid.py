"""Kernel Inception Distance with its standard error (Bińkowski et al. 2018)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.core.rng import philox
from mezzotint.evaluate.metrics import Array, wide


class KID(NamedTuple):
    """Squared maximum mean discrepancy, unbiased (it may be negative), and the standard error of that value."""

    value: float
    standard_error: float


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    # Bińkowski et al. 2018, section 3: k(x, y) = (x.y / d + 1)^3.
    return (a @ b.T / a.shape[1] + 1) ** 3


def _sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row sums of the three kernel matrices: x with other x, y with other y, x with y, y with x."""
    kxx, kyy, kxy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    return kxx.sum(1) - kxx.diagonal(), kyy.sum(1) - kyy.diagonal(), kxy.sum(1), kxy.sum(0)


def squared_mmd(x: Array, y: Array) -> float:
    """Unbiased estimate of the squared MMD with the cubic kernel (Gretton et al. 2012, eq. 3); (m, d), (n, d)."""
    x, y = wide(x), wide(y)
    xx, yy, xy, _ = _sums(x, y)
    m, n = len(x), len(y)
    return (xx.sum() / (m * (m - 1)) + yy.sum() / (n * (n - 1)) - 2 * xy.sum() / (m * n)).item()


def _jackknife_error(x: Tensor, y: Tensor) -> float:
    """Standard error of `squared_mmd` by leaving out each image of either side in turn (Efron and Stein 1981)."""
    xx, yy, xy, yx = _sums(x, y)
    m, n = len(x), len(y)
    cross = xy.sum()
    without_x = (xx.sum() - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (cross - xy) / ((m - 1) * n)
    without_y = (yy.sum() - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (cross - yx) / ((n - 1) * m)
    variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
    return variance.sqrt().item()


def kid(
    real: Array, fake: Array, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> KID:
    """Mean unbiased squared MMD over random subsets of both sides, drawn without replacement.

    The standard error is the subsets' standard deviation over the root of the number of subsets that could be disjoint,
    since overlapping ones are not independent (our choice; papers mostly print the deviation itself). When no subset
    can be drawn, because a side has no more than `subset_size` images, all images are used once and the error is the
    jackknife's.

    Args:
        real, fake: features, (n, d) and (m, d), at least three rows each.
        subset_size, subsets: 1000 and 100 are the field's habit.
        seed: of the subsets.
    """
    x, y = wide(real), wide(fake)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (images >= 3, d) twice"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features hold NaN or infinity")
    if subset_size < 2 or subsets < 2:
        raise ValueError(
            f"subset_size {subset_size} and subsets {subsets} must be at least 2; e.g. 1000 and 100"
        )
    if min(len(x), len(y)) <= subset_size:
        return KID(squared_mmd(x, y), _jackknife_error(x, y))
    values: list[float] = []
    for i in range(subsets):
        draw = philox("resample", seed, i)
        rows = [
            torch.from_numpy(draw.choice(len(side), subset_size, replace=False)) for side in (x, y)
        ]
        values.append(squared_mmd(x[rows[0].to(x.device)], y[rows[1].to(y.device)]))
    spread = torch.tensor(values, dtype=torch.float64).std().item()
    disjoint = min(subsets, min(len(x), len(y)) // subset_size)
    return KID(sum(values) / subsets, spread / disjoint**0.5)
