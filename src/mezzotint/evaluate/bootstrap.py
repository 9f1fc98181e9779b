"""Bootstrap intervals of a metric, by resampling images."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mezzotint.core.rng import philox
from mezzotint.evaluate.metrics import Array


class Interval(NamedTuple):
    """Range that contains the metric of as many new images with probability `level`."""

    low: float
    high: float
    level: float


def bootstrap(
    statistic: Callable[[Tensor], float],
    features: Array,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Return a percentile interval of `statistic` over images drawn with replacement (Efron 1979).

    A Fréchet distance of a resample is larger, since repeated images bias it like a smaller sample.
    The resampled values are therefore shifted so that their mean is the statistic itself (our
    choice). The interval shows the scatter between samples of this size, not the bias of this size.

    Args:
        statistic: (n, d) features -> number.
        features: (n, d), the rows to draw from.
        resamples: number of draws, at least 20.
        level: probability inside the interval, in (0, 1).
        seed: of the draws.
    """
    if resamples < 20 or not 0 < level < 1:
        raise ValueError(
            f"resamples {resamples} and level {level}; give at least 20 and a level between 0 and "
            "1, e.g. 200 and 0.95"
        )
    rows = torch.as_tensor(features)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} images cannot be resampled; at least two are needed")
    draws = (
        philox("resample", seed, i, draw=1).integers(len(rows), size=len(rows))
        for i in range(resamples)
    )
    values = [statistic(rows[torch.from_numpy(drawn).to(rows.device)]) for drawn in draws]
    shifted = np.asarray(values) + (statistic(rows) - np.mean(values))
    low, high = np.quantile(shifted, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level)
