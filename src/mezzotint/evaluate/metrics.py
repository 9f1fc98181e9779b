"""Fréchet distance, streaming moments, Inception Score and FDr, in float64.

The neighbours' metrics are in `neighbours`, the kernel distance in `kid`, intervals in `bootstrap`. Nothing here knows
which network made the features; what a distance may be called ("FID" or not) is decided in `features`.
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

Array = Tensor | np.ndarray


def wide(array: Array) -> Tensor:
    """`array` in float64, on the CUDA device when there is one (other accelerators have no float64), else the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(
            np.array(array, dtype=np.float64)
        )  # a copy: arrays read from files are read-only
    return array.detach().to(device=device, dtype=torch.float64)


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (sum of squared deviations) of feature vectors: a streaming mean and covariance.

    Add them: `Moments.of(a) + Moments.of(b)` is `Moments.of(cat(a, b))` to rounding, whatever the batches, their order
    or the rank they came from. Both are sums about the mean, so a large common offset costs no digits.
    """

    n: int
    mean: Float[Tensor, " d"]
    scatter: Float[Tensor, "d d"]

    @staticmethod
    def of(features: Array) -> Moments:
        """Of one batch of features, (n, d) with n >= 1, in any float dtype; ValueError when not all are finite."""
        rows = wide(features)
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(
                f"features have shape {tuple(rows.shape)}; expected (at least one image, dimensions)"
            )
        if not rows.isfinite().all():
            raise ValueError("features hold NaN or infinity; look at the images they came from")
        mean = rows.mean(0)
        deviation = rows - mean
        return Moments(len(rows), mean, deviation.T @ deviation)

    def __add__(self, other: Moments) -> Moments:
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of {len(self.mean)} and of {len(other.mean)} dimensions cannot be merged"
            )
        n = self.n + other.n
        step = other.mean - self.mean
        # Chan, Golub, LeVeque 1979, eq. 2.1: scatter = S_a + S_b + (n_a n_b / n) step step^T.
        scatter = self.scatter + other.scatter + (self.n * other.n / n) * torch.outer(step, step)
        return Moments(n, self.mean + step * (other.n / n), scatter)

    @property
    def cov(self) -> Float[Tensor, "d d"]:
        """The unbiased covariance (divisor n - 1, as in every FID code); ValueError for fewer than two images."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two images; there is {self.n}")
        return self.scatter / (self.n - 1)


def root(cov: Array, what: str = "covariance") -> Tensor:
    """A factor R, (d, rank), of a positive semidefinite (d, d) matrix: R R^T = cov, by symmetric eigenvalues.

    Eigenvalues below d * 2.2e-16 of the largest are rounding noise and are dropped: their square roots (1e-8 of the
    largest) would not be, which matters with fewer images than dimensions.

    Errors: ValueError when `cov` is not square, symmetric, finite and positive semidefinite.
    """
    cov = wide(cov)
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ValueError(f"{what} has shape {tuple(cov.shape)}; expected a square matrix")
    if not cov.isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity")
    scale = cov.abs().max()
    if (cov - cov.T).abs().max() > 1e-4 * scale:
        raise ValueError(f"{what} is not symmetric; was it transposed or cut while being read?")
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    # Statistics saved in float32 may be negative by rounding (1e-7 of the largest); more than 1e-3 is not a covariance.
    if values[0] < -1e-3 * values[-1].clamp_min(0):
        raise ValueError(
            f"{what} is not positive semidefinite: eigenvalues from {values[0]:.3g} to {values[-1]:.3g}"
        )
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def _frechet_from_roots(mu1: Tensor, root1: Tensor, mu2: Tensor, root2: Tensor) -> float:
    # tr (S1 S2)^(1/2) is the sum of the singular values of R1^T R2: no square root of a rounded small eigenvalue.
    cross = torch.linalg.svdvals(root1.T @ root2).sum()
    # Dowson and Landau 1982, eq. 4; Heusel et al. 2017, eq. 6.
    distance = (mu1 - mu2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * cross
    return max(distance.item(), 0.0)  # equal Gaussians leave rounding of either sign


def frechet_distance(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance between two Gaussians; in float64, right for singular covariances.

    |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)) (Heusel et al. 2017, eq. 6), by two symmetric
    eigendecompositions and the singular values of the product of the roots.

    Args:
        mu1, mu2: means, (d,). cov1, cov2: covariances, (d, d). numpy arrays or tensors of any float dtype.

    Errors: ValueError for shapes that do not fit together, NaN, and matrices that are no covariances.
    """
    mu1, mu2 = wide(mu1), wide(mu2)
    shapes = [tuple(m.shape) for m in (mu1, mu2)]
    if mu1.ndim != 1 or shapes[0] != shapes[1]:
        raise ValueError(
            f"means have shapes {shapes[0]} and {shapes[1]}; expected two vectors of one length"
        )
    if not (mu1.isfinite().all() and mu2.isfinite().all()):
        raise ValueError("a mean holds NaN or infinity")
    root1, root2 = root(cov1, "the first covariance"), root(cov2, "the second covariance")
    if len(root1) != len(mu1) or len(root2) != len(mu1):
        raise ValueError(
            f"covariances of {len(root1)} and {len(root2)} dimensions do not fit means of {len(mu1)}"
        )
    return _frechet_from_roots(mu1, root1, mu2, root2)


class Gaussian:
    """A mean and covariance with the root taken once: for many distances to one reference.

    Args:
        mu: (d,). cov: (d, d). n: images behind them, None when a file does not say.
    """

    def __init__(self, mu: Array, cov: Array, n: int | None = None):
        self.mu, self.n = wide(mu), n
        self.root = root(cov)
        if self.mu.shape != (len(self.root),):
            raise ValueError(
                f"mean of shape {tuple(self.mu.shape)}, covariance of {len(self.root)} dimensions: no fit"
            )

    @staticmethod
    def of(moments: Moments) -> Gaussian:
        """From streaming moments; warns when there are fewer images than dimensions."""
        d = len(moments.mean)
        if moments.n <= d:
            warnings.warn(
                f"{moments.n} images in {d} dimensions: the covariance is singular and the distance, though computed "
                f"exactly, is far above its value for many images; compare it only at the same number of images",
                stacklevel=2,
            )
        return Gaussian(moments.mean, moments.cov, moments.n)

    def distance(self, other: Gaussian) -> float:
        """`frechet_distance` between the two."""
        if self.mu.shape != other.mu.shape:
            raise ValueError(
                f"features of {len(self.mu)} and of {len(other.mu)} dimensions are not comparable"
            )
        return _frechet_from_roots(self.mu, self.root, other.mu, other.root)


class InceptionScore(NamedTuple):
    """Mean and standard deviation of the score over splits; the deviation is nan with one split."""

    mean: float
    std: float


def inception_score(logits: Array, split_size: int = 5000) -> InceptionScore:
    """exp(mean KL(p(y|x) || p(y))) over consecutive splits, averaged (Salimans et al. 2016, section 4).

    Splits of 5,000 images in the order given are those of ADM's evaluator; a last, smaller split counts like another,
    as there. p(y) is the split's own mean.

    Args:
        logits: (n, classes); for the published score the 1,008 logits without their bias (see `inception`).
        split_size: images per split.
    """
    logits = wide(logits)
    if logits.ndim != 2 or len(logits) < 2:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}; expected (images, classes), at least two images"
        )
    if not logits.isfinite().all():
        raise ValueError("logits hold NaN or infinity")
    scores: list[float] = []
    for part in logits.split(split_size):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        # 0 log 0 = 0: a class nobody predicts adds nothing to any term of the sum.
        log_mean = p.mean(0).clamp_min(torch.finfo(torch.float64).tiny).log()
        scores.append((p * (log_p - log_mean)).sum(1).mean().exp().item())
    spread = float(np.std(scores)) if len(scores) > 1 else math.nan
    return InceptionScore(float(np.mean(scores)), spread)


def fdr(to_train: float, heldout_to_train: float) -> float:
    """Distance of samples to the training data over that of held-out data to it; 1 is as close as real data gets.

    Below 1, samples are closer to the training images than unseen real images are: a sign of copying.
    """
    if not (to_train >= 0 and heldout_to_train > 0):
        raise ValueError(
            f"distances {to_train} and {heldout_to_train}; the first must be >= 0, the second > 0"
        )
    return to_train / heldout_to_train
