"""Schedules: quantile functions u in (0, 1) -> log-SNR, decreasing; u = 0 clean, u = 1 noise.

Adding a file adds a schedule. A schedule returns u's dtype (float32 at least) on u's device, and
computes in float64. A discrete table (`Table`) is a schedule too: a look-up, constant between its
entries, so that uniform u draws each entry equally often. Inverses, slopes and sampling grids
interpolate a table between its entries (`continuous`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from mezzotint.core.registry import Registry
from mezzotint.process.denoiser import Schedule
from mezzotint.process.logsnr import widest_float

registry: Registry[Callable[..., Schedule]] = Registry("schedule", __name__)
schedule = registry.register


def in_float64(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Evaluate `function` in float64 and return the argument's dtype, float32 at least."""

    @functools.wraps(function)
    def wrapped(value: Tensor) -> Tensor:
        return function(value.to(widest_float(value.device))).to(
            torch.promote_types(value.dtype, torch.float32)
        )

    return wrapped


def continuous(schedule: Schedule) -> Schedule:
    """Return the schedule, or for a table the strictly decreasing curve through its entries."""
    return schedule.interpolated if isinstance(schedule, Table) else schedule


def invert(schedule: Schedule, logsnr: Tensor) -> Tensor:
    """Return the u of a log-SNR, by bisection to 2^-64; 0 and 1 beyond the schedule's ends.

    float64 of any shape.
    """
    curve = continuous(schedule)
    logsnr = logsnr.double()
    low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
    for _ in range(64):
        u = (low + high) / 2
        too_noisy = curve(u) < logsnr
        low, high = torch.where(too_noisy, low, u), torch.where(too_noisy, u, high)
    return (low + high) / 2


def slope(schedule: Schedule, u: Tensor) -> Tensor:
    """Return d logsnr / d u, by automatic differentiation; float64, shaped like u (0 < u < 1)."""
    with torch.inference_mode(False), torch.enable_grad():
        u = u.detach().clone().double().requires_grad_()
        (gradient,) = torch.autograd.grad(continuous(schedule)(u).sum(), u)
    return gradient


# Public names, below what their files import from here. The scan does not need these lines.
from mezzotint.process.schedules.cosine import cosine  # noqa: E402
from mezzotint.process.schedules.cosine_interpolated import cosine_interpolated  # noqa: E402
from mezzotint.process.schedules.ddpm import Table, ddpm, linear_ddpm  # noqa: E402
from mezzotint.process.schedules.linear_vp import linear_vp  # noqa: E402
from mezzotint.process.schedules.lognormal import lognormal  # noqa: E402
from mezzotint.process.schedules.scaled_linear import scaled_linear  # noqa: E402

__all__ = [
    "Table",
    "continuous",
    "cosine",
    "cosine_interpolated",
    "ddpm",
    "in_float64",
    "invert",
    "linear_ddpm",
    "linear_vp",
    "lognormal",
    "registry",
    "scaled_linear",
    "schedule",
    "slope",
]
