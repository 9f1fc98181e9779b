"""Schedules: quantile functions u in (0, 1) -> log-SNR, decreasing; u = 0 clean, u = 1 noise. One file adds one."""

from __future__ import annotations

from collections.abc import Callable

from mezzotint.process.denoiser import Schedule
from mezzotint.registry import Registry

registry: Registry[Callable[..., Schedule]] = Registry("schedule", __name__)
schedule = registry.register
