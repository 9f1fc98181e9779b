"""Nearest-neighbour metrics: precision and recall, density and coverage, nearest training images.

Distances are computed in blocks of rows, so that 50,000 against 50,000 images never need the full
matrix, and in float64, where |a|^2 + |b|^2 - 2ab is as precise as the features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.evaluate.metrics import Array, to_float64

BLOCK = 1024  # rows per block: 1024 x 50,000 squared distances are 410 MB


class PrecisionRecall(NamedTuple):
    """Precision and recall, both in [0, 1]."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density, in [0, inf), and coverage, in [0, 1]."""

    density: float
    coverage: float


def _check_features(features: Array, what: str, at_least: int) -> Tensor:
    """Return features in float64; ValueError for a wrong shape, too few images, or NaN."""
    rows = to_float64(features)
    if rows.ndim != 2 or len(rows) < at_least:
        raise ValueError(
            f"{what} features have shape {tuple(rows.shape)}; expected (images >= {at_least}, "
            "dimensions)"
        )
    if not rows.isfinite().all():
        raise ValueError(f"{what} features hold NaN or infinity")
    return rows


def _check_pair(real: Array, fake: Array, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise ValueError(
            f"k {k} must be at least 1; papers use 3 (precision, recall) and 5 (density, coverage)"
        )
    a, b = _check_features(real, "real", k + 1), _check_features(fake, "generated", k + 1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"real features have {a.shape[1]} dimensions, generated ones {b.shape[1]}")
    return a, b


def _rounding_slack(a: Tensor, b: Tensor) -> float:
    """Return a bound of the rounding error of |x|^2 + |y|^2 - 2xy.

    It is added to squared radii, since balls are closed: a point on the surface is inside.
    """
    return 64 * torch.finfo(a.dtype).eps * float(a.square().sum(1).max() + b.square().sum(1).max())


def _squared_distances(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of `a` with their squared distances to all of `b`, (block, len(b))."""
    b_squared = b.square().sum(1)
    for start in range(0, len(a), block):
        part = a[start : start + block]
        squared = part.square().sum(1, keepdim=True) + b_squared - 2 * part @ b.T
        yield slice(start, start + len(part)), squared.clamp_min_(0)


def squared_radii(features: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """Return the squared distance from each row to its k-th nearest other row, (n,)."""
    radii = torch.empty_like(features[:, 0])
    for rows, squared in _squared_distances(features, features, block):
        # A row is not its own neighbour.
        squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = torch.inf
        radii[rows] = squared.kthvalue(k, dim=1).values
    return radii


def precision_recall(real: Array, fake: Array, k: int = 3, block: int = BLOCK) -> PrecisionRecall:
    """Return improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Precision is the share of generated images in the ball of at least one real image, recall the
    share of real images in the ball of at least one generated image. The ball of an image is closed
    and reaches to its k-th nearest neighbour among the images of its own kind.

    Args:
        real, fake: features, (n, d) and (m, d), each with more than k rows.
    """
    a, b = _check_pair(real, fake, k)
    real_radii, fake_radii = squared_radii(a, k, block), squared_radii(b, k, block)
    slack = _rounding_slack(a, b)
    num_precise = 0
    recalled = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for rows, squared in _squared_distances(b, a, block):
        num_precise += int((squared <= real_radii + slack).any(1).sum())
        recalled |= (squared <= fake_radii[rows, None] + slack).any(0)
    return PrecisionRecall(num_precise / len(b), recalled.double().mean().item())


def density_coverage(real: Array, fake: Array, k: int = 5, block: int = BLOCK) -> DensityCoverage:
    """Return density and coverage (Naeem et al. 2020, section 3.2), with closed balls.

    Density is the mean number of real images whose ball contains a generated image, divided by k.
    Coverage is the share of real images whose ball contains a generated image.

    Args:
        real, fake: features, (n, d) and (m, d), each with more than k rows.
    """
    a, b = _check_pair(real, fake, k)
    radii = squared_radii(a, k, block) + _rounding_slack(a, b)
    inside = 0
    covered = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for _, squared in _squared_distances(b, a, block):
        within = squared <= radii
        inside += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(inside / (k * len(b)), covered.double().mean().item())


def nearest_neighbours(
    queries: Array, base: Array, k: int = 1, block: int = BLOCK
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Return distances to the k nearest rows of `base` and their indices, nearest first.

    Args:
        queries: (q, d). base: (n, d) with n >= k.
    """
    a, b = _check_features(queries, "query", 1), _check_features(base, "base", k)
    blocks = [
        squared.topk(k, dim=1, largest=False) for _, squared in _squared_distances(a, b, block)
    ]
    index = torch.cat([nearest.indices for nearest in blocks])
    # |a|^2 + |b|^2 - 2ab leaves rounding errors, visible in the root for equal rows. The k
    # distances are few, so they are computed directly.
    distance = torch.stack([(a - b[index[:, j]]).norm(dim=1) for j in range(k)], dim=1)
    order = distance.argsort(dim=1, stable=True)
    return distance.gather(1, order), index.gather(1, order)
