"""Depthwise convolution of channels-last images for NVIDIA GPUs, and its weight gradient, as two Triton kernels.

The arithmetic, k² multiply-adds per element in float32, takes about as long as moving the bytes; what makes such
kernels slow is what lies between: an input loaded k² times, with an address, a mask and a conversion per load. So a
thread owns two channels of a few adjacent columns, walks down the rows, and keeps in registers what it will need again:
the k² weights and the unfinished sums of the next k - 1 output rows; for the weight gradient the k² sums and the last
k rows of the output's gradient. At k = 7 each loaded value takes part in up to 28 multiply-adds.

Import this only where triton is installed.
"""

from __future__ import annotations

from typing import (
    no_type_check,  # a kernel is written in Triton's language: its arguments are no Python values
)

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

COLUMNS = (
    4  # adjacent output columns of one thread; with more, k = 7 does not fit into 255 registers
)
PATCHES = (
    4  # such groups of columns side by side in one program: what they share comes from the L1 cache
)
CHANNELS = 32  # of one program: two per thread; divides the published widths but 240
THREADS = {"num_warps": 2, "enable_fp_fusion": True}  # 64: each has two channels of one patch
FEW = 256  # programs: below, the rows of an image are shared among several, though they add up some rows twice
MANY = (
    1024  # programs of a weight gradient, about: several for each multiprocessor, few partial sums
)


@triton.jit
@no_type_check
def _place(
    groups, C: tl.constexpr, COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Which part of the work is this program's: (the rest of its index, channels, first columns), both as tiles."""
    program = tl.program_id(0)
    blocks = tl.cdiv(C, CHANNELS)  # neighbours in channels run together: they share pages of memory
    everywhere = tl.zeros((PATCHES, CHANNELS), tl.int32)
    channel = everywhere + program % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    patch = program // blocks % groups * PATCHES + tl.arange(0, PATCHES)[:, None]
    return program // blocks // groups, channel, everywhere + patch * COLUMNS


@triton.jit
@no_type_check
def _load(row, column, channel, live, w, C: tl.constexpr, COUNT: tl.constexpr):
    """COUNT adjacent columns, as stored, of the image row that begins at the pointer `row`; zero outside the image."""
    values = ()
    for i in tl.static_range(COUNT):
        inside = live & (column + i >= 0) & (column + i < w)
        values += (tl.load(row + (column * C + channel) + i * C, mask=inside, other=0.0),)
    return values


@triton.jit
@no_type_check
def _store(
    row, values, column, channel, live, w, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    """values[FIRST], ..., values[FIRST + COUNT - 1] to adjacent columns of the image row that begins at `row`."""
    for i in tl.static_range(COUNT):
        tl.store(
            row + (column * C + channel) + i * C, values[FIRST + i], mask=live & (column + i < w)
        )


@triton.jit(do_not_specialize=["h", "w", "strip", "groups"])
@no_type_check
def _convolve(
    x, taps, bias, out, h, w, strip, groups,
    C: tl.constexpr, K: tl.constexpr, RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`strip` rows of the output of one image."""
    PAD: tl.constexpr = K // 2
    WIDE: tl.constexpr = COLUMNS + K - 1
    rest, channel, column = _place(groups, C, COLUMNS, PATCHES, CHANNELS)
    live = channel < C
    strips = tl.cdiv(h, strip)
    image = (rest // strips).to(tl.int64) * h
    top = rest % strips * strip
    bottom = tl.minimum(top + strip, h)

    kernel = ()
    for t in tl.static_range(K * K):
        tap = tl.load(taps + t * C + channel, mask=live, other=0.0).to(tl.float32)
        if RESIDUAL and t == K * K // 2:
            tap += 1.0  # x + convolution(x): the tap at the centre brings the residual along
        kernel += (tap,)
    start = tl.zeros((PATCHES, CHANNELS), tl.float32)
    start += tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)

    # sums[j COLUMNS + i]: column i of the output row j below (row - PAD), over the input rows above `row`
    sums = ()
    for _ in tl.static_range((K - 1) * COLUMNS):
        sums += (start,)
    first = tl.maximum(top - PAD, 0)
    last = tl.minimum(bottom + PAD, h)
    coming = _load(x + (image + first) * w * C, column - PAD, channel, live, w, C, WIDE)
    for row in range(first, last):
        values = ()
        for i in tl.static_range(WIDE):
            values += (coming[i].to(tl.float32),)
        # The next row is on its way while this one is added; after the last, any row does.
        following = (image + tl.minimum(row + 1, h - 1)) * w * C
        coming = _load(x + following, column - PAD, channel, live, w, C, WIDE)
        added = ()
        for j in tl.static_range(K):
            for i in tl.static_range(COLUMNS):
                total = sums[j * COLUMNS + i] if j < K - 1 else start
                for kx in tl.static_range(K):
                    total = tl.fma(values[i + kx], kernel[(K - 1 - j) * K + kx], total)
                added += (total,)
        if row - PAD >= top:
            _store(
                out + (image + row - PAD) * w * C, added, column, channel, live, w, C, 0, COLUMNS
            )
        sums = ()
        for n in tl.static_range((K - 1) * COLUMNS):
            sums += (added[COLUMNS + n],)
    for j in tl.static_range(PAD):  # the last rows of an image have only zeros below
        row = last - PAD + j
        if (row >= top) & (row < bottom):
            _store(
                out + (image + row) * w * C, sums, column, channel, live, w, C, j * COLUMNS, COLUMNS
            )


@triton.jit(do_not_specialize=["b", "h", "w", "images", "groups"])
@no_type_check
def _correlate(
    x, grad, partial, b, h, w, images, groups,
    C: tl.constexpr, K: tl.constexpr,
    COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial (programs, K K + 1, c): the weight's gradient and the bias's, over these columns of `images` images."""
    PAD: tl.constexpr = K // 2
    WIDE: tl.constexpr = COLUMNS + K - 1
    chunk, channel, column = _place(groups, C, COLUMNS, PATCHES, CHANNELS)
    live = channel < C

    zero = tl.zeros((PATCHES, CHANNELS), tl.float32)
    sums = ()
    for _ in tl.static_range(K * K + 1):
        sums += (zero,)
    begin = chunk.to(tl.int64) * images
    for image in range(begin, tl.minimum(begin + images, b)):
        above = image * h
        # window[j COLUMNS + i]: column i of row (row - PAD + j) of the output's gradient, zero outside the image
        window = ()
        for _ in tl.static_range(PAD * COLUMNS):
            window += (zero,)
        for j in tl.static_range(PAD):
            below = _load(
                grad + (above + j) * w * C, column, channel, live, tl.where(j < h, w, 0), C, COLUMNS
            )
            for i in tl.static_range(COLUMNS):
                window += (below[i].to(tl.float32),)
        coming = _load(x + above * w * C, column - PAD, channel, live, w, C, WIDE)
        below = _load(
            grad + (above + PAD) * w * C, column, channel, live, tl.where(h > PAD, w, 0), C, COLUMNS
        )
        for row in tl.range(0, h, loop_unroll_factor=2):  # half the moves of the window's registers
            values = ()
            for i in tl.static_range(WIDE):
                values += (coming[i].to(tl.float32),)
            for i in tl.static_range(COLUMNS):
                window += (below[i].to(tl.float32),)
            following = x + (above + tl.minimum(row + 1, h - 1)) * w * C
            coming = _load(following, column - PAD, channel, live, w, C, WIDE)
            ahead = row + 1 + PAD
            below = _load(
                grad + (above + ahead) * w * C,
                column,
                channel,
                live,
                tl.where(ahead < h, w, 0),
                C,
                COLUMNS,
            )
            added = ()
            for ky in tl.static_range(K):
                for kx in tl.static_range(K):
                    total = sums[ky * K + kx]
                    for i in tl.static_range(COLUMNS):
                        total = tl.fma(values[i + kx], window[(K - 1 - ky) * COLUMNS + i], total)
                    added += (total,)
            total = sums[K * K]
            for i in tl.static_range(COLUMNS):
                total += window[PAD * COLUMNS + i]
            added += (total,)
            sums = added
            kept = ()
            for n in tl.static_range((K - 1) * COLUMNS):
                kept += (window[COLUMNS + n],)
            window = kept
    blocks = tl.cdiv(C, CHANNELS)
    mine = partial + tl.program_id(0) // blocks * ((K * K + 1) * C)
    channels = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    for t in tl.static_range(K * K + 1):
        tl.store(mine + t * C + channels, tl.sum(sums[t], 0), mask=channels < C)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """(x if residual else 0) + the depthwise convolution of x, zeros around, + bias; added up in float32.

    Args:
        x: (b, h, w, c), contiguous; float32, bfloat16 or float16.
        weight: (c, 1, k, k), k odd; float32 or of x's type.
        bias: (c,) or None.

    Returns:
        (b, h, w, c) of x's type.
    """
    assert x.is_contiguous()
    b, h, w, c = x.shape
    k = weight.shape[-1]
    out = torch.empty_like(x)
    bias = (
        x.new_zeros(c, dtype=weight.dtype) if bias is None else bias
    )  # rather than a second compilation
    taps = (
        weight.reshape(c, k * k).t().contiguous()
    )  # neighbouring threads read neighbouring channels
    groups = triton.cdiv(w, COLUMNS * PATCHES)
    tall = triton.cdiv(c, CHANNELS) * groups * b
    strip = h
    while (
        strip >= 2 * k and tall * triton.cdiv(h, strip) < FEW
    ):  # each strip adds up to k - 1 rows of its neighbours
        strip = triton.cdiv(strip, 2)
    with torch.cuda.device_of(x):
        _convolve[(tall * triton.cdiv(h, strip),)](  # pyright: ignore[reportIndexIssue]
            x,
            taps,
            bias,
            out,
            h,
            w,
            strip,
            groups,
            c,
            k,
            residual,
            COLUMNS,
            PATCHES,
            CHANNELS,
            **THREADS,
        )
    return out


def weight_gradient(x: Tensor, grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The gradients of `forward`'s weight and bias; added up in float32, in an order that the shapes alone decide.

    Args:
        x: (b, h, w, c), contiguous: the input.
        grad: the same, of the same type: the gradient of the output.
        k: side of the kernel, odd.

    Returns:
        (c, 1, k, k) and (c,), float32.
    """
    assert x.is_contiguous()
    assert grad.is_contiguous()
    b, h, w, c = x.shape
    groups, blocks = triton.cdiv(w, COLUMNS * PATCHES), triton.cdiv(c, CHANNELS)
    images = triton.cdiv(b * groups * blocks, MANY)
    parts = triton.cdiv(b, images) * groups
    partial = torch.empty(parts, k * k + 1, c, device=x.device)
    with torch.cuda.device_of(x):
        _correlate[(parts * blocks,)](  # pyright: ignore[reportIndexIssue]
            x, grad, partial, b, h, w, images, groups, c, k, COLUMNS, PATCHES, CHANNELS, **THREADS
        )
    total = partial.sum(0)
    # copies of their own, aligned as compiled code expects
    return total[:-1].t().clone(memory_format=torch.contiguous_format).view(c, 1, k, k), total[
        -1
    ].clone()
