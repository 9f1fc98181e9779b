"""The machine: processor, threads, versions, load."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch


def describe_machine(device: str) -> dict[str, Any]:
    """Return what a result depends on besides the code: processor, threads, versions, load."""
    return {
        "processor": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def use_full_float32() -> None:
    """Compute in all of float32's bits where float32 is chosen: no TF32 in products, convolutions.

    torch's own default is TF32 in the convolutions of a GPU, though not in its products. Every
    command calls this; code that imports mezzotint keeps its own setting.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def memory_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU's memory, or of this machine's for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = {
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            }
            file.seek(0)
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        return platform.processor() or platform.machine()
    extensions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{' / '.join(sorted(names))} ({', '.join(extensions)})"
