"""Philox4x32-10, a counter-based generator, by integer operations of torch on any device.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011. Each block of four 32-bit words is a bijection of a 128-bit counter under a 64-bit key.

The integers are equal on every device. So are the uniform numbers, made of them by exact
operations. Normal numbers are computed in float64 and rounded once to float32: devices whose
logarithm, cosine and sine differ in the last bit of float64 give another float32 for about one
number in 10^8, by one unit in the last place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

# Multipliers and Weyl constants of Random123's philox.h: PHILOX_M4x32_0, _1; PHILOX_W32_0, _1.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
WORD = 0xFFFFFFFF

# Blocks at a time: about ten int64 tensors of this length are alive, 2.5 MiB of cache on the CPU
# and 80 MiB on a GPU, where few large kernels are faster.
CPU_BLOCKS = 1 << 15
GPU_BLOCKS = 1 << 20

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Return the four words of each counter.

    Args:
        counter: c0 ... c3, int64 tensors of 0 ... 2^32 - 1, whose shapes broadcast.
        key: k0 and k1, 0 ... 2^32 - 1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # One round: c0, c1, c2, c3 = hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)
        # (philox.h, _philox4x32round). Products wrap around at 2^64 and keep every bit; c1 and c3
        # carry the high halves along, which the next round masks.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0 = ((p1 >> 32) ^ (c1 ^ k0)) & WORD
        c2 = ((p0 >> 32) ^ (c3 ^ k1)) & WORD
        c1, c3 = p1, p0
        # The key schedule: a Weyl sequence (philox.h, _philox4x32bumpkey).
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def hash_key(purpose: int, seed: int, draw: int) -> tuple[int, int]:
    """Return a key of two words, hashed from three integers in [0, 2^63)."""
    # Two words each: a sequence of integers of any length would hash alike in other divisions.
    entropy = [purpose, *(word for n in (seed, draw) for word in (n & WORD, n >> 32))]
    k0, k1 = np.random.SeedSequence(entropy).generate_state(2, np.uint32).tolist()
    return k0, k1


def blocks(key: tuple[int, int], indices: Int64[Tensor, " n"], first: int, count: int) -> Words:
    """Return words of the blocks first ... first + count - 1 of each index, four of (n, count).

    The counter's low half is the number of the block, its high half the index. So no block of a key
    is ever used twice.
    """
    block = torch.arange(first, first + count, device=indices.device)[None]
    counter = (block & WORD, block >> 32, indices[:, None] & WORD, indices[:, None] >> 32)
    return philox4x32(counter, key)


def normal_of_words(words: Words) -> Float32[Tensor, "n m 4"]:
    """Return four standard normal numbers of each block by Box and Muller's transform.

    G. E. P. Box, M. E. Muller (1958), eq. 1: sqrt(-2 ln u) cos(2 pi v), sqrt(-2 ln u) sin(2 pi v).
    The largest is 6.8.
    """
    n, m = words[0].shape
    out = torch.empty(n, m, 4, device=words[0].device)
    for pair in (0, 2):
        # u is in (0, 1), so its logarithm is finite and negative.
        u = words[pair].to(torch.float64).add_(0.5).mul_(2.0**-32)
        radius = u.log_().mul_(-2).sqrt_()
        angle = words[pair + 1].to(torch.float64).mul_(2 * math.pi * 2.0**-32)
        out[..., pair] = angle.cos().mul_(radius)
        out[..., pair + 1] = angle.sin_().mul_(radius)
    return out


def normal_blocks(
    key: tuple[int, int], indices: Int64[Tensor, " n"], num_blocks: int
) -> Float32[Tensor, "n m 4"]:
    """Return the normal numbers of the first blocks of each index."""
    return normal_of_words(blocks(key, indices, 0, num_blocks))


@functools.cache
def compile_normal_blocks(backend: str = "inductor") -> Callable[..., Tensor]:
    """Return `normal_blocks` compiled, once for each key and shape.

    Beyond `torch._dynamo.config.recompile_limit` of them it runs uncompiled, as blocks do.
    """
    return torch.compile(normal_blocks, backend=backend, dynamic=False)


def normal(
    key: tuple[int, int],
    indices: list[int],
    count: int,
    device: torch.device,
    compiled: bool = False,
) -> Tensor:
    """Return `count` standard normal numbers for each index, (len(indices), count) float32.

    Number i of an index is a function of (key, index, i): neither the other indices nor `count` nor
    the number of threads matters. Memory beyond the result is bounded.

    compiled: in a kernel or two. The 136 operations of a part write 530 bytes for each number of
    4 bytes: for 64 images of 3 x 512 x 512, 1,768 kernels that move 27 GB.
    """
    rows = torch.tensor(indices, dtype=torch.int64, device=device)
    num_blocks = -(-count // 4)
    if compiled:
        return compile_normal_blocks()(key, rows, num_blocks).flatten(1)[:, :count]
    out = torch.empty(len(indices), count, device=device)
    most = GPU_BLOCKS if device.type == "cuda" else CPU_BLOCKS
    rows_at_once = max(1, most // max(1, num_blocks))
    for top in range(0, len(indices), rows_at_once):
        part = rows[top : top + rows_at_once]
        for first in range(0, num_blocks, most):
            words = blocks(key, part, first, min(most, num_blocks - first))
            drawn = normal_of_words(words).flatten(1)[:, : count - 4 * first]
            out[top : top + len(part), 4 * first : 4 * first + drawn.shape[1]] = drawn
    return out


def uniform(key: tuple[int, int], indices: list[int]) -> Float64[Tensor, " n"]:
    """Return a uniform number in (0, 1) for each index, float64 on the CPU.

    They are few: on a GPU, the hundred operations of a block would only be launches.
    """
    w0, w1, *_ = blocks(key, torch.tensor(indices, dtype=torch.int64), 0, 1)
    # 52 bits and half a step, which float64 holds exactly: neither 0 nor 1 can come out.
    bits = ((w0 >> 6) << 26) + (w1 >> 6)
    return (bits[:, 0].to(torch.float64) + 0.5) * 2.0**-52
