"""CUDA graphs for sampling: a denoiser recorded once per shape and replayed without launching kernels from Python.

Opt-in, `Graphed(model)` in place of the model. A guidance interval needs nothing more: outside of it the network is
called with the plain batch, inside with the doubled one, and each shape has its own graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage

Outputs = tuple[Tensor | None, ...]
Function = Callable[[], Outputs]
Recorder = Callable[[Function], tuple[Callable[[], object], Outputs]]


class Recording(NamedTuple):
    """replay() runs the recorded work on what `inputs` hold and leaves the answer in `outputs`, the same each time."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    outputs: Outputs


def record(function: Function) -> tuple[Callable[[], object], Outputs]:
    """`function` as a CUDA graph on the current device: (what replays it, its outputs).

    It runs three times on a side stream before, so that kernels are chosen, tables copied and workspaces made.
    """
    device = torch.cuda.current_device()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    # Autocast's cache of cast weights would be freed under the graph; within the graph each weight is cast again.
    with torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,
    ):
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = function()
    return graph.replay, outputs


class CudaGraphDenoiser:
    """A denoiser whose every call replays a graph recorded at the first call of that shape.

    Inputs are copied into the graph's own and answers out of it, so the result is the denoiser's, bit for bit. Weights
    may change between calls as long as they stay where they are; autocast and training mode must stay as they were.

    Args:
        denoise: a model (or any denoiser without random draws and without reading values back) on one CUDA device.
        recorder: replaces CUDA graphs, in tests.

    Errors: ValueError for inputs that are not on a CUDA device.
    """

    def __init__(self, denoise: Denoiser, recorder: Recorder = record):
        self.denoise = denoise
        self.recorder = recorder
        self.recordings: dict[tuple[object, ...], Recording] = {}

    @torch.no_grad()
    def __call__(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """The denoiser's answer."""
        if self.recorder is record and z.device.type != "cuda":
            raise ValueError(
                f"graphs need a CUDA device; the image is on {z.device}. Call the model itself there"
            )
        given = {
            "z": z,
            "logsnr": logsnr,
            "label": cond.label,
            "text": cond.text,
            "text_mask": cond.text_mask,
        }
        present = {name: t for name, t in given.items() if t is not None}
        key = tuple((name, t.shape, t.dtype) for name, t in present.items())
        if key not in self.recordings:
            self.recordings[key] = self.recorded(present, z.device)
        recording = self.recordings[key]
        for own, t in zip(recording.inputs, present.values(), strict=True):
            own.copy_(t, non_blocking=True)  # levels may come from the CPU
        recording.replay()
        x, eps, var = (None if t is None else t.clone() for t in recording.outputs)
        assert x is not None
        assert eps is not None
        return Denoised(x, eps, var)

    def recorded(self, present: dict[str, Tensor], device: torch.device) -> Recording:
        """The denoiser on inputs of these shapes, recorded."""
        own = {name: t.detach().to(device, copy=True) for name, t in present.items()}
        z, logsnr = own["z"], own["logsnr"]
        cond = Cond(**{name: t for name, t in own.items() if name not in ("z", "logsnr")})

        def function() -> Outputs:
            return tuple(self.denoise(z, logsnr, cond))

        replay, outputs = self.recorder(function)
        return Recording(list(own.values()), replay, outputs)
