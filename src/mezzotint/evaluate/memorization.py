"""Does a model copy? Nearest training images beside samples, and a rate of copies judged by held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from mezzotint.evaluate.metrics import Array
from mezzotint.evaluate.precision_recall import nearest_neighbours


@dataclass(frozen=True)
class Memorization:
    """What nearest neighbours say.

    rate: share of samples nearer to their nearest training image than all but `quantile` of the held-out images are to
        theirs. Without copying it is `quantile`, by definition.
    closer: chance that a sample is nearer to the training set than a held-out image is; 1/2 without copying (Meehan,
        Chaudhuri, Dasgupta 2020, section 3). quantile: as given.
    distance, index: of the k nearest training images of each sample, (n, k), nearest first.
    """

    rate: float
    closer: float
    quantile: float
    distance: Float[Tensor, "n k"]
    index: Int[Tensor, "n k"]


def measure_memorization(
    samples: Array, train: Array, heldout: Array, quantile: float = 0.01, k: int = 4
) -> Memorization:
    """Compare samples' distances to the training set with those of held-out real images.

    Args:
        samples, train, heldout: features of one kind, (n, d), (m, d), (h, d) with m >= k.
        quantile: of the held-out distances that marks a copy; with h images no finer than 1 / h.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile {quantile} must lie between 0 and 1; e.g. 0.01")
    distance, index = nearest_neighbours(samples, train, min(k, len(train)))
    honest, _ = nearest_neighbours(heldout, train)
    if len(honest) * quantile < 1:
        raise ValueError(
            f"{len(honest)} held-out images have no {quantile} quantile; give {round(1 / quantile)} or more"
        )
    first, honest = distance[:, 0].contiguous(), honest[:, 0].sort().values
    rate = (first < torch.quantile(honest, quantile)).double().mean().item()
    # Mann-Whitney: ties count one half.
    below, above = torch.searchsorted(honest, first), torch.searchsorted(honest, first, right=True)
    closer = 1 - ((below + above).double() / (2 * len(honest))).mean().item()
    return Memorization(rate, closer, quantile, distance, index)


def neighbour_sheet(
    samples: UInt8[Tensor, "n c h w"],
    neighbours: Sequence[UInt8[Tensor, "k c h w"]],
    path: str | Path,
    gap: int = 2,
) -> None:
    """A PNG with one row per sample: the sample, a wider gap, its nearest training images, nearest first."""
    if len(samples) != len(neighbours) or len(samples) == 0:
        raise ValueError(
            f"{len(samples)} samples and {len(neighbours)} rows of neighbours; give as many, at least one"
        )
    _, channels, h, w = samples.shape
    k = len(neighbours[0])
    canvas = np.full(
        (len(samples) * (h + gap) + gap, (k + 1) * (w + gap) + 4 * gap, channels), 255, np.uint8
    )
    for row, (sample, near) in enumerate(zip(samples, neighbours, strict=True)):
        top = gap + row * (h + gap)
        for column, picture in enumerate([sample, *near]):
            left = gap + column * (w + gap) + (3 * gap if column else 0)
            canvas[top : top + h, left : left + w] = picture.permute(1, 2, 0).cpu().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(canvas[..., 0] if channels == 1 else canvas).save(path)
