"""Copies to a GPU, and what else prepares a batch there, beside the training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class HasTensors(Protocol):
    """What lies on a device."""

    def tensors(self) -> Iterable[Tensor]:
        """Return every tensor."""
        ...


T = TypeVar("T", bound=HasTensors)


def send_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device; to a GPU from pinned memory, which is copied without waiting."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class SideStream:
    """A stream of a GPU on which batches are made while the default stream trains.

    On other devices work is done where it is called, and nothing waits.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self.device, self.cuda = device, cuda
        self.stream = cuda.Stream(device) if device.type == "cuda" else None

    def make(self, work: Callable[[], T]) -> tuple[T, Any]:
        """Return work() with its kernels on this stream, and the event after them; any thread."""
        if self.stream is None:
            return work(), None
        with self.cuda.stream(self.stream):
            made = work()
            return made, self.stream.record_event()

    def hand_over(self, made: T, done: Any) -> T:
        """Let the caller's stream wait for what `make` returned, and own its memory from now on.

        The host does not wait. Without the second, the allocator could give the memory to a later
        batch while the step still reads it.
        """
        if self.stream is not None:
            current = self.cuda.current_stream(self.device)
            current.wait_event(done)
            for tensor in made.tensors():
                tensor.record_stream(current)
        return made
