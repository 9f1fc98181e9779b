"""Kernel Inception Distance and its standard error (Bińkowski et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.core.rng import philox
from mezzotint.evaluate.metrics import Array, to_float64


class KID(NamedTuple):
    """Unbiased squared maximum mean discrepancy, which may be negative, and its standard error."""

    value: float
    standard_error: float


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    # Bińkowski et al. 2018, section 3: k(x, y) = (x.y / d + 1)^3.
    return (a @ b.T / a.shape[1] + 1) ** 3


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return row sums of the kernel: x with other x, y with other y, x with y, y with x."""
    kxx, kyy, kxy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    return kxx.sum(1) - kxx.diagonal(), kyy.sum(1) - kyy.diagonal(), kxy.sum(1), kxy.sum(0)


def squared_mmd(x: Array, y: Array) -> float:
    """Return the unbiased squared MMD, x (m, d), y (n, d) (Gretton et al. 2012, eq. 3)."""
    x, y = to_float64(x), to_float64(y)
    xx, yy, xy, _ = _kernel_sums(x, y)
    m, n = len(x), len(y)
    return (xx.sum() / (m * (m - 1)) + yy.sum() / (n * (n - 1)) - 2 * xy.sum() / (m * n)).item()


def _jackknife_error(x: Tensor, y: Tensor) -> float:
    """Return the standard error of `squared_mmd`, leaving out one image at a time.

    Each image of either side is left out once (Efron and Stein 1981).
    """
    xx, yy, xy, yx = _kernel_sums(x, y)
    m, n = len(x), len(y)
    cross = xy.sum()
    without_x = (xx.sum() - 2 * xx) / ((m - 1) * (m - 2)) - 2 * (cross - xy) / ((m - 1) * n)
    without_y = (yy.sum() - 2 * yy) / ((n - 1) * (n - 2)) - 2 * (cross - yx) / ((n - 1) * m)
    variance = (m - 1) * without_x.var(correction=0) + (n - 1) * without_y.var(correction=0)
    return variance.sqrt().item()


def kid(
    real: Array, fake: Array, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> KID:
    """Return the mean unbiased squared MMD over random subsets, drawn without replacement.

    The standard error is the subsets' standard deviation divided by the root of the number of
    subsets that could be disjoint, since overlapping subsets are not independent (our choice; most
    papers print the deviation itself). If a side has no more than `subset_size` images, all images
    are used once and the standard error is the jackknife's.

    Args:
        real, fake: features, (n, d) and (m, d), at least three rows each.
        subset_size, subsets: 1000 and 100 in most papers.
        seed: of the subsets.
    """
    x, y = to_float64(real), to_float64(fake)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(
            f"features of shapes {tuple(x.shape)} and {tuple(y.shape)}; expected (images >= 3, d) "
            "for both"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features hold NaN or infinity")
    if subset_size < 2 or subsets < 2:
        raise ValueError(
            f"subset_size {subset_size} and subsets {subsets} must be at least 2, e.g. 1000 and 100"
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


class KernelDistance:
    """The unbiased squared MMD to real features, whose own part is computed once."""

    def __init__(self, real: Array):
        self.real = to_float64(real)
        n = len(self.real)
        if n < 2:
            raise ValueError(f"{n} real images; a kernel distance needs at least two")
        # In parts, since the kernel of 10,000 images with themselves takes 800 MB.
        sums = [
            _kernel(part, self.real).sum() - _diagonal(part).sum() for part in self.real.split(1000)
        ]
        self.own = torch.stack(sums).sum() / (n * (n - 1))

    def statistic(self, rows: Array) -> Callable[[Tensor], float]:
        """Return the distance of chosen rows: a function of their indices, which may repeat.

        Gretton et al. 2012, eq. 3, as `squared_mmd`; a row that is taken twice counts as two.
        """
        x = to_float64(rows)
        within = _kernel(x, x)
        across = torch.cat([_kernel(part, self.real).mean(1) for part in x.split(1000)])

        def distance(chosen: Tensor) -> float:
            m = len(chosen)
            counts = torch.bincount(chosen.to(x.device), minlength=len(x)).double()
            pairs = counts @ within @ counts - counts @ within.diagonal()
            return (pairs / (m * (m - 1)) + self.own - 2 * (counts @ across) / m).item()

        return distance


def _diagonal(x: Tensor) -> Tensor:
    """Return the kernel of each row with itself."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3
