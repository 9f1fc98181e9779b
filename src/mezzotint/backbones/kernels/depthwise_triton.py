"""Two Triton kernels: the depthwise convolution of channels-last images, and its weight gradient.

The k² multiply-adds per element take about as long as moving the bytes. Such kernels are slow
where they load each input k² times, with an address, a mask and a conversion per load. Here a
thread owns two channels of a few adjacent columns, walks down the rows, and keeps in registers
what it needs again: the k² weights and the unfinished sums of the next k - 1 output rows; for the
weight gradient the k² sums and the last k rows of the output's gradient. At k = 7 each loaded
value takes part in up to 28 multiply-adds.

Import this only where triton is installed.
"""

from __future__ import annotations

from typing import no_type_check  # kernel arguments are no Python values

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# Adjacent output columns of one thread; with more, k = 7 does not fit into 255 registers.
COLUMNS = 4
# Such groups of columns side by side in one program; what they share comes from the L1 cache.
PATCHES = 4
# Channels of one program, two per thread; divides all published widths but 240.
CHANNELS = 32
# 64 threads: each has two channels of one patch.
THREADS = {"num_warps": 2, "enable_fp_fusion": True}
# With fewer programs several share the rows of an image, although they add up some rows twice.
MIN_PROGRAMS = 256
# Programs of a weight gradient, about: several per multiprocessor, and few partial sums.
GRADIENT_PROGRAMS = 1024


@triton.jit
@no_type_check
def _place(
    groups, C: tl.constexpr, COLUMNS: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Return this program's work: the rest of its index, its channels, its first columns."""
    program = tl.program_id(0)
    # Programs of neighbouring channels run together: they share pages of memory.
    blocks = tl.cdiv(C, CHANNELS)
    everywhere = tl.zeros((PATCHES, CHANNELS), tl.int32)
    channel = everywhere + program % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    patch = program // blocks % groups * PATCHES + tl.arange(0, PATCHES)[:, None]
    return program // blocks // groups, channel, everywhere + patch * COLUMNS


@triton.jit
@no_type_check
def _load(row, column, channel, live, w, C: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT adjacent columns of the image row at the pointer `row`; zero outside the image."""
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
    """Store values[FIRST : FIRST + COUNT] to adjacent columns of the image row at `row`."""
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
    """Compute `strip` rows of the output of one image."""
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
            tap += 1.0  # the residual: x + convolution(x)
        kernel += (tap,)
    start = tl.zeros((PATCHES, CHANNELS), tl.float32)
    start += tl.load(bias + channel, mask=live, other=0.0).to(tl.float32)

    # sums[j COLUMNS + i]: column i of the output row j below (row - PAD), over the input rows above
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
        # Load the next row while this one is added; after the last, any row will do.
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
    # The last rows of an image have only zeros below them.
    for j in tl.static_range(PAD):
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
    """Add up the gradients of weight and bias over these columns of `images` images.

    partial: (programs, K K + 1, c).
    """
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
        # window[j COLUMNS + i]: column i of row (row - PAD + j) of the output's gradient
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
        # Unrolled twice: half as many moves of the window's registers.
        for row in tl.range(0, h, loop_unroll_factor=2):
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
    """Return (x if residual else 0) + depthwise convolution of x + bias, summed in float32.

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
    # A bias of zeros saves the compilation of a second kernel.
    bias = x.new_zeros(c, dtype=weight.dtype) if bias is None else bias
    # Neighbouring threads read neighbouring channels.
    taps = weight.reshape(c, k * k).t().contiguous()
    groups = triton.cdiv(w, COLUMNS * PATCHES)
    tall = triton.cdiv(c, CHANNELS) * groups * b
    strip = h
    # Each strip adds up to k - 1 rows of its neighbours.
    while strip >= 2 * k and tall * triton.cdiv(h, strip) < MIN_PROGRAMS:
        strip = triton.cdiv(strip, 2)
    with torch.cuda.device_of(x):
        _convolve[(tall * triton.cdiv(h, strip),)](  # pyright: ignore[reportIndexIssue]
            x, taps, bias, out, h, w, strip, groups,
            c, k, residual, COLUMNS, PATCHES, CHANNELS, **THREADS,
        )  # fmt: skip
    return out


def weight_gradient(x: Tensor, grad: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias, summed in float32 in an order fixed by the shapes.

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
    images = triton.cdiv(b * groups * blocks, GRADIENT_PROGRAMS)
    parts = triton.cdiv(b, images) * groups
    partial = torch.empty(parts, k * k + 1, c, device=x.device)
    with torch.cuda.device_of(x):
        _correlate[(parts * blocks,)](  # pyright: ignore[reportIndexIssue]
            x, grad, partial, b, h, w, images, groups, c, k, COLUMNS, PATCHES, CHANNELS, **THREADS
        )
    total = partial.sum(0)
    # Clones, so that both are aligned as compiled code expects.
    d_weight = total[:-1].t().clone(memory_format=torch.contiguous_format).view(c, 1, k, k)
    return d_weight, total[-1].clone()
