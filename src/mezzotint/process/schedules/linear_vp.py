"""The continuous variance-preserving SDE with linear beta."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Schedule
from mezzotint.process.schedules import in_float64, schedule


def _check(beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min <= beta_max:
        raise ValueError(
            f"beta_min {beta_min} and beta_max {beta_max} must be positive and rise, "
            "e.g. 0.1 and 20"
        )


@schedule("linear_vp")
def linear_vp(
    beta_min: Annotated[float, Range(1e-6, 1000)] = 0.1,
    beta_max: Annotated[float, Range(1e-6, 1000)] = 20.0,
    shift: Annotated[float, Range(-1000, 1000, "added to the log-SNR")] = 0.0,
) -> Schedule:
    """Return the schedule of dz = -beta(t) z / 2 dt + sqrt(beta(t)) dw, u = t in [0, 1].

    beta(t) = beta_min + t (beta_max - beta_min). The log-SNR is +inf at t = 0, and about
    -(beta_min + beta_max) / 2 at t = 1, before `shift` is added. simple diffusion's shift for an
    image larger than the reference is 2 ln(reference / size).
    """
    _check(beta_min, beta_max)

    @in_float64
    def logsnr(u: Tensor) -> Tensor:
        # Score SDE eq. 33: alpha^2 = exp(-B) with B the integral of beta, so alpha^2 / sigma^2 = 1
        # / (e^B - 1).
        integral = beta_min * u + (beta_max - beta_min) * u**2 / 2
        return shift - torch.log(torch.expm1(integral))

    return logsnr


def linear_vp_time(logsnr: Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    """Return the t of a log-SNR under `linear_vp`, in closed form; any shape.

    U-ViT and DiMR count the step 1000 t.
    """
    _check(beta_min, beta_max)

    @in_float64
    def time(logsnr: Tensor) -> Tensor:
        # B = softplus(-logsnr); the quadratic's root in the form that does not cancel at small t.
        integral = softplus(-logsnr, threshold=40.0)
        return (
            2
            * integral
            / (beta_min + torch.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * integral))
        )

    return time(logsnr)
