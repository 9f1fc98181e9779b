"""Grids: functions (schedule, steps, options) -> the `steps + 1` rising log-SNRs between which a sampler steps.

A float64 tensor on the CPU. A `clean` grid ends in +inf: the last step returns the denoised image. Any other ends
where the schedule (or an option) says, with that much noise left. Every grid raises ValueError for fewer than one
step and for numbers that do not rise from a finite start.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mezzotint.core.registry import Registry
from mezzotint.process.denoiser import Schedule
from mezzotint.process.samplers import points
from mezzotint.process.schedules import Table, continuous

# The samplers' folder is what is scanned: a sampler that wants a grid of its own registers it in its own file.
registry: Registry[Callable[..., Tensor]] = Registry("grid", "mezzotint.process.samplers")
grid = registry.register


def _line(start: float, end: float, points: int) -> Tensor:
    return torch.linspace(start, end, points, dtype=torch.float64)


def _ends(schedule: Schedule) -> tuple[float, float]:
    """The schedule's noisiest and cleanest log-SNR; a table's are its entries."""
    if isinstance(schedule, Table):
        return float(schedule.logsnr[-1]), float(schedule.logsnr[0])
    ends = schedule(torch.tensor([1.0, 0.0], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _finished(logsnr: Tensor, clean: bool) -> Tensor:
    """The grid with +inf appended if it is to end clean, checked."""
    if not logsnr[0].isfinite():
        raise ValueError(
            f"a grid cannot start at log-SNR {logsnr[0]}; start inside the schedule (start, logsnr_min)"
        )
    if clean:
        logsnr = torch.cat([logsnr, torch.tensor([math.inf], dtype=torch.float64)])
    points(logsnr)
    return logsnr


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"{steps} steps are not enough; give 1 or more, 50 is a usual start")


def _check_table(schedule: Schedule, steps: int) -> None:
    if isinstance(schedule, Table) and steps > len(schedule):
        raise ValueError(
            f"{steps} steps are more than the table's {len(schedule)}; give {len(schedule)} or fewer"
        )


@grid("even")
def even(
    schedule: Schedule, steps: int, *, start: float = 1.0, end: float = 0.0, clean: bool = True
) -> Tensor:
    """Even in u from `start` to `end` (simple diffusion section 2); a table is read between its entries.

    Args:
        start, end: u of the first and last point, 1 >= start > end >= 0. DiMR's grid is end=1e-3, clean=False
            (specs/dimr.md 6.1); schedules infinite at u = 1 need a start below it, e.g. 0.999.
        clean: the last point, at `end`, becomes +inf.

    Errors: ValueError for more steps than a table has entries.
    """
    _check_steps(steps)
    _check_table(schedule, steps)
    if not 1 >= start > end >= 0:
        raise ValueError(f"start {start} and end {end} must fall within 1 >= start > end >= 0")
    logsnr = continuous(schedule)(_line(start, end, steps + 1))
    return _finished(logsnr[:-1] if clean else logsnr, clean)


@grid("even_logsnr")
def even_logsnr(
    schedule: Schedule,
    steps: int,
    *,
    logsnr_min: float | None = None,
    logsnr_max: float | None = None,
    clean: bool = True,
) -> Tensor:
    """Even in log-SNR (DPM-Solver section 3.4's uniform lambda), from logsnr_min to logsnr_max, then +inf if `clean`.

    Args:
        logsnr_min, logsnr_max: ends; None is the schedule's own, which must then be finite.
    """
    _check_steps(steps)
    noisy, cleanest = _ends(schedule)
    low = noisy if logsnr_min is None else logsnr_min
    high = cleanest if logsnr_max is None else logsnr_max
    if math.isinf(low) or math.isinf(high):
        raise ValueError(
            f"the schedule runs from {low} to {high}; give finite logsnr_min and logsnr_max, e.g. -10 and 10"
        )
    return _finished(_line(low, high, steps if clean else steps + 1), clean)


@grid("karras")
def karras(
    schedule: Schedule,
    steps: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    clean: bool = True,
) -> Tensor:
    """EDM's grid (eq. 5): sigma^(1/rho) even from sigma_max to sigma_min, then +inf if `clean`.

    Args:
        sigma_min, sigma_max: in EDM's sigma = exp(-logsnr / 2); None is EDM's 0.002 and 80, or the schedule's own
            end where that lies inside.
        rho: larger puts more steps near the image.
    """
    _check_steps(steps)
    noisy, cleanest = _ends(schedule)
    first = min(80.0, math.exp(-noisy / 2)) if sigma_max is None else sigma_max
    last = max(0.002, math.exp(-cleanest / 2)) if sigma_min is None else sigma_min
    if not 0 < last < first or not rho > 0:
        raise ValueError(
            f"sigma_min {last}, sigma_max {first} and rho {rho} must be positive, sigma_min < sigma_max"
        )
    sigma = _line(first ** (1 / rho), last ** (1 / rho), steps if clean else steps + 1) ** rho
    return _finished(-2 * sigma.log(), clean)


@grid("respaced")
def respaced(schedule: Schedule, steps: int) -> Tensor:
    """A table's own entries, the indices round(i (N - 1) / (steps - 1)) (ADM's respacing; DiffiT), then +inf.

    Halves are rounded to even as ADM's code does. A single step starts at the noisiest entry, our choice.

    Errors: ValueError for a schedule that is no table, or more steps than it has.
    """
    _check_steps(steps)
    if not isinstance(schedule, Table):
        raise ValueError(
            "a respaced grid needs a discrete table (ddpm, scaled_linear ...); try the grid 'even'"
        )
    _check_table(schedule, steps)
    stride = (len(schedule) - 1) / max(steps - 1, 1)
    kept = [round(i * stride) for i in range(steps)] if steps > 1 else [len(schedule) - 1]
    return _finished(schedule.logsnr[kept].flip(0), clean=True)
