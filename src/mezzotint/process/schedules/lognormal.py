"""EDM's training distribution of noise: log sigma is normal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Schedule
from mezzotint.process.schedules import in_float64, schedule

ndtri: Callable[[Tensor], Tensor] = torch.special.ndtri  # pyright: ignore


@schedule("lognormal")
def lognormal(
    mean: Annotated[float, Range(-1000, 1000)] = -1.2, std: Annotated[float, Range(1e-6, 100)] = 1.2
) -> Schedule:
    """Return the schedule of log(sigma / alpha) ~ N(mean, std^2) (EDM table 1); both ends infinite.

    With the straight line of flow matching, where sigma / alpha = t / (1 - t), this is the
    logit-normal distribution of t.

    Args:
        mean, std: of the natural log of EDM's sigma; EDM trains on -1.2 and 1.2.
    """
    if not std > 0:
        raise ValueError(f"std {std} must be positive; EDM uses 1.2")

    @in_float64
    def logsnr(u: Tensor) -> Tensor:
        return -2 * (mean + std * ndtri(u))

    return logsnr
