"""Compile the Triton kernels for a Hopper GPU on a machine without one, into a cache that travels.

    .venv-cuda/bin/python benchmarks/triton_cache.py wheels/triton

Needs the versions of the GPU machine, see step_model.py: a kernel compiled by another Triton is
compiled again there. The kernels are asked for as the network asks, and compiled without a launch.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

WIDTHS = (480,)  # of DiMR-XL's ConvNeXt blocks, as gpu_kernels.py and training ask for them


class Hopper:
    """What Triton asks its driver before it compiles."""

    def get_current_device(self) -> int:
        """Return the first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> Any:
        """Return compute capability 9.0."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def compile_kernels() -> None:
    """Compile forward and weight gradient for every width, in bf16 and float32."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from mezzotint.backbones.kernels import depthwise_triton as kernels

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    driver.set_active(Hopper())
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(torch.cuda, "device_of", lambda tensor: nullcontext()),
    ):
        for width in WIDTHS:
            for kept in (torch.bfloat16, torch.float32):
                x = torch.zeros(64, 32, 32, width, dtype=kept)
                weight, bias = torch.zeros(width, 1, 7, 7), torch.zeros(width)
                kernels.forward(x, weight, bias, True)
                kernels.weight_gradient(x, x, 7)


if __name__ == "__main__":
    os.environ["TRITON_CACHE_DIR"] = str(Path(sys.argv[1]).absolute())
    compile_kernels()
    found = sorted(Path(sys.argv[1]).rglob("*.cubin"))
    print(f"{len(found)} kernels, {sum(f.stat().st_size for f in found):,} bytes of machine code")
