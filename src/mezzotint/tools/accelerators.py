"""Memory and matrix-product rates of known devices; a CPU's rates are measured where needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mezzotint.core.machine import memory_bytes
from mezzotint.core.registry import suggest

GIB = 2**30
# Part of a datasheet's dense rate that a large matrix product reaches: 790 of 989 TFLOP/s (H200).
MATMUL_EFFICIENCY = 0.8


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """A device's memory in bytes, its peak rates in FLOP/s by precision, and the source of both.

    bf16, float32: None where the rate is to be measured on this machine.
    """

    memory: float
    bf16: float | None
    float32: float | None
    source: str


def _from_datasheet(memory_gb: float, bf16: float, float32: float) -> Accelerator:
    """Memory in 1e9 bytes; dense rates in TFLOP/s, without sparsity and without TF32."""
    return Accelerator(
        memory=memory_gb * 1e9,
        bf16=MATMUL_EFFICIENCY * bf16 * 1e12,
        float32=MATMUL_EFFICIENCY * float32 * 1e12,
        source=f"datasheet, {bf16:g} bf16 and {float32:g} float32 TFLOP/s, "
        f"times {MATMUL_EFFICIENCY}",
    )


# Drivers keep some of the memory; GPUs of one name with other memories differ by more.
SAME_MEMORY = 0.12

ACCELERATORS = {
    "h200": Accelerator(
        memory=139 * GIB,
        bf16=790e12,
        float32=MATMUL_EFFICIENCY * 67e12,
        source="bf16 matrix product and memory measured; "
        f"float32 datasheet, 67 TFLOP/s, times {MATMUL_EFFICIENCY}",
    ),
    "b200": _from_datasheet(180, 2250, 75),
    "h100": _from_datasheet(80, 989, 67),
    "a100": _from_datasheet(80, 312, 19.5),
    "a100-40gb": _from_datasheet(40, 312, 19.5),
    "l40s": _from_datasheet(48, 362, 91.6),
    "rtx4090": _from_datasheet(24, 165, 82.6),
    "cpu": Accelerator(
        memory=memory_bytes(torch.device("cpu")),
        bf16=None,
        float32=None,
        source="a matrix product measured now on this machine",
    ),
}


def get_accelerator(name: str) -> Accelerator:
    """Return an entry of `ACCELERATORS`; ValueError for an unknown name lists near ones."""
    if name not in ACCELERATORS:
        raise ValueError(f"unknown device {name!r}; {suggest(name, ACCELERATORS)}")
    return ACCELERATORS[name]


def detect_device() -> str | None:
    """Return this machine's key in `ACCELERATORS`, by the GPU's name and memory.

    Returns: "cpu" without a GPU, None for a GPU that is not listed, such as a part of one or one of
        a laptop, whose memory is another.
    """
    if not torch.cuda.is_available():
        return "cpu"
    gpu = torch.cuda.get_device_name().lower().replace(" ", "")
    _, total = torch.cuda.mem_get_info()

    def difference(name: str) -> float:
        return abs(ACCELERATORS[name].memory - total) / ACCELERATORS[name].memory

    named = [name for name in ACCELERATORS if name.split("-")[0] in gpu]
    return min((n for n in named if difference(n) < SAME_MEMORY), key=difference, default=None)
