"""Samplers: functions (denoiser, z at grid[0], grid of rising log-SNRs, cond) -> image.

Adding a file adds a sampler. Options are keyword-only with defaults. A stochastic sampler takes
`noise: Noise = gaussian`. The draw in interval i of the grid is noise(i, z), standard normal and
shaped like z, so that the caller can make it a function of each image's own seed.

A grid that ends in +inf ends in a denoised image, the network's own; one that ends at a finite
log-SNR ends in a state with that much noise left. Grids are made by `grids`. Coefficients are
float64 scalars, the state keeps z's dtype (float32 or wider). To record x along the way, wrap the
denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.registry import Registry
from mezzotint.process.denoiser import Image, PerImage

Noise = Callable[[int, Image], Image]
Sampler = Callable[..., Image]
Grid = Float[Tensor, " n"]

registry: Registry[Sampler] = Registry("sampler", __name__)
sampler = registry.register


def gaussian(i: int, like: Image) -> Image:
    """Draw from torch's global generator; results then depend on the batch size."""
    return torch.randn_like(like)


def points(grid: Grid) -> list[Tensor]:
    """Return a grid's log-SNRs as float64 scalars on the CPU, which multiply tensors anywhere.

    Errors: ValueError unless there are two or more, rising, the first finite; only the last may be
    +inf."""
    values = grid.detach().to("cpu", torch.float64)
    if len(values) < 2:
        raise ValueError(f"a grid of {len(values)} log-SNRs has no step; it needs two or more")
    if not values[0].isfinite() or not bool((values[1:] > values[:-1]).all()):
        raise ValueError(
            f"a grid must rise from a finite log-SNR, and only its last may be inf; given {grid}"
        )
    return list(values.unbind())


def intervals(grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the steps of a grid: pairs (t, s) of log-SNRs, t the noisier."""
    return pairwise(points(grid))


def intervals_with_orders(
    grid: Grid, order: int, lower_order_final: bool
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield the steps of a grid as `intervals` does, each with the highest order that it may have.

    That is `order`, or with `lower_order_final` at most the number of steps left (the released code
    of UniPC; of DPM-Solver++ in runs of few steps): a polynomial through the past overshoots where
    the last steps are the longest in log-SNR. A grid that ends in +inf is left alone: its last step
    has no order.
    """
    steps = list(intervals(grid))
    lower = lower_order_final and not steps[-1][1].isinf()
    for i, (t, s) in enumerate(steps):
        yield t, s, min(order, len(steps) - i) if lower else order


def level(logsnr: Tensor, z: Image) -> PerImage:
    """Return one log-SNR as the (b,) tensor that a denoiser takes.

    In float64, so that a table's entries are met exactly. On the CPU for z on any device, so that
    guidance can read it without waiting for the device; `logsnr.to_device_of` moves it there.
    """
    return torch.full((len(z),), float(logsnr), dtype=torch.float64, device="cpu")
