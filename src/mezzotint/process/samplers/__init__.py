"""Samplers: functions (denoiser, z at grid[0], grid of rising log-SNR, cond) -> image. One file adds one.

Options are keyword-only with defaults. A stochastic sampler takes `noise: Noise = gaussian`; draw number i of a run is
noise(i, z), standard normal and shaped like z, so that whoever calls can make it a function of each image's own seed.
i counts the intervals of the grid.

A grid that ends in +inf ends in a denoised image, the network's own; one that ends at a finite log-SNR ends in a state
with that much noise left. Grids are in `grids`. Coefficients are float64 scalars, the state keeps z's dtype (float32
or wider). To see x along the way, wrap the denoiser.
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
    """Draw number i from torch's global generator; fine for experiments, not reproducible across batch sizes."""
    return torch.randn_like(like)


def points(grid: Grid) -> list[Tensor]:
    """A grid's log-SNRs as float64 scalars on the CPU, where they multiply tensors of any device without a transfer.

    Errors: ValueError unless there are two or more, rising, the first finite; only the last may be +inf.
    """
    values = grid.detach().to("cpu", torch.float64)
    if len(values) < 2:
        raise ValueError(f"a grid of {len(values)} log-SNRs has no step; it needs two or more")
    if not values[0].isfinite() or not bool((values[1:] > values[:-1]).all()):
        raise ValueError(
            f"a grid must rise from a finite log-SNR, and only its last may be inf; given {grid}"
        )
    return list(values.unbind())


def intervals(grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps of a grid: pairs (t, s) of log-SNRs, from the noisier to the cleaner."""
    return pairwise(points(grid))


def level(logsnr: Tensor, z: Image) -> PerImage:
    """One log-SNR as the (b,) tensor that a denoiser takes.

    float64, so that a table's entries are met exactly; on the CPU whatever z's device, so that guidance can look at it
    without waiting for the device (`logsnr.beside` brings it there).
    """
    return torch.full((len(z),), float(logsnr), dtype=torch.float64, device="cpu")
