"""Which precision a run computes in."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Literal

import torch

from mezzotint.config import Engine, Recipe
from mezzotint.train.run_folder import started_recipe

Precision = Literal["float32", "bf16"]

# Measured products: the side of their matrices, and the gain that makes bf16 worth its rounding.
# An AMD EPYC with AVX512-BF16 gains 2.1, an Intel Xeon with it loses half (docs/performance.md).
SIDE = 512
ROUNDS = 5
LEAST_GAIN = 1.2


def choose_precision(engine: Engine, device: str) -> Precision:
    """Replace "auto" by bf16 where `device` computes faster in it, else by float32.

    device: "cpu" and "cuda" are this machine's; of any other name bf16 is fast.
    """
    if engine.precision != "auto":
        return engine.precision
    if device == "cpu":
        is_fast = _cpu_gains_from_bf16()
    else:
        is_fast = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if is_fast else "float32"


def resolve_precision(recipe: Recipe, folder: Path, device: torch.device) -> Precision:
    """Return the precision of the run in `folder`, which `recipe` may leave to the machine.

    On a CPU a run that has started keeps its precision: it resumes to the bit.
    """
    started = started_recipe(folder) if recipe.engine.precision == "auto" else None
    if started is not None and device.type == "cpu" and _cpu_has_bf16():
        return choose_precision(started.engine, "cpu")
    return choose_precision(recipe.engine, device.type)


def _cpu_has_bf16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@functools.cache
def _cpu_gains_from_bf16() -> bool:
    """Return whether products in bf16 are faster here: measured, some 50 ms on one core."""
    # Support tells nothing: some processors with AVX512-BF16 multiply at half float32's rate.
    if not _cpu_has_bf16():
        return False
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    # The global generator is the run's.
    square = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    inputs = {dtype: square.to(dtype) for dtype in seconds}
    for _ in range(ROUNDS):
        for dtype, factor in inputs.items():
            started = time.perf_counter()
            torch.mm(factor, factor)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.float32] > LEAST_GAIN * seconds[torch.bfloat16]
