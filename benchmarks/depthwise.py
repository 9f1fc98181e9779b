"""DiMR's 7x7 depthwise convolution on a CPU: its weight gradient by torch and by mezzotint.

OMP_NUM_THREADS=1 python benchmarks/depthwise.py
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, one_thread, write
from mezzotint.backbones.kernels.depthwise import convolve, cpu_weight_gradient
from mezzotint.tools.benchmark import time_interleaved

# (images, channels, side): published widths, a small network, a fine grid
SHAPES = [(2, 480, 32), (1, 192, 64), (2, 384, 32), (16, 64, 32), (2, 64, 128)]


def torch_weight_gradient(
    x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Return the weight gradient of `convolve` by torch's own kernel."""
    c, _, k, _ = weight.shape
    images = [t.permute(0, 3, 1, 2) for t in (grad, x)]
    geometry = [1, 1], [k // 2, k // 2], [1, 1], False, [0, 0], c  # stride, padding, dilation, ...
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(*images, weight, None, *geometry, wanted)[1]


def measure(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of each, and how far either gradient is from float64's."""
    b, c, side = shape
    torch.manual_seed(0)
    x, grad = (torch.randn(b, side, side, c).to(dtype) for _ in range(2))
    weight = torch.randn(c, 1, 7, 7).to(dtype)
    exact = torch_weight_gradient(x.double(), grad.double(), weight.double())
    works = {
        "convolution": partial(convolve, x, weight),
        "weight gradient, torch": partial(torch_weight_gradient, x, grad, weight),
        "weight gradient, mezzotint": partial(cpu_weight_gradient, x, grad, 7),
    }
    errors = {
        name: float((work().double() - exact).norm() / exact.norm())
        for name, work in list(works.items())[1:]
    }
    seconds = time_interleaved(works, "cpu", rounds)
    return {
        "shape": [b, c, side, side],
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "errors": errors,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "depthwise-cpu.json")
    args = parser.parse_args()
    one_thread()
    rows = [
        measure(shape, dtype, args.rounds)
        for shape in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for row in rows:
        print(row)
    write(args.out, "cpu", rows=rows)


if __name__ == "__main__":
    main()
