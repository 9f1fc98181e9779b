"""A mixture of two shifted cosine schedules (simple diffusion; SiD2 trains on one)."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Schedule
from mezzotint.process.schedules import in_float64, schedule
from mezzotint.process.schedules.cosine import cosine


@schedule("cosine_interpolated")
def cosine_interpolated(
    image_d: Annotated[int, Range(1, 1_000_000, "pixels")] = 512,
    noise_d_low: Annotated[int, Range(1, 1_000_000, "pixels")] = 32,
    noise_d_high: Annotated[int, Range(1, 1_000_000, "pixels")] = 256,
    logsnr_min: Annotated[float, Range(-60, 1000, "a log-SNR")] = -15.0,
    logsnr_max: Annotated[float, Range(-1000, 1000, "a log-SNR")] = 15.0,
) -> Schedule:
    """Return u times the cosine of noise_d_low plus 1 - u times that of noise_d_high, in log-SNR.

    This order spreads the log-SNR wider than either cosine, which is the paper's aim. Equation 6 of
    its first version prints the other order, which narrows it and may increase; its pseudo-code has
    this one. The choice is ours (specs/simple-diffusion.md section 1, "order A"). The defaults are
    the paper's example for 512 pixels.

    Args:
        image_d: side of the image in pixels.
        noise_d_low, noise_d_high: reference sides that hold at the noisy and at the clean end.
        logsnr_min, logsnr_max: ends of the unshifted cosine.

    Errors: ValueError as for `cosine`, and for noise_d_low above noise_d_high.
    """
    if noise_d_low > noise_d_high:
        raise ValueError(
            f"noise_d_low {noise_d_low} must not exceed noise_d_high {noise_d_high}; "
            "try them exchanged"
        )
    low = cosine(image_d, noise_d_low, logsnr_min, logsnr_max)
    high = cosine(image_d, noise_d_high, logsnr_min, logsnr_max)

    @in_float64
    def logsnr(u: Tensor) -> Tensor:
        return u * low(u) + (1 - u) * high(u)

    return logsnr
