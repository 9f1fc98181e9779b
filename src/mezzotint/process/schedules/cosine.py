"""The cosine schedule of simple diffusion, with bounds and the shift for resolution."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Schedule
from mezzotint.process.schedules import in_float64, schedule


@schedule("cosine")
def cosine(
    image_d: Annotated[int, Range(1, 1_000_000, "pixels")] = 64,
    noise_d: Annotated[int, Range(1, 1_000_000, "pixels")] = 64,
    logsnr_min: Annotated[float, Range(-60, 1000, "a log-SNR")] = -15.0,
    logsnr_max: Annotated[float, Range(-1000, 1000, "a log-SNR")] = 15.0,
) -> Schedule:
    """Return the shifted cosine: at image_d pixels the log-SNR that noise_d pixels would have.

    simple diffusion section 2.

    Args:
        image_d: side of the image in pixels, not of the network's grid: noise is added to pixels.
        noise_d: reference side; smaller means noisier. The paper's text uses 64, its best ablation
            rows 32.
        logsnr_min, logsnr_max: ends of the unshifted curve; the shift 2 log(noise_d / image_d) is
            added afterwards.

    Errors: ValueError for a side below 1 or bounds out of order.
    """
    if min(image_d, noise_d) < 1:
        raise ValueError(f"image_d {image_d} and noise_d {noise_d} must be at least 1 pixel")
    if not logsnr_min < logsnr_max:
        raise ValueError(
            f"logsnr_min {logsnr_min} must be below logsnr_max {logsnr_max}, e.g. -15 and 15"
        )
    # Below -60 the angle is so near pi / 2 that a float64 misses the log-SNR by more than 0.001.
    if logsnr_min < -60 or logsnr_max > 1000:
        raise ValueError(
            f"logsnr_min {logsnr_min} and logsnr_max {logsnr_max} must lie within -60...1000, "
            "e.g. -15 and 15"
        )
    # The bounds rescale the tangent's argument (simple diffusion's code; specs/simple-diffusion.md
    # section 1).
    t0 = math.atan(math.exp(-logsnr_max / 2))
    t1 = math.atan(math.exp(-logsnr_min / 2))
    shift = 2 * math.log(noise_d / image_d)

    @in_float64
    def logsnr(u: Tensor) -> Tensor:
        # simple diffusion section 2: logsnr = -2 log tan(pi t / 2) + 2 log(noise_d / image_d)
        return -2 * torch.log(torch.tan(t0 + u * (t1 - t0))) + shift

    return logsnr
