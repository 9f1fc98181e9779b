"""Every random number of mezzotint is a function of what it is for, never of when it was drawn.

A draw is keyed by (seed, index): `index` is an image's number in the run or the sample's own seed. The generator is
numpy's counter-based Philox with the 128-bit key (seed, purpose/index), so that two keys never share a stream, as two
32-bit Mersenne seeds may.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# One word per purpose, so that the noise of image 7 and the order of epoch 7 are unrelated.
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
    """The generator of draw number `draw` for (purpose, seed, index); all three integers in [0, 2^63)."""
    if min(seed, index, draw) < 0:
        raise ValueError(f"seed {seed}, index {index} and draw {draw} must not be negative")
    key = np.random.SeedSequence((PURPOSES.index(purpose), seed, index, draw)).generate_state(
        2, np.uint64
    )
    return np.random.Generator(np.random.Philox(key=key))


def normal(
    purpose: str, seed: int, indices: list[int], shape: tuple[int, ...], draw: int = 0
) -> Tensor:
    """Standard normal, (len(indices), *shape) float32; row i depends on (purpose, seed, indices[i], draw) alone."""
    rows = [
        philox(purpose, seed, i, draw).standard_normal(shape, dtype=np.float32) for i in indices
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, *shape)


def uniform(purpose: str, seed: int, indices: list[int], draw: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), (len(indices),) float64; row i depends on (purpose, seed, indices[i], draw) alone."""
    # random() is in [0, 1) on a grid of 2^-53; half a grid step keeps 0 out, where a log-SNR may be infinite.
    return torch.tensor(
        [philox(purpose, seed, i, draw).random() + 2.0**-54 for i in indices], dtype=torch.float64
    )
