"""Discrete schedules from betas, including DDPM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mezzotint.core.fields import Range
from mezzotint.process.logsnr import widest_float
from mezzotint.process.schedules import in_float64, schedule

TableSteps = Annotated[int, Range(1, 1_000_000)]
Beta = Annotated[float, Range(0, 1, "a part of the variance", above=True, below=True)]


class Table:
    """A schedule of N steps, n = 1 (cleanest) ... N, and the step of a log-SNR.

    Called with u it looks up entry n = ceil(N u), so that uniform u draws n = 1 ... N equally
    often. Between the entries, for sampling, log alpha is piecewise linear in t = n / N
    (`interpolated`; DPM-Solver's discrete schedule, specs/dimr.md 6.1).

    Args:
        betas: 1 - alpha_n^2 / alpha_{n-1}^2 of each step, each in (0, 1).

    Attributes:
        logsnr: (N,) float64 on the CPU, decreasing; row i is step n = i + 1, index i of DDPM's
            code.
    """

    def __init__(self, betas: Sequence[float] | Tensor):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be one row of numbers; given shape {tuple(betas.shape)}")
        if not bool((inside := (betas > 0) & (betas < 1)).all()):
            raise ValueError(f"beta {betas[~inside][0]:g} is not in (0, 1)")
        # DDPM eq. 4: alpha_n^2 = prod (1 - beta); summed as logs so that 1 - alpha^2 is exact at
        # the clean end.
        log_alpha = torch.log1p(-betas).cumsum(0) / 2
        self.logsnr = 2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha))
        # log alpha at t = 0, 1/N, ..., 1
        self._knots = torch.cat([log_alpha.new_zeros(1), log_alpha])
        self._copies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (logsnr, knots) on `device`, copied once so that the host need not wait."""
        if device not in self._copies:
            exact = widest_float(device)
            self._copies[device] = self.logsnr.to(device, exact), self._knots.to(device, exact)
        return self._copies[device]

    def __len__(self) -> int:
        return len(self.logsnr)

    def __call__(self, u: Tensor) -> Tensor:
        """Return the log-SNR of entry n = ceil(N u); u in [0, 1] of any shape, in u's dtype."""
        # u = n / N must still give n after rounding to float32.
        rounding = len(self) * torch.finfo(torch.float32).eps
        n = torch.ceil(u.double() * len(self) - rounding).long().clamp(1, len(self))
        return self._on(u.device)[0][n - 1].to(torch.promote_types(u.dtype, torch.float32))

    def interpolated(self, t: Tensor) -> Tensor:
        """Return the log-SNR at t in [0, 1], any shape, between the entries at t = n / N.

        log alpha is piecewise linear.
        Below the first entry the line runs to alpha = 1 at t = 0, our choice: there the log-SNR is
        +inf.
        """
        return in_float64(self._interpolated)(t)

    def _interpolated(self, t: Tensor) -> Tensor:
        knots = self._on(t.device)[1].to(t)
        n = torch.floor(t.detach() * len(self)).long().clamp(0, len(self) - 1)
        log_alpha = knots[n] + (t * len(self) - n) * (knots[n + 1] - knots[n])
        return 2 * log_alpha - torch.log(-torch.expm1(2 * log_alpha))

    def index(self, logsnr: Tensor) -> Tensor:
        """Return the index of a log-SNR, 0 ... N - 1, fractional between entries; any shape.

        In logsnr's dtype. It is N t - 1 for the t that `interpolated` maps to this log-SNR, clamped
        to the table. DDPM, ADM, DiT and DiffiT give their networks this number; DiMR and U-ViT
        count the step n = index + 1.
        """
        # A log-SNR that is an entry up to the rounding of its own dtype gets that entry's integer
        # exactly.
        rounding = 4 * torch.finfo(logsnr.dtype).eps

        def index(logsnr: Tensor) -> Tensor:
            entries, knots = (table.to(logsnr) for table in self._on(logsnr.device))
            log_alpha = -softplus(-logsnr, threshold=40.0) / 2
            left = torch.searchsorted(-knots, -log_alpha.contiguous()).clamp(1, len(self)) - 1
            t = left + (log_alpha - knots[left]) / (knots[left + 1] - knots[left])
            exact = (t - 1).clamp(0, len(self) - 1)
            nearest = exact.round()
            apart = (logsnr - entries[nearest.long()]).abs()
            return torch.where(apart <= rounding * logsnr.abs(), nearest, exact)

        return in_float64(index)(logsnr)


@schedule("ddpm")
def ddpm(betas: Sequence[float] | Tensor) -> Table:
    """Return the table of any betas (DDPM section 2), beta_n = 1 - alpha_n^2 / alpha_{n-1}^2.

    Errors: ValueError for betas that are not one row of numbers in (0, 1).
    """
    return Table(betas)


@schedule("linear_ddpm")
def linear_ddpm(
    steps: TableSteps = 1000,
    beta_min: Beta = 1e-4,
    beta_max: Beta = 0.02,
    scaled: bool = False,
) -> Table:
    """Return DDPM's linear betas (section 4), also ADM's, DiT's and latent DiffiT's.

    Args:
        beta_min, beta_max: first and last beta of a table of 1000 steps.
        scaled: multiply both by 1000 / steps, as the released code of ADM and DiT does, so that a
            table of any length ends at about the same noise.

    Errors: ValueError for betas outside (0, 1); with `scaled` and the default ends 21 steps are the
        fewest.
    """
    scale = 1000 / checked_steps(steps) if scaled else 1
    if scaled and scale * max(beta_min, beta_max) >= 1:
        raise ValueError(
            f"linear betas scaled by 1000 / {steps} end at {scale * max(beta_min, beta_max):g}, "
            f"and must stay below 1; use more than {int(1000 * max(beta_min, beta_max))} steps"
        )
    ends, count = (scale * beta_min, scale * beta_max), checked_steps(steps)
    return Table(torch.linspace(*ends, count, dtype=torch.float64, device="cpu"))


def checked_steps(steps: int) -> int:
    """Return `steps` of a table; ValueError below 1."""
    if steps < 1:
        raise ValueError(f"a table of {steps} steps is empty; the papers use 1000")
    return steps
