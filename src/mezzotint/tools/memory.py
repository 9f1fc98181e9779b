"""Memory of a training step, counted without allocating it.

The step runs on fake tensors, which have a shape, a dtype and a device but no storage: the
objective's forward and backward pass through the network's own code, under autocast and
checkpointing as in training. Every storage counts from the operation that makes it until its last
reference is gone, as in an allocator without waste. Workspaces inside kernels are not counted.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

# torch's own counters and compiler are built on both; neither has a public name yet.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mezzotint.backbones import dummy_condition, get_backbone, native_size, needs_label
from mezzotint.backbones.checkpointing import Checkpointing
from mezzotint.data.text_encoder import MAX_TOKENS
from mezzotint.process.denoiser import Model
from mezzotint.process.objectives import Objective


class LiveBytes(TorchDispatchMode):
    """Count the bytes of storages made within the block that are still referenced.

    Args:
        exempt: tensors whose storages never count, such as the weights.

    Attributes:
        now, peak: bytes at present, and the most so far.
    """

    def __init__(self, exempt: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        # Held, so that no address is used twice.
        self.exempt = [t.untyped_storage() for t in exempt]
        self.counted = {storage._cdata: 0 for storage in self.exempt}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage when it is first seen, until it is freed."""
        key = storage._cdata
        if key not in self.counted:
            self.counted[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self.now -= self.counted.pop(key)


class StepMemoryEstimator:
    """Estimates the peak memory of a training step of one network and objective, by batch.

    Args:
        model: on the meta device.
        objective: as trained.
        weights: dtype of the weights in the step: float32, or what FSDP gathers them in.
        bf16: compute under autocast.
        checkpointing: of each block, see `run_block`.
        gradients_leave: free each gradient as soon as it is complete, as when it goes into DDP's
            bucket, FSDP's shard or the sum of earlier microbatches, which count elsewhere.
            Otherwise it stays until the end, as in one process.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        *,
        weights: torch.dtype,
        bf16: bool,
        checkpointing: Checkpointing,
        gradients_leave: bool,
    ):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)  # the schedules' tables are real
        self.objective, self.bf16 = objective, bf16
        self.model = copy.deepcopy(model).train()
        backbone = get_backbone(self.model)
        if needs_label(model.info.config):
            # The step below passes no label. Fake tensors have no values, so the network may look
            # up the null label although its embedding has no such row.
            backbone.config = replace(model.info.config, null_label=True)
        with self.mode:
            self.model._apply(
                lambda t: torch.empty(t.shape, dtype=weights if t.is_floating_point() else t.dtype)
            )
        backbone.checkpointing = checkpointing
        if gradients_leave:
            for p in self.model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_free_gradient)
        self.peaks: dict[int, int] = {}

    def peak(self, batch: int) -> int:
        """Return the peak bytes of a step on `batch` images, batch included, weights excluded."""
        if batch not in self.peaks:
            self.peaks[batch] = self._run_step(batch)
        return self.peaks[batch]

    def _run_step(self, batch: int) -> int:
        config = self.model.info.config
        backbone_config = get_backbone(self.model).config
        live = LiveBytes([*self.model.parameters(), *self.model.buffers()])
        with self.mode, live:
            x = torch.empty(batch, config.channels, *native_size(config))
            eps, logsnr = torch.empty_like(x), torch.zeros(batch)
            # Without a label the network takes the null label: equal tensors, no value to check.
            cond = dummy_condition(backbone_config, x, MAX_TOKENS)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.objective(self.model, x, eps, logsnr, cond)
            loss.sum().backward()
            for p in self.model.parameters():
                p.grad = None
        return live.peak

    def largest_batch(self, available: int, batch: int) -> int:
        """Return about the most images whose step fits `available` bytes; 0 if not even one does.

        Args:
            batch: a batch whose peak is needed anyway.

        The peak is the greatest of several moments, each linear in the batch. A second batch near
        the answer, found by proportion, and the line through both give it to about a hundredth.
        """
        near = max(1, batch * available // self.peak(batch))
        near += near == batch
        slope = (self.peak(near) - self.peak(batch)) / (near - batch)
        largest = near + int((available - self.peak(near)) // slope)
        return largest if largest > 1 or (largest == 1 and self.peak(1) <= available) else 0


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None
