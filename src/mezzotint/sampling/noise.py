"""The noise of stochastic samplers, drawn on a GPU's behalf while it computes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mezzotint.core import rng

DRAWS_AHEAD = 2


class NoiseAhead:
    """A sampler's noise: draw i is the same function of the seeds and i, drawn ahead or not.

    On a device other than the CPU a thread draws the next ones, into pinned memory for CUDA, so
    that the device neither waits for numpy nor for a copy. Use it as a context.

    Args:
        seeds: of the images. shape: of one of them. device: where the noise is needed.
        draws_ahead: 0 draws when asked; None does so on the CPU, where the network uses the cores.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        device: torch.device,
        draws_ahead: int | None = None,
    ):
        self.seeds, self.shape, self.device = list(seeds), shape, device
        if draws_ahead is None:
            draws_ahead = 0 if device.type in ("cpu", "meta") else DRAWS_AHEAD
        self.draws_ahead = draws_ahead
        self.pending: dict[int, Future[Tensor]] = {}
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> NoiseAhead:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop drawing; what was drawn for no use is dropped."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def __call__(self, i: int, z: Tensor) -> Tensor:
        """Return draw i, standard normal, of the shape, dtype and device of z (b, c, h, w)."""
        if self.draws_ahead == 0:
            return self._draw(i).to(z)
        # The thread starts with the first draw: most samplers draw nothing.
        pool = self.pool = self.pool or ThreadPoolExecutor(1, "sampler-noise")
        # A sampler may skip draws, but never goes back.
        self.pending = {k: drawn for k, drawn in self.pending.items() if k >= i}
        for k in range(i, i + 1 + self.draws_ahead):
            if k not in self.pending:
                self.pending[k] = pool.submit(self._draw, k)
        return self.pending.pop(i).result().to(z.device, z.dtype, non_blocking=True)

    def _draw(self, i: int) -> Tensor:
        drawn = rng.normal("sampler", 0, self.seeds, self.shape, draw=i)
        return drawn.pin_memory() if self.device.type == "cuda" else drawn
