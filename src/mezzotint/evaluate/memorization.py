"""Memorization: nearest training images, and a copy rate with held-out images as baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from mezzotint.core.image_grid import save_png
from mezzotint.evaluate.metrics import Array
from mezzotint.evaluate.precision_recall import nearest_neighbours

QUANTILE = 0.01  # of the held-out images' distances, below which a sample counts as a copy


@dataclass(frozen=True)
class Memorization:
    """How close samples are to training images, compared with held-out images.

    copy_rate: share of samples that are nearer to their nearest training image than all but
        `quantile` of the held-out images are to theirs. It is `quantile` without copying.
    closer: probability that a sample is nearer to the training set than a held-out image is; 1/2
        without copying (Meehan, Chaudhuri, Dasgupta 2020, section 3).
    distance, index: of the k nearest training images of each sample, (n, k), nearest first.
    num_heldout: number of held-out images.
    """

    copy_rate: float
    closer: float
    quantile: float
    distance: Float[Tensor, "n k"]
    index: Int[Tensor, "n k"]
    num_heldout: int

    @property
    def verdict(self) -> str:
        """One sentence that says whether the model copies, beyond three standard errors."""
        n, h, q = len(self.distance), self.num_heldout, self.quantile
        compared = (
            f"{self.copy_rate:.1%} of {n:,} samples are nearer to a training image than "
            f"{100 * (1 - q):.4g}% of the held-out images are ({100 * q:.3g}% without copying)"
        )
        # Variance of a binomial share q of n samples, plus that of the level of an empirical
        # q-quantile of h images (van der Vaart, Asymptotic Statistics, 1998, corollary 21.5).
        if self.copy_rate - q > 3 * (q * (1 - q) * (1 / n + 1 / h)) ** 0.5:
            return f"the model copies training images: {compared}"
        # Variance of U / (n h) where both sets have one distribution (Mann and Whitney 1947).
        if self.closer - 0.5 > 3 * ((n + h + 1) / (12 * n * h)) ** 0.5:
            return (
                f"the model does not copy outright ({compared}), but its samples lie closer to the "
                "training images than held-out images do"
            )
        return f"no sign of copying: {compared}"


def check_quantile(quantile: float, num_heldout: int) -> None:
    """Raise ValueError where so many held-out images have no such quantile."""
    if not 0 < quantile < 1:
        raise ValueError(f"quantile {quantile} must be between 0 and 1; e.g. 0.01")
    if num_heldout * quantile < 1:
        raise ValueError(
            f"{num_heldout} held-out images have no {quantile} quantile; give "
            f"{round(1 / quantile)} or more"
        )


def check_held_out(heldout: Array, distance: Float[Tensor, " h"], quantile: float) -> None:
    """Raise ValueError where `quantile` of the held-out images or more are training images.

    No sample can be nearer than that, so a model that copies would not be seen to.

    Args:
        heldout: features (h, d). distance: of each to its nearest training image.
    """
    norms = torch.as_tensor(heldout).double().norm(dim=1)
    # Features of one image differ between batches by rounding.
    same = int((distance.double().cpu() <= 1e-5 * norms.cpu()).sum())
    if same >= quantile * len(norms):
        raise ValueError(
            f"{same:,} of {len(norms):,} held-out images are among the training images, so they do "
            "not show how far new images are; give images that were not trained on, e.g. "
            "DATA:test of a run on DATA:train"
        )


def measure_memorization(
    samples: Array, train: Array, heldout: Array, quantile: float = QUANTILE, k: int = 4
) -> Memorization:
    """Compare the samples' distances to the training set with those of held-out real images.

    Args:
        samples, train, heldout: features of one set, (n, d), (m, d), (h, d) with m >= k.
        quantile: a sample nearer than this quantile of the held-out distances counts as a copy; at
            least 1 / h.

    Errors: ValueError where held-out images are training images, see `check_held_out`.
    """
    check_quantile(quantile, len(heldout))
    distance, index = nearest_neighbours(samples, train, min(k, len(train)))
    baseline, _ = nearest_neighbours(heldout, train)
    check_held_out(heldout, baseline[:, 0], quantile)
    nearest, baseline = distance[:, 0].contiguous(), baseline[:, 0].sort().values
    copy_rate = (nearest < torch.quantile(baseline, quantile)).double().mean().item()
    # Mann-Whitney statistic: a tie counts one half.
    below = torch.searchsorted(baseline, nearest)
    not_above = torch.searchsorted(baseline, nearest, right=True)
    closer = 1 - ((below + not_above).double() / (2 * len(baseline))).mean().item()
    return Memorization(copy_rate, closer, quantile, distance, index, len(baseline))


def save_neighbour_sheet(
    samples: UInt8[Tensor, "n c h w"],
    neighbours: Sequence[UInt8[Tensor, "k c h w"]],
    path: str | Path,
    gap: int = 2,
) -> None:
    """Write a PNG with one row per sample: the sample, then its nearest training images.

    Args:
        neighbours: of each sample, nearest first.
        gap: pixels between images; three times as many more after the sample.
    """
    if len(samples) != len(neighbours) or len(samples) == 0:
        raise ValueError(
            f"{len(samples)} samples and {len(neighbours)} rows of neighbours; give one row for "
            "each of at least one sample"
        )
    _, channels, h, w = samples.shape
    k = len(neighbours[0])
    height, width = len(samples) * (h + gap) + gap, (k + 1) * (w + gap) + 4 * gap
    canvas = np.full((height, width, channels), 255, np.uint8)
    for row, (sample, near) in enumerate(zip(samples, neighbours, strict=True)):
        top = gap + row * (h + gap)
        for column, image in enumerate([sample, *near]):
            left = gap + column * (w + gap) + (3 * gap if column else 0)
            canvas[top : top + h, left : left + w] = image.permute(1, 2, 0).cpu().numpy()
    save_png(Image.fromarray(canvas[..., 0] if channels == 1 else canvas), Path(path))
