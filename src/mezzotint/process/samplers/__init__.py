"""Samplers: functions (denoiser, z at grid[0], grid of rising log-SNR, cond) -> image. One file adds one.

Options are keyword-only with defaults. A stochastic sampler takes `noise: Noise = gaussian`; draw number i of a run is
noise(i, z), standard normal and shaped like z, so that whoever calls can make it a function of each image's own seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mezzotint.process.denoiser import Image
from mezzotint.registry import Registry

Noise = Callable[[int, Image], Image]
Sampler = Callable[..., Image]

registry: Registry[Sampler] = Registry("sampler", __name__)
sampler = registry.register


def gaussian(i: int, like: Image) -> Image:
    """Draw number i from torch's global generator; fine for experiments, not reproducible across batch sizes."""
    return torch.randn_like(like)
