"""How to sample: sampler, discretization, guidance, clipping, precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mezzotint.core.registry import Spec, suggest
from mezzotint.process import guidance as guide
from mezzotint.process.denoiser import Denoiser

CLIPS: dict[str, Callable[..., Denoiser]] = {
    "static": guide.clipped,
    "dynamic": guide.dynamically_clipped,
}


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly to guide, and where. Exactly one of the three scales is given, each its own paper's number.

    dit_s: guess = weak + s (strong - weak), of DiT, DiffiT, EDM2 and autoguidance; 1 is none.
    simple_diffusion_w: guess = (1 + w) cond - w uncond; 0 is none.
    dimr_s: guess = cond + s (cond - uncond); 0 is none.
    low, high: natural log-SNRs between which guidance acts, `low` the noisier.
    power: of the power-cosine, which rises from no guidance at pure noise to the scale at the clean end; None is
        constant.
    time: what the power-cosine runs over: "u" (None too) is the schedule's own, a table's n / N, as DiMR has it;
        "index" is a table's (n - 1) / N, as DiffiT has it.
    channels: how many leading channels are guided; None is all.
    """

    dit_s: float | None = None
    simple_diffusion_w: float | None = None
    dimr_s: float | None = None
    low: float | None = None
    high: float | None = None
    power: float | None = None
    time: str | None = None
    channels: int | None = None

    def __post_init__(self):
        given = [
            n for n in ("dit_s", "simple_diffusion_w", "dimr_s") if getattr(self, n) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"guidance needs one of dit_s, simple_diffusion_w and dimr_s; given: {given or 'none'}"
            )
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval needs both ends, low and high, as log-SNRs")
        if not math.isfinite(self.peak):
            raise ValueError(
                f"guidance {self.peak} must be a finite number; 1 is none as DiT counts it"
            )
        if self.time not in (None, "u", "index") or (self.time is not None and self.power is None):
            raise ValueError(
                f"time {self.time!r} must be u or index, and belongs to a power-cosine (power=4)"
            )

    @property
    def peak(self) -> float:
        """The scale in DiT's unit; the power-cosine's largest."""
        if self.dit_s is not None:
            return self.dit_s
        if self.simple_diffusion_w is not None:
            return 1 + self.simple_diffusion_w
        assert self.dimr_s is not None
        return 1 + self.dimr_s


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How to sample.

    sampler, grid: registered names with options; grid None is Karras' for Heun's sampler and for EDM's log-normal
        schedule, even in u otherwise. steps: intervals of the grid.
    guidance: None is none.
    clip: "static" (low=-1, high=1) or "dynamic" (quantile=0.995) clipping of the denoised image after guidance; None
        is none.
    size: (height, width) of the network's input; None is its native size.
    batch: images per network call; with `exact` it changes speed and memory only.
    exact: evaluate the network in tiles of one size, for the same bytes at every batch size. None: on the CPU.
    dtype: of the network's arithmetic, "float32", "bfloat16" or "float16"; the solver's is always float32.
    """

    sampler: Spec = field(default_factory=lambda: Spec("ddim"))
    grid: Spec | None = None
    steps: int = 50
    guidance: Guidance | None = None
    clip: Spec | None = None
    size: tuple[int, int] | None = None
    batch: int = 64
    exact: bool | None = None
    dtype: str = "float32"

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch {self.batch} must be at least 1")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size {self.size} must be positive")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; {suggest(self.dtype, DTYPES)}")
        if self.clip is not None and self.clip.name not in CLIPS:
            raise ValueError(
                f"unknown clipping {self.clip.name!r}; {suggest(self.clip.name, CLIPS)}"
            )
