"""CUDA graphs: record a denoiser once per shape and replay it without launching kernels one by one.

Used on CUDA unless `SamplingSettings(cuda_graphs=False)`. Guidance that acts in an interval has two
shapes, the plain batch outside of it and the doubled batch inside. Each gets its own graph. A graph
holds the network alone, so that every sampler can use it, stochastic ones included.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mezzotint.core.console import echo
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage

Outputs = tuple[Tensor | None, ...]
Function = Callable[[], Outputs]
Recorder = Callable[[Function], tuple[Callable[[], object], Outputs]]


class Recording(NamedTuple):
    """A recorded call: `replay()` reads `inputs` and writes `outputs`, always the same tensors."""

    inputs: list[Tensor]
    replay: Callable[[], object]
    outputs: Outputs


def record(function: Function, pool: Any = None) -> tuple[Callable[[], object], Outputs]:
    """Record `function` as a CUDA graph on the current device; return its replay and its outputs.

    `function` first runs three times on a side stream, so that kernels are chosen, tables copied
    and workspaces allocated.

    Args:
        pool: of `torch.cuda.graph_pool_handle()`, memory that several graphs share; None for own.
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
        # Meanwhile other threads may pin memory or wait for NCCL, which the default mode forbids.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function()
    return graph.replay, outputs


class CudaGraphDenoiser:
    """A denoiser that records a graph for a shape and replays it from then on.

    Inputs are copied into the graph's tensors and outputs out of them, so the result equals the
    denoiser's bit for bit. Weights may change between calls but must not move. Autocast and
    training mode must not change.

    Args:
        denoise: a model on a CUDA device, or any denoiser there that draws nothing at random and
            reads no value back to the host.
        recorder: replaces CUDA graphs, in tests.
        sizes: batch sizes that are recorded; None for all. Others call the denoiser itself.
        first_calls: of a shape that call the denoiser itself, so that a short run records nothing.
        required: raise where recording fails; otherwise say so and go on without graphs.

    Errors: ValueError for inputs that are not on a CUDA device.
    """

    def __init__(
        self,
        denoise: Denoiser,
        recorder: Recorder | None = None,
        sizes: Collection[int] | None = None,
        first_calls: int = 0,
        required: bool = True,
    ):
        self.denoise = denoise
        self.recorder = recorder
        self.sizes = sizes
        self.first_calls = first_calls
        self.required = required
        self.failed = False
        self.calls: Counter[tuple[object, ...]] = Counter()
        self.recordings: dict[tuple[object, ...], Recording] = {}
        self.pool: Any = None
        self.lock = threading.Lock()  # a recording has one set of inputs

    @torch.no_grad()
    def __call__(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """Return the denoiser's answer."""
        if self.recorder is None and z.device.type != "cuda":
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
        with self.lock:
            recording = self._recording(key, present)
            return self.denoise(z, logsnr, cond) if recording is None else run(recording, present)

    def _recording(self, key: tuple[object, ...], present: dict[str, Tensor]) -> Recording | None:
        """Return the recording for inputs of these shapes; None for a call without one."""
        if key in self.recordings:
            return self.recordings[key]
        self.calls[key] += 1
        unwanted = self.sizes is not None and len(present["z"]) not in self.sizes
        if self.failed or unwanted or self.calls[key] <= self.first_calls:
            return None
        try:
            self.recordings[key] = self._record(present, present["z"].device)
        except RuntimeError as error:  # out of memory, too
            if self.required:
                raise
            self.failed = True
            echo(
                f"sampling goes on without CUDA graphs, which failed: {str(error).splitlines()[0]}"
            )
            return None
        return self.recordings[key]

    def _record(self, present: dict[str, Tensor], device: torch.device) -> Recording:
        own = {name: t.detach().to(device, copy=True) for name, t in present.items()}
        z, logsnr = own["z"], own["logsnr"]
        cond = Cond(**{name: t for name, t in own.items() if name not in ("z", "logsnr")})

        def function() -> Outputs:
            return tuple(self.denoise(z, logsnr, cond))

        if self.recorder is not None:
            replay, outputs = self.recorder(function)
        else:
            with torch.cuda.device(device):
                # One graph runs at a time and its outputs are copied at once, so all share memory.
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                replay, outputs = record(function, self.pool)
        return Recording(list(own.values()), replay, outputs)


def run(recording: Recording, inputs: dict[str, Tensor]) -> Denoised:
    """Replay a recording on new inputs and return copies of its outputs."""
    for own, t in zip(recording.inputs, inputs.values(), strict=True):
        own.copy_(t, non_blocking=True)  # log-SNRs may come from the CPU
    recording.replay()
    x, eps, var = (None if t is None else t.clone() for t in recording.outputs)
    assert x is not None
    assert eps is not None
    return Denoised(x, eps, var)
