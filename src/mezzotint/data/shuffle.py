"""The data order: a function of (seed, epoch), so that a resumed run continues by counting.

Sample number k of a run, counted from 0 over the whole run, is entry k % n of the permutation of
epoch k // n. Workers, ranks and batch sizes do not enter.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mezzotint.core.rng import philox


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    permutation = philox("order", seed, epoch).permutation(n)
    permutation.flags.writeable = False
    return permutation


def shuffled_indices(seed: int, start: int, count: int, n: int) -> Int64[Tensor, " count"]:
    """Return the image indices, in 0...n-1, of the sample numbers start ... start + count - 1."""
    if n < 1 or start < 0 or count < 0:
        raise ValueError(
            f"n {n}, start {start}, count {count}: n must be positive, start and count not negative"
        )
    numbers = np.arange(start, start + count)
    indices = np.empty(count, dtype=np.int64)
    for epoch in np.unique(numbers // n):
        mask = numbers // n == epoch
        indices[mask] = _permutation(seed, int(epoch), n)[numbers[mask] % n]
    return torch.from_numpy(indices)
