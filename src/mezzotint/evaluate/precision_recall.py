"""Metrics of nearest neighbours: precision and recall, density and coverage, the nearest training images.

Distances are taken in blocks of rows, so that 50,000 against 50,000 images never needs the whole matrix; in float64,
where |a|^2 + |b|^2 - 2ab loses nothing that a feature has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.evaluate.metrics import Array, wide

BLOCK = 1024  # rows per block: 1024 x 50,000 squared distances are 410 MB


class PrecisionRecall(NamedTuple):
    """Both in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density in [0, inf), coverage in [0, 1]."""

    density: float
    coverage: float


def _features(features: Array, what: str, at_least: int) -> Tensor:
    rows = wide(features)
    if rows.ndim != 2 or len(rows) < at_least:
        raise ValueError(
            f"{what} features have shape {tuple(rows.shape)}; expected (images >= {at_least}, dimensions)"
        )
    if not rows.isfinite().all():
        raise ValueError(f"{what} features hold NaN or infinity")
    return rows


def _pair(real: Array, fake: Array, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(
            f"k {k} must be at least 1; the papers use 3 (precision, recall) and 5 (density, coverage)"
        )
    a, b = _features(real, "real", k + 1), _features(fake, "generated", k + 1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"real features have {a.shape[1]} dimensions, generated ones {b.shape[1]}")
    return a, b


def _slack(a: Tensor, b: Tensor) -> float:
    """What |x|^2 + |y|^2 - 2 xy may be off by rounding; balls are closed, so as much is granted to those they touch."""
    return 64 * torch.finfo(a.dtype).eps * float(a.square().sum(1).max() + b.square().sum(1).max())


def _blocks(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances from a block of rows of `a` to all of `b`: (rows, (block, len(b)))."""
    b_squared = b.square().sum(1)
    for start in range(0, len(a), block):
        part = a[start : start + block]
        squared = part.square().sum(1, keepdim=True) + b_squared - 2 * part @ b.T
        yield slice(start, start + len(part)), squared.clamp_min_(0)


def squared_radii(features: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """Squared distance from each row to its k-th nearest other row, (n,)."""
    radii = torch.empty_like(features[:, 0])
    for rows, squared in _blocks(features, features, block):
        squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = (
            torch.inf
        )  # not its own neighbour
        radii[rows] = squared.kthvalue(k, dim=1).values
    return radii


def precision_recall(real: Array, fake: Array, k: int = 3, block: int = BLOCK) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Precision is the share of generated images within some real image's ball, recall the share of real images within
    some generated image's; a ball is closed and reaches to its centre's k-th nearest neighbour of its own kind.

    Args:
        real, fake: features, (n, d) and (m, d), each with more than k rows.
    """
    a, b = _pair(real, fake, k)
    real_radii, fake_radii = squared_radii(a, k, block), squared_radii(b, k, block)
    slack = _slack(a, b)
    precise = 0
    recalled = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for rows, squared in _blocks(b, a, block):
        precise += int((squared <= real_radii + slack).any(1).sum())
        recalled |= (squared <= fake_radii[rows, None] + slack).any(0)
    return PrecisionRecall(precise / len(b), recalled.double().mean().item())


def density_coverage(real: Array, fake: Array, k: int = 5, block: int = BLOCK) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, section 3.2), with closed balls.

    Density is the mean number of real images' balls around a generated image, divided by k; coverage the share of real
    images with a generated one in their ball.

    Args:
        real, fake: features, (n, d) and (m, d), each with more than k rows.
    """
    a, b = _pair(real, fake, k)
    radii = squared_radii(a, k, block) + _slack(a, b)
    inside = 0
    covered = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for _, squared in _blocks(b, a, block):
        within = squared <= radii
        inside += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(inside / (k * len(b)), covered.double().mean().item())


def nearest_neighbours(
    queries: Array, base: Array, k: int = 1, block: int = BLOCK
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Distances to, and row numbers of, the k rows of `base` nearest each query, nearest first.

    Args:
        queries: (q, d). base: (n, d) with n >= k.
    """
    a, b = _features(queries, "query", 1), _features(base, "base", k)
    found = [squared.topk(k, dim=1, largest=False) for _, squared in _blocks(a, b, block)]
    # |a|^2 + |b|^2 - 2ab of equal rows leaves rounding whose root shows; the few that are kept are measured directly.
    index = torch.cat([f.indices for f in found])
    distance = torch.stack([(a - b[index[:, j]]).norm(dim=1) for j in range(k)], dim=1)
    order = distance.argsort(dim=1, stable=True)
    return distance.gather(1, order), index.gather(1, order)
