"""The 5/3 wavelet of JPEG 2000 without rounding: linear and exactly invertible.

One level turns (b, c, h, w) into (b, 4c, h/2, w/2): the bands LL, LH, HL, HH in that order, first
letter along the axis h, second along w (specs/simple-diffusion.md section 5). A constant image has
LL equal to itself and details of zero. The transform is not orthogonal, so white noise does not
stay white: diffusion runs on pixels, and the transform is a part of the network.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.backbones.inputs import depth_to_space, space_to_depth


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and the high band of the last axis, each half as long."""
    even, odd = x[..., ::2], x[..., 1::2]
    # d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2, with x[N] := x[N-2] at the edge
    high = odd - (even + torch.cat([even[..., 1:], even[..., -1:]], -1)) / 2
    # s[n] = x[2n] + (d[n-1] + d[n]) / 4, with d[-1] := d[0]
    low = even + (torch.cat([high[..., :1], high[..., :-1]], -1) + high) / 4
    return low, high


def _merge(low: Tensor, high: Tensor) -> Tensor:
    """Invert `_split`: undo its two steps in reverse order."""
    even = low - (torch.cat([high[..., :1], high[..., :-1]], -1) + high) / 4
    odd = high + (even + torch.cat([even[..., 1:], even[..., -1:]], -1)) / 2
    return torch.stack([even, odd], -1).flatten(-2)


def dwt53(
    x: Float[Tensor, "b c h w"], levels: int
) -> Float[Tensor, "b c*4**{levels} h//2**{levels} w//2**{levels}"]:
    """Transform an image by the 5/3 wavelet, with the bands on channels.

    Args:
        x: (b, c, h, w); h and w multiples of 2^levels, else ValueError.
        levels: 0 or more. Each further level transforms LL again, and brings the detail bands of
            the level before to the coarser grid by space-to-depth.

    Returns:
        (b, c 4^levels, h / 2^levels, w / 2^levels): the coarsest bands first.
    """
    if levels < 0:
        raise ValueError(f"levels {levels} must not be negative")
    if any(side % 2**levels for side in x.shape[-2:]):
        raise ValueError(
            f"{x.shape[-2]}x{x.shape[-1]} is not divisible by {2**levels}, as {levels} levels need"
        )
    if levels == 0:
        return x
    low, high = _split(x)
    bands = [
        band.transpose(-1, -2) for half in (low, high) for band in _split(half.transpose(-1, -2))
    ]
    # First letter along h, though w was split first; without rounding the order does not matter.
    ll, hl, lh, hh = bands
    details = [space_to_depth(band, 2 ** (levels - 1)) for band in (lh, hl, hh)]
    return torch.cat([dwt53(ll, levels - 1), *details], 1)


def idwt53(
    y: Float[Tensor, "b c h w"], levels: int
) -> Float[Tensor, "b c//4**{levels} h*2**{levels} w*2**{levels}"]:
    """Invert `dwt53`: (b, c 4^levels, h, w) -> (b, c, h 2^levels, w 2^levels).

    Errors: ValueError where the channels are no multiple of 4^levels.
    """
    if levels < 0:
        raise ValueError(f"levels {levels} must not be negative")
    if y.shape[1] % 4**levels:
        raise ValueError(
            f"{y.shape[1]} channels are no multiple of {4**levels}, as {levels} levels need"
        )
    if levels == 0:
        return y
    coarse, *details = y.chunk(4, 1)
    ll = idwt53(coarse, levels - 1)
    lh, hl, hh = (depth_to_space(band, 2 ** (levels - 1)) for band in details)
    low = _merge(ll.transpose(-1, -2), hl.transpose(-1, -2)).transpose(-1, -2)
    high = _merge(lh.transpose(-1, -2), hh.transpose(-1, -2)).transpose(-1, -2)
    return _merge(low, high)
