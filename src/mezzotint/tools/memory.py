"""What a training step holds in memory, counted without holding it.

The step is played through on fake tensors, which have a shape, a dtype and a device but no storage: the objective's
forward pass and its backward pass, by the network's own code, under autocast and checkpointing as in training. Every
storage counts from the operation that makes it until its last reference is gone, as in an allocator without waste. What
kernels take for themselves while they run is not seen.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

# Both are what torch's own counters and compiler stand on; neither has a public name yet.
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mezzotint.backbones import needs_label
from mezzotint.backbones.checkpointing import Checkpointing
from mezzotint.process.denoiser import Cond, Model
from mezzotint.process.objectives import Objective


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations within the block made and that are still referenced: `now`, and `peak`.

    exempt: tensors whose storages never count, such as the weights.
    """

    def __init__(self, exempt: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.exempt = [
            t.untyped_storage() for t in exempt
        ]  # held, so that no address is used twice
        self.counted = {storage._cdata: 0 for storage in self.exempt}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        """Add a storage that is seen for the first time, until it dies."""
        key = storage._cdata
        if key not in self.counted:
            self.counted[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key).atexit = False

    def forget(self, key: int) -> None:
        """A storage died."""
        self.now -= self.counted.pop(key)


class StepMemoryEstimator:
    """Plays steps of one network and objective, by batch.

    Args:
        model: on the meta device. objective: as trained.
        weights: dtype of the weights in the step: float32, or what FSDP gathers them in.
        bf16: compute under autocast. checkpointing: of each block, see `checkpointing.run`.
        gradients_leave: a gradient goes as soon as it is whole, into DDP's bucket, FSDP's shard or an earlier
            microbatch's sum, which count elsewhere; otherwise it stays until the end, as in one process.
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
        if needs_label(
            model.info.config
        ):  # tensors have no values here, so a row that is not there can be looked up
            setattr(self.model.backbone, "config", replace(model.info.config, null_label=True))  # noqa: B010
        with self.mode:
            self.model._apply(
                lambda t: torch.empty(t.shape, dtype=weights if t.is_floating_point() else t.dtype)
            )
        setattr(self.model.backbone, "checkpointing", checkpointing)  # noqa: B010
        if gradients_leave:
            for p in self.model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        self.peaks: dict[int, int] = {}

    def peak(self, batch: int) -> int:
        """Most bytes at any moment of a step on `batch` images, batch included, weights not."""
        if batch not in self.peaks:
            self.peaks[batch] = self._play(batch)
        return self.peaks[batch]

    def _play(self, batch: int) -> int:
        config = self.model.info.config
        live = LiveBytes([*self.model.parameters(), *self.model.buffers()])
        with self.mode, live:
            x = torch.empty(batch, config.channels, config.size, config.size)
            eps, logsnr = torch.empty_like(x), torch.zeros(batch)
            # Without a label the network takes the null label: the same tensors, and no value to be checked.
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.objective(self.model, x, eps, logsnr, Cond())
            loss.sum().backward()
            for p in self.model.parameters():
                p.grad = None
        return live.peak

    def largest(self, room: int, batch: int) -> int:
        """About the most images whose step stays within `room` bytes; 0 if not even one does.

        batch: one that is played anyway. The peak is the greatest of several moments, each linear in the batch: a
        second batch near the answer, by proportion, and the line through both give it to about a hundredth.
        """
        near = max(1, batch * room // self.peak(batch))
        near += near == batch
        slope = (self.peak(near) - self.peak(batch)) / (near - batch)
        most = near + int((room - self.peak(near)) // slope)
        return most if most > 1 or (most == 1 and self.peak(1) <= room) else 0
