"""Stable Diffusion's scaled-linear betas, on which DiMR trains."""

from __future__ import annotations

import torch

from mezzotint.process.schedules import schedule
from mezzotint.process.schedules.ddpm import Beta, Table, TableSteps, checked_steps


@schedule("scaled_linear")
def scaled_linear(
    steps: TableSteps = 1000,
    beta_min: Beta = 0.00085,
    beta_max: Beta = 0.012,
) -> Table:
    """Return betas whose square roots are even (latent diffusion; specs/dimr.md section 4).

    Errors: ValueError for no steps, or betas outside (0, 1).
    """
    if min(beta_min, beta_max) <= 0:
        raise ValueError(
            f"beta_min {beta_min} and beta_max {beta_max} must be positive, e.g. 0.00085 and 0.012"
        )
    return Table(
        torch.linspace(
            beta_min**0.5, beta_max**0.5, checked_steps(steps), dtype=torch.float64, device="cpu"
        )
        ** 2
    )
