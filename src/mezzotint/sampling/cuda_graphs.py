"""CUDA graphs: record a denoiser once per shape and replay it without launching kernels one by one.

Used with `SamplingSettings(cuda_graphs=True)`. Guidance that acts in an interval has two shapes,
the plain batch outside of it and the doubled batch inside. Each gets its own graph.
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
    """A recorded call: `replay()` reads `inputs` and writes `outputs`, always the same tensors."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    outputs: Outputs


def record(function: Function) -> tuple[Callable[[], object], Outputs]:
    """Record `function` as a CUDA graph on the current device; return its replay and its outputs.

    `function` first runs three times on a side stream, so that kernels are chosen, tables copied
    and workspaces allocated.
    """
    device = torch.cuda.current_device()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    # Without the cache of cast weights, which would be freed while the graph still reads it.
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
    """A denoiser that records a graph at its first call of a shape and replays it from then on.

    Inputs are copied into the graph's tensors and outputs out of them, so the result equals the
    denoiser's bit for bit. Weights may change between calls but must not move. Autocast and
    training mode must not change.

    Args:
        denoise: a model on a CUDA device, or any denoiser there that draws nothing at random and
            reads no value back to the host.
        recorder: replaces CUDA graphs, in tests.

    Errors: ValueError for inputs that are not on a CUDA device.
    """

    def __init__(self, denoise: Denoiser, recorder: Recorder = record):
        self.denoise = denoise
        self.recorder = recorder
        self.recordings: dict[tuple[object, ...], Recording] = {}

    @torch.no_grad()
    def __call__(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """Return the denoiser's answer."""
        if self.recorder is record and z.device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a CUDA device and the image is on {z.device}; "
                "call the model itself there"
            )
        inputs = {
            "z": z,
            "logsnr": logsnr,
            "label": cond.label,
            "text": cond.text,
            "text_mask": cond.text_mask,
            "augment": cond.augment,
        }
        present = {name: t for name, t in inputs.items() if t is not None}
        key = tuple((name, t.shape, t.dtype) for name, t in present.items())
        if key not in self.recordings:
            self.recordings[key] = self._record(present, z.device)
        recording = self.recordings[key]
        for own, t in zip(recording.inputs, present.values(), strict=True):
            own.copy_(t, non_blocking=True)  # log-SNRs may come from the CPU
        recording.replay()
        x, eps, var = (None if t is None else t.clone() for t in recording.outputs)
        assert x is not None
        assert eps is not None
        return Denoised(x, eps, var)

    def _record(self, present: dict[str, Tensor], device: torch.device) -> Recording:
        own = {name: t.detach().to(device, copy=True) for name, t in present.items()}
        z, logsnr = own["z"], own["logsnr"]
        cond = Cond(**{name: t for name, t in own.items() if name not in ("z", "logsnr")})

        def function() -> Outputs:
            return tuple(self.denoise(z, logsnr, cond))

        replay, outputs = self.recorder(function)
        return Recording(list(own.values()), replay, outputs)
