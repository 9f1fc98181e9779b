"""The uniform time of flow matching and rectified flow."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Schedule
from mezzotint.process.schedules import in_float64, schedule


@schedule("flow")
def flow(shift: Annotated[float, Range(1e-6, 1e6, "1 is none")] = 1.0) -> Schedule:
    """Return the schedule of u = t of the line (1 - t) x + t eps, shifted towards noise by `shift`.

    Both ends are infinite.

    Args:
        shift: s of t -> s t / (1 + (s - 1) t) (Stable Diffusion 3 eq. 23), the ratio of image
            sides; it lowers the log-SNR by 2 log s, exactly as simple diffusion's shift does. For
            logit-normal t use `lognormal`.
    """
    if not shift > 0:
        raise ValueError(f"shift {shift} must be positive; 1 is none, 3 is usual at 1024 pixels")

    @in_float64
    def logsnr(u: Tensor) -> Tensor:
        # alpha / sigma = (1 - t) / t; rescaling the line to unit variance leaves the ratio as it
        # is.
        return 2 * (torch.log1p(-u) - torch.log(u)) - 2 * math.log(shift)

    return logsnr
