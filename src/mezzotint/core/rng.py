"""Random numbers as functions of their purpose, seed and index, independent of when they are drawn.

`index` is an image's number in the run, or a sample's own seed. The generator is numpy's counter-
based Philox with a 128-bit key hashed from (purpose, seed, index, draw). Two such keys
practically never share a stream; two 32-bit seeds of a Mersenne Twister may.

Training draws from one of two streams, see `Draws`. All else draws from the functions here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mezzotint.core import philox as counter_based

CPU = torch.device("cpu")
Stream = Literal["philox4x64", "philox4x32"]

# One key per purpose, so that the noise of image 7 and the order of epoch 7 are unrelated. The
# position in this tuple is part of the key: append, never sort or insert.
PURPOSES = (
    "noise",
    "time",
    "condition",
    "order",
    "augment",
    "latent",
    "sample",
    "sampler",
    "label",
    "resample",
)


def philox(purpose: str, seed: int, index: int, draw: int = 0) -> np.random.Generator:
    """Return the generator of (purpose, seed, index, draw); the integers are in [0, 2^63)."""
    if min(seed, index, draw) < 0:
        raise ValueError(f"seed {seed}, index {index} and draw {draw} must not be negative")
    key = np.random.SeedSequence((PURPOSES.index(purpose), seed, index, draw)).generate_state(
        2, np.uint64
    )
    return np.random.Generator(np.random.Philox(key=key))


def normal(
    purpose: str, seed: int, indices: list[int], shape: tuple[int, ...], draw: int = 0
) -> Tensor:
    """Draw standard normal numbers, (len(indices), *shape) float32.

    Row i is a function of (purpose, seed, indices[i], draw).
    """
    rows = [
        philox(purpose, seed, i, draw).standard_normal(shape, dtype=np.float32) for i in indices
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def uniform(purpose: str, seed: int, indices: list[int], draw: int = 0) -> Tensor:
    """Draw uniform numbers in (0, 1), (len(indices),) float64.

    Number i is a function of (purpose, seed, indices[i], draw).
    """
    # random() is in [0, 1) on a grid of 2^-53. Half a step excludes 0, where a log-SNR may be
    # infinite; added to the last number of the grid it would round to 1.
    numbers = [philox(purpose, seed, i, draw).random() + 2.0**-54 for i in indices]
    return torch.tensor(numbers, dtype=torch.float64).clamp_(max=1 - 2.0**-53)


@dataclass(frozen=True)
class Draws:
    """The random numbers of a run, each a function of (stream, purpose, seed, index, draw).

    stream: "philox4x64" is numpy's generator with the normal numbers of its ziggurat, on the CPU;
        "philox4x32" is `mezzotint.core.philox` with Box and Muller's, on the run's device.
    device: of the network.
    compiled: philox4x32's normal numbers are drawn by a compiled function.
    """

    seed: int
    stream: Stream = "philox4x64"
    device: torch.device = CPU
    compiled: bool = False

    def normal(
        self, purpose: str, indices: list[int], shape: tuple[int, ...], draw: int = 0
    ) -> Tensor:
        """Draw standard normal numbers, (len(indices), *shape) float32; see the module's `normal`.

        They lie on `device` for philox4x32, else on the CPU.
        """
        if self.stream == "philox4x64":
            return normal(purpose, self.seed, indices, shape, draw)
        # Other devices than these may lack float64.
        device = self.device if self.device.type == "cuda" else CPU
        key = self._key(purpose, indices, draw)
        drawn = counter_based.normal(key, indices, int(np.prod(shape)), device, self.compiled)
        return drawn.reshape(-1, *shape)

    def uniform(self, purpose: str, indices: list[int], draw: int = 0) -> Tensor:
        """Draw uniform numbers in (0, 1), (len(indices),) float64 on the CPU."""
        if self.stream == "philox4x64":
            return uniform(purpose, self.seed, indices, draw)
        return counter_based.uniform(self._key(purpose, indices, draw), indices)

    def _key(self, purpose: str, indices: list[int], draw: int) -> tuple[int, int]:
        if min(self.seed, draw, *indices, 0) < 0:
            raise ValueError(f"seed {self.seed}, draw {draw} and indices must not be negative")
        return counter_based.hash_key(PURPOSES.index(purpose), self.seed, draw)
