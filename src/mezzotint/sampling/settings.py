"""How to sample: sampler, discretization, guidance, clipping, precision."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch

from mezzotint.core.fields import Checked, Range, shorten
from mezzotint.core.registry import Spec, suggest
from mezzotint.process import guidance as guide
from mezzotint.process.denoiser import Denoiser

CLIPS: dict[str, Callable[..., Denoiser]] = {
    "static": guide.clipped,
    "dynamic": guide.dynamically_clipped,
}

LogSNR = Annotated[float, Range(-1000, 1000, "a log-SNR")]
Side = Annotated[int, Range(1, 16_384, "pixels or latent cells")]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How each paper counts the guidance scale: its number to DiT's, where 1 is no guidance.
CONVENTIONS: dict[str, Callable[[float], float]] = {
    "dit": lambda s: s,  # guess = uncond + s (cond - uncond)
    "simple_diffusion": lambda w: 1 + w,  # guess = (1 + w) cond - w uncond
    "dimr": lambda s: 1 + s,  # guess = cond + s (cond - uncond)
}


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """Return the dtype of the network's arithmetic; "auto" depends on the device.

    It is bfloat16 on a GPU with native bfloat16 and float32 on all other devices.
    """
    if dtype != "auto":
        return dtype
    # Emulated bfloat16 is slower than float32.
    is_fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_fast else "float32"


@dataclass(frozen=True, kw_only=True)
class Guidance(Checked):
    """How strongly to guide, and where.

    scale: strength, as `convention` counts it.
    convention: "dit" (DiT, DiffiT, EDM2, autoguidance; 1 is no guidance), "simple_diffusion" or
        "dimr" (0 is no guidance).
    low, high: log-SNRs between which guidance acts, `low` the noisier; None guides everywhere.
    power: exponent of the power-cosine, which rises from no guidance at pure noise to `scale` at
        the clean end; None keeps the scale constant.
    time: what the power-cosine runs over: "u" (the default) is the schedule's own time, a table's
        n / N, as DiMR has it; "index" is a table's (n - 1) / N, as DiffiT has it.
    channels: number of leading channels to guide; None guides all.
    """

    prefix: ClassVar[str] = "guidance "

    scale: Annotated[float, Range(-1000, 1000, "e.g. 1.5")]
    convention: str = "dit"
    low: LogSNR | None = None
    high: LogSNR | None = None
    power: Annotated[float, Range(0, 1000, "DiffiT uses 4", above=True)] | None = None
    time: str | None = None
    channels: Annotated[int, Range(1, 4096)] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.convention not in CONVENTIONS:
            raise ValueError(
                f"unknown guidance convention {self.convention!r}; "
                f"{suggest(self.convention, CONVENTIONS)}"
            )
        if (self.low is None) != (self.high is None):
            raise ValueError("a guidance interval needs both ends, low and high, as log-SNRs")
        if self.time not in (None, "u", "index"):
            raise ValueError(f"guidance time {self.time!r} must be u or index")
        if self.time is not None and self.power is None:
            raise ValueError(f"guidance time {self.time!r} needs a power-cosine; add power=4")

    @property
    def peak(self) -> float:
        """The scale as DiT counts it; the largest one of a power-cosine."""
        return CONVENTIONS[self.convention](self.scale)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Checked):
    """How to sample.

    sampler: registered name with options.
    discretization: registered name with options. None is the sampler's own (Karras' for Heun's,
        those of `flow_heun` and `consistency`), else Karras' for EDM's log-normal schedule and even
        in u for others.
    steps: number of intervals of the discretization.
    guidance: None is no guidance.
    clip: "static" (low=-1, high=1) or "dynamic" (quantile=0.995) clipping of the denoised image
        after guidance; None is no clipping.
    size: (height, width) of the network's input; None is its native size.
    batch: images per network call; with `exact` it changes speed and memory only.
    exact: evaluate the network in tiles of one size, for the same bytes at every batch size. None
        does so on the CPU.
    dtype: of the network's arithmetic: "float32", "bfloat16", "float16", or "auto", see
        `resolve_dtype`. The solver always computes in float32.
    cuda_graphs: record the network once for full batches and once for single images, and replay it
        without Python's cost per kernel. None does so on CUDA where `exact` is off, and goes on
        without where recording fails. True needs a CUDA device, excludes `exact`, records every
        batch size, and raises where recording fails.
    compile: torch.compile each repeated block, which takes a minute or more before the first image.
    """

    sampler: Spec = field(default_factory=lambda: Spec("ddim"))
    discretization: Spec | None = None
    steps: Annotated[int, Range(1, 10_000)] = 50
    guidance: Guidance | None = None
    clip: Spec | None = None
    size: tuple[Side, Side] | None = None
    batch: Annotated[int, Range(1, 1_000_000, "images at a time")] = 64
    exact: bool | None = None
    dtype: str = "auto"
    cuda_graphs: bool | None = None
    compile: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("steps", "batch"):
            if not isinstance(value := getattr(self, name), numbers.Integral):
                raise ValueError(f"{name} is {shorten(value)}; a whole number is needed")
        if self.dtype not in (known := ["auto", *DTYPES]):
            raise ValueError(f"unknown dtype {self.dtype!r}; {suggest(self.dtype, known)}")
        if self.clip is not None and self.clip.name not in CLIPS:
            raise ValueError(
                f"unknown clipping {self.clip.name!r}; {suggest(self.clip.name, CLIPS)}"
            )
