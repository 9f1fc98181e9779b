"""Discretizations: functions (schedule, steps, options) -> `steps + 1` rising log-SNRs.

A sampler steps between them. They are a float64 tensor on the CPU. A `clean` grid ends in +inf: the
last step returns the denoised image. Any other ends where the schedule (or an option) says, with
that much noise left. Every one raises ValueError for fewer than one step and for numbers that do
not rise from a finite start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.core.registry import Registry
from mezzotint.process.denoiser import Schedule
from mezzotint.process.samplers import points
from mezzotint.process.samplers.dpmpp_singlestep import step_orders
from mezzotint.process.schedules import Table, continuous

# The scan is of the samplers' folder: a sampler may register a grid of its own in its file.
registry: Registry[Callable[..., Tensor]] = Registry("discretization", "mezzotint.process.samplers")
grid = registry.register


def line(start: float, end: float, points: int) -> Tensor:
    """Return float64 numbers evenly from `start` to `end`, on the CPU."""
    return torch.linspace(start, end, points, dtype=torch.float64, device="cpu")


def _ends(schedule: Schedule) -> tuple[float, float]:
    """Return the schedule's noisiest and cleanest log-SNR; a table's are entries."""
    if isinstance(schedule, Table):
        return float(schedule.logsnr[-1]), float(schedule.logsnr[0])
    ends = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu"))
    return float(ends[0]), float(ends[1])


def finish_grid(logsnr: Tensor, clean: bool) -> Tensor:
    """Check a grid, after appending +inf if it is to end clean."""
    if not logsnr[0].isfinite():
        raise ValueError(
            f"a grid cannot start at log-SNR {logsnr[0]}; start inside the schedule "
            "(start, logsnr_min)"
        )
    if clean:
        logsnr = torch.cat([logsnr, logsnr.new_tensor([math.inf])])
    points(logsnr)
    return logsnr


def check_steps(steps: int) -> None:
    """Check that there is a step; ValueError below 1."""
    if steps < 1:
        raise ValueError(f"{steps} steps are not enough; use 1 or more, e.g. 50")


def _check_table(schedule: Schedule, steps: int) -> None:
    if isinstance(schedule, Table) and steps > len(schedule):
        raise ValueError(
            f"{steps} steps are more than the table's {len(schedule)}; use {len(schedule)} or fewer"
        )


@grid("even")
def even(
    schedule: Schedule, steps: int, *, start: float = 1.0, end: float = 0.0, clean: bool = True
) -> Tensor:
    """Step evenly in u from `start` to `end` (simple diffusion section 2).

    A table is interpolated between its entries.

    Args:
        start, end: u of the first and last point, 1 >= start > end >= 0. DiMR's grid is end=1e-3,
            clean=False (specs/dimr.md 6.1); schedules infinite at u = 1 need a start below it, e.g.
            0.999.
        clean: the last point, at `end`, becomes +inf.

    Errors: ValueError for more steps than a table has entries.
    """
    check_steps(steps)
    _check_table(schedule, steps)
    if not 1 >= start > end >= 0:
        raise ValueError(f"start {start} and end {end} must fall within 1 >= start > end >= 0")
    logsnr = continuous(schedule)(line(start, end, steps + 1))
    return finish_grid(logsnr[:-1] if clean else logsnr, clean)


@grid("quadratic")
def quadratic(
    schedule: Schedule, steps: int, *, start: float = 1.0, end: float = 1e-3, clean: bool = True
) -> Tensor:
    """Step evenly in sqrt(u) from `start` to `end`, then to +inf if `clean`.

    `time_quadratic` of DPM-Solver's code, used by DDIM for small images.

    Args:
        start, end: u of the first and last finite point, 1 >= start > end > 0.
    """
    check_steps(steps)
    if not 1 >= start > end > 0:
        raise ValueError(f"start {start} and end {end} must fall within 1 >= start > end > 0")
    u = line(math.sqrt(start), math.sqrt(end), steps if clean else steps + 1) ** 2
    return finish_grid(continuous(schedule)(u), clean)


def _logsnr_ends(
    schedule: Schedule, logsnr_min: float | None, logsnr_max: float | None
) -> tuple[float, float]:
    """Return the ends given, or the schedule's own, which must then be finite."""
    noisy, cleanest = _ends(schedule)
    low = noisy if logsnr_min is None else logsnr_min
    high = cleanest if logsnr_max is None else logsnr_max
    if math.isinf(low) or math.isinf(high):
        raise ValueError(
            f"the schedule runs from {low} to {high}; give finite logsnr_min and logsnr_max, "
            "e.g. -10 and 10"
        )
    return low, high


@grid("even_logsnr")
def even_logsnr(
    schedule: Schedule,
    steps: int,
    *,
    logsnr_min: Annotated[float, Range(-1000, 1000, "a log-SNR")] | None = None,
    logsnr_max: Annotated[float, Range(-1000, 1000, "a log-SNR")] | None = None,
    clean: bool = True,
) -> Tensor:
    """Step evenly in log-SNR, from logsnr_min to logsnr_max, then to +inf if `clean`.

    DPM-Solver section 3.4, uniform lambda.

    Args:
        logsnr_min, logsnr_max: ends; None is the schedule's own, which must then be finite.
    """
    check_steps(steps)
    low, high = _logsnr_ends(schedule, logsnr_min, logsnr_max)
    return finish_grid(line(low, high, steps if clean else steps + 1), clean)


@grid("even_logsnr_singlestep")
def even_logsnr_singlestep(
    schedule: Schedule,
    steps: int,
    *,
    logsnr_min: Annotated[float, Range(-1000, 1000, "a log-SNR")] | None = None,
    logsnr_max: Annotated[float, Range(-1000, 1000, "a log-SNR")] | None = None,
    clean: bool = True,
    order: int = 3,
    plan: str = "fast",
) -> Tensor:
    """Make the steps of `dpmpp_singlestep` equally long in log-SNR, whatever their orders.

    DPM-Solver's code spaces its outer steps so. A step of order k is k equal intervals.

    Args:
        logsnr_min, logsnr_max: ends; None is the schedule's own, which must then be finite.
        order, plan: the sampler's.
    """
    check_steps(steps)
    low, high = _logsnr_ends(schedule, logsnr_min, logsnr_max)
    orders = step_orders(steps, order, plan, clean)
    if clean:
        orders = orders[:-1]
    parts = [i + j / size for i, size in enumerate(orders) for j in range(size)]
    marks = torch.tensor([*parts, len(orders)], dtype=torch.float64, device="cpu")
    return finish_grid(low + (high - low) * marks / max(len(orders), 1), clean)


@grid("karras")
def karras(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: Annotated[float, Range(0, 1e6)] | None = None,
    sigma_max: Annotated[float, Range(0, 1e6)] | None = None,
    rho: Annotated[float, Range(0, 1000, "EDM uses 7", above=True)] = 7.0,
    clean: bool = True,
) -> Tensor:
    """Step evenly in sigma^(1/rho), from sigma_max to sigma_min, then to +inf if `clean` (EDM eq.
    5).

    Args:
        sigma_min, sigma_max: in EDM's sigma = exp(-logsnr / 2); None is EDM's 0.002 and 80, or the
            schedule's own end where that lies inside.
        rho: larger puts more steps near the image.
    """
    check_steps(steps)
    noisy, cleanest = _ends(schedule)
    first = min(80.0, math.exp(min(-noisy / 2, 700.0))) if sigma_max is None else sigma_max
    last = max(0.002, math.exp(-cleanest / 2)) if sigma_min is None else sigma_min
    if not 0 < last < first or not rho > 0:
        raise ValueError(
            f"sigma_min {last}, sigma_max {first} and rho {rho} must be positive, "
            "sigma_min < sigma_max"
        )
    sigma = line(first ** (1 / rho), last ** (1 / rho), steps if clean else steps + 1) ** rho
    return finish_grid(-2 * sigma.log(), clean)


@grid("respaced")
def respaced(schedule: Schedule, steps: int) -> Tensor:
    """Step through a table's own entries, then to +inf (ADM's respacing; DiffiT).

    The indices are those of ADM's released code: a sum of strides (N - 1) / (steps - 1), each
    partial sum rounded, halves to even. It differs from round(i (N - 1) / (steps - 1)) by one index
    for some step counts, and keeps the cleanest entry for a single step.

    Errors: ValueError for a schedule that is not a table, or more steps than it has.
    """
    check_steps(steps)
    if not isinstance(schedule, Table):
        raise ValueError("respaced needs a discrete table (ddpm, scaled_linear ...); try even")
    _check_table(schedule, steps)
    stride = (len(schedule) - 1) / max(steps - 1, 1)
    kept = [round(total) for total in accumulate([0.0] + [stride] * (steps - 1))]
    return finish_grid(schedule.logsnr[kept].flip(0), clean=True)
