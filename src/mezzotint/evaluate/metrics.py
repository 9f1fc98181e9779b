"""Fréchet distance, streaming moments, Inception Score and FDr, in float64.

These work on features of any network. Whether a distance may be called "FID" is decided in
`features`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.distributed import default_device

Array = Tensor | np.ndarray


def to_float64(array: Array) -> Tensor:
    """Return `array` in float64, on the process's GPU if there is one, else on the CPU."""
    if isinstance(array, np.ndarray):
        # A copy, since arrays read from files are read-only.
        array = torch.from_numpy(np.array(array, dtype=np.float64))
    return array.detach().to(device=default_device(), dtype=torch.float64)


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of squared deviations) of features, for streaming covariance.

    `Moments.of(a) + Moments.of(b)` is `Moments.of(cat(a, b))` up to rounding, in any order.
    Scatters are sums about the mean, so that a large common offset costs no precision.
    """

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @staticmethod
    def of(features: Array) -> Moments:
        """Return the moments of one batch of features, (n, d) with n >= 1, in any float dtype.

        Errors: ValueError for another shape, NaN or infinity.
        """
        rows = to_float64(features)
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(
                f"features have shape {tuple(rows.shape)}; expected (images >= 1, dimensions)"
            )
        if not rows.isfinite().all():
            raise ValueError("features hold NaN or infinity; check the images they came from")
        mean = rows.mean(0)
        deviation = rows - mean
        return Moments(len(rows), mean, deviation.T @ deviation)

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of {len(self.mean)} and of {len(other.mean)} dimensions cannot be added"
            )
        n = self.n + other.n
        step = other.mean - self.mean
        # Chan, Golub, LeVeque 1979, eq. 2.1: scatter = S_a + S_b + (n_a n_b / n) step step^T.
        scatter = self.scatter + other.scatter + (self.n * other.n / n) * torch.outer(step, step)
        return Moments(n, self.mean + step * (other.n / n), scatter)

    @property
    def cov(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance (divisor n - 1, as in all FID code); needs two images."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two images; there is {self.n}")
        return self.scatter / (self.n - 1)


def covariance_root(cov: Array, what: str = "covariance") -> Tensor:
    """Return R, (d, rank), with R R^T = cov for a positive semidefinite (d, d) matrix.

    It comes from a symmetric eigendecomposition. Eigenvalues below d * 2.2e-16 of the largest are
    rounding errors and are dropped. Their square roots, 1e-8 of the largest, would not be
    negligible with fewer images than dimensions.

    Errors: ValueError if `cov` is not square, symmetric, finite and positive semidefinite.
    """
    cov = to_float64(cov)
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"{what} has shape {tuple(cov.shape)}; expected a square matrix")
    if not cov.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity")
    scale = cov.abs().max()
    if (cov - cov.T).abs().max() > 1e-4 * scale:
        raise ValueError(f"{what} is not symmetric; is the file damaged?")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    # Rounding of statistics in float32 gives eigenvalues down to -1e-7 of the largest.
    if values[0] < -1e-3 * values[-1].clamp_min(0):
        raise ValueError(
            f"{what} is not positive semidefinite: its eigenvalues are from {values[0]:.3g} to "
            f"{values[-1]:.3g}"
        )
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def _frechet_from_roots(mu1: Tensor, root1: Tensor, mu2: Tensor, root2: Tensor) -> float:
    # tr (S1 S2)^(1/2) is the sum of the singular values of R1^T R2, without the square root of a
    # small eigenvalue that is mostly rounding error.
    cross = torch.linalg.svdvals(root1.T @ root2).sum()
    # Dowson and Landau 1982, eq. 4; Heusel et al. 2017, eq. 6.
    distance = (mu1 - mu2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # equal Gaussians leave rounding of either sign


def frechet_distance(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> float:
    """Return the squared Fréchet (2-Wasserstein) distance between two Gaussians, in float64.

    |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) (Heusel et al. 2017, eq. 6), from two
    symmetric eigendecompositions and the singular values of the product of the roots. It is also
    accurate for singular covariances.

    Args:
        mu1, mu2: means, (d,), numpy arrays or tensors of any float dtype.
        cov1, cov2: covariances, (d, d).

    Errors: ValueError for shapes that do not fit, NaN, and matrices that are not covariances.
    """
    mu1, mu2 = to_float64(mu1), to_float64(mu2)
    shapes = [tuple(m.shape) for m in (mu1, mu2)]
    if mu1.ndim != 1 or shapes[0] != shapes[1]:
        raise ValueError(
            f"means have shapes {shapes[0]} and {shapes[1]}; expected two vectors of one length"
        )
    if not (mu1.isfinite().all() and mu2.isfinite().all()):
        raise ValueError("a mean holds NaN or infinity")
    root1 = covariance_root(cov1, "the first covariance")
    root2 = covariance_root(cov2, "the second covariance")
    if len(root1) != len(mu1) or len(root2) != len(mu1):
        raise ValueError(
            f"covariances of {len(root1)} and {len(root2)} dimensions, means of {len(mu1)}: no fit"
        )
    return _frechet_from_roots(mu1, root1, mu2, root2)


class Gaussian:
    """A mean, (d,), and a covariance, (d, d), whose root is computed once for many distances."""

    def __init__(self, mu: Array, cov: Array):
        self.mu, self.root = to_float64(mu), covariance_root(cov)
        if self.mu.shape != (len(self.root),):
            raise ValueError(
                f"a mean of shape {tuple(self.mu.shape)} does not fit a covariance of "
                f"{len(self.root)} dimensions"
            )

    @staticmethod
    def of(moments: Moments) -> Gaussian:
        """Return the Gaussian of these moments; warns of no more images than dimensions."""
        d = len(moments.mean)
        if moments.n <= d:
            warnings.warn(
                f"{moments.n} images in {d} dimensions: the covariance is singular and the "
                "distance larger than for many images; compare it only at equal numbers of images",
                stacklevel=2,
            )
        return Gaussian(moments.mean, moments.cov)

    def distance(self, other: Gaussian) -> float:
        """Return `frechet_distance` between the two."""
        if self.mu.shape != other.mu.shape:
            raise ValueError(
                f"features of {len(self.mu)} and of {len(other.mu)} dimensions are not comparable"
            )
        return _frechet_from_roots(self.mu, self.root, other.mu, other.root)


def distance_of_rows(rows: Array, real: Gaussian) -> float:
    """Return the Fréchet distance of features (n, d) to `real`; quick for fewer rows than d."""
    moments = Moments.of(rows)
    n, d = tuple(rows.shape)
    if n > d or n < 2:
        return Gaussian(moments.mean, moments.cov).distance(real)
    # The covariance is R R^T for R of the centred rows, without an eigendecomposition.
    root = (to_float64(rows) - moments.mean).T / (n - 1) ** 0.5
    return _frechet_from_roots(moments.mean, root, real.mu, real.root)


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the score over splits; the deviation is NaN for one split."""

    mean: float
    std: float


def inception_score(logits: Array, split_size: int = 5000) -> InceptionScore:
    """Return exp(mean KL(p(y|x) || p(y))), averaged over splits (Salimans et al. 2016, section 4).

    p(y) is the mean of the split. As in ADM's evaluator, splits are consecutive images, 5,000 by
    default, and a smaller last split has the same weight.

    Args:
        logits: (n, classes); for the published score the 1,008 logits without their bias, see
            `inception`.
        split_size: images per split.
    """
    logits = to_float64(logits)
    if logits.ndim != 2 or len(logits) < 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; expected (at least two images, classes)"
        )
    if not logits.isfinite().all():
        raise ValueError("logits hold NaN or infinity")
    scores: list[float] = []
    for part in logits.split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        # 0 log 0 = 0: a class of probability 0 adds nothing.
        log_mean = p.mean(0).clamp_min(torch.finfo(torch.float64).tiny).log()
        scores.append((p * (log_p - log_mean)).sum(1).mean().exp().item())
    spread = float(np.std(scores)) if len(scores) > 1 else math.nan
    return InceptionScore(float(np.mean(scores)), spread)


def fdr(to_train: float, heldout_to_train: float) -> float:
    """Return the samples' distance to the training data relative to that of held-out data.

    1 is as good as real images. Below 1, samples are closer to the training images than other real
    images are, a sign of copying.
    """
    if not (to_train >= 0 and heldout_to_train > 0):
        raise ValueError(
            f"distances {to_train} and {heldout_to_train}; the first must be >= 0, the second > 0"
        )
    return to_train / heldout_to_train
