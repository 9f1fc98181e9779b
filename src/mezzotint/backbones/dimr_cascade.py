"""DiMR's cascade: all features of a branch, normalised and projected for the next branch.

The concatenation of the features would be the network's largest activation, so it is never formed.
Section numbers are those of arXiv 2406.09416.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.dimr_blocks import time_layer_norm
from mezzotint.backbones.kernels.depthwise import autocast_dtype


class Cascade(nn.Module):
    """From a branch's features to the next branch: TD-LN, Linear, pixel shuffle, TD-LN (3.1).

    The features are never concatenated, see `normed_projection`. The shuffle's channels are (row,
    column, channel), channel fastest.

    Args:
        dim_in, count: width and number of the features. dim: width of the next branch.
        ratio: of the resolutions.
    """

    def __init__(self, dim_in: int, count: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.project = nn.Linear(dim_in * count, dim * ratio**2)
        self.vectors = ((dim_in * count, 1.0), (dim_in * count, 0.0), (dim, 1.0), (dim, 0.0))

    def forward(self, features: Sequence[Tensor], time: Sequence[Tensor]) -> Tensor:
        """Features (b, h, w, dim_in) each -> (b, h ratio, w ratio, dim).

        time: gain and shift of the first norm, then of the second.
        """
        gain, shift, gain_out, shift_out = time
        out = normed_projection(features, gain, shift, self.project.weight, self.project.bias)
        b, h, w, _ = out.shape
        r = self.ratio
        out = out.view(b, h, w, r, r, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, -1)
        return time_layer_norm(out.to(gain_out.dtype), gain_out, shift_out)


def normed_projection(
    features: Sequence[Tensor], gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Return W (gain LN(f) + shift) + b, with f the concatenation of `features`.

    LN has no weights and eps 1e-5.

    Args:
        features: count of (b, h, w, d). gain, shift: (b, 1, 1, count d).
        weight: (out, count d). bias: (out,).
    """
    low = autocast_dtype(features[0].device.type) or weight.dtype
    # The compiler chooses by itself what to keep and what to compute again.
    if torch.compiler.is_compiling():
        mean, rstd = joint_statistics(features)
        out = bias.to(mean.dtype)
        for i, f in enumerate(features):
            columns = slice(i * f.shape[-1], (i + 1) * f.shape[-1])
            a = torch.addcmul(
                shift[..., columns], (f.to(mean.dtype) - mean) * rstd, gain[..., columns]
            ).to(low)
            out = out + F.linear(a, weight[:, columns].to(low))
        return out
    return NormedProjection.apply(gain, shift, weight, bias, low, *features)


# Features normalised and projected at once: wide enough for a fast matrix product, and a fifth of
# the memory of all of DiMR-XL's.
FEATURES_AT_ONCE = 8


class NormedProjection(torch.autograd.Function):
    """`normed_projection`, a few features at a time, keeping the features alone for backward.

    With n = (f - mean) rstd and a = gain n + shift of one group of features, the output is
    sum W a + b. If kept, a would be the largest activation of the network. The backward pass
    computes it again from the features in one elementwise pass; plain checkpointing would repeat
    the matrix product too. This costs no time and saves 12 % (float32) to 15 % (bf16) of the peak
    (docs/performance.md).
    """

    @staticmethod
    def forward(
        ctx: Any,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        low: torch.dtype,
        *features: Tensor,
    ) -> Tensor:
        """Compute the products in `low`, the statistics in float32 or wider."""
        mean, rstd = joint_statistics(features)
        ctx.low = low
        ctx.save_for_backward(gain, shift, weight, mean, rstd, *features)
        rows = mean.numel()
        out = bias.to(mean.dtype).repeat(rows, 1)
        for columns, n in iterate_groups(features, mean, rstd):
            a = torch.addcmul(shift[..., columns], n, gain[..., columns], out=n).to(low)
            out += a.view(rows, -1) @ weight[:, columns].to(low).t()
        return out.view(*features[0].shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gain, shift, weight, bias and every feature."""
        gain, shift, weight, mean, rstd, *features = ctx.saved_tensors
        rows, d, low = mean.numel(), features[0].shape[-1], ctx.low
        grad = grads[0].reshape(rows, -1).to(low)
        d_gain, d_shift, d_weight = map(torch.empty_like, (gain, shift, weight))
        d_normed: list[Tensor] = []
        m1, m2 = torch.zeros_like(mean), torch.zeros_like(mean)
        for columns, n in iterate_groups(features, mean, rstd):
            d_a = (grad @ weight[:, columns].to(low)).view_as(n).to(n.dtype)
            a = torch.addcmul(shift[..., columns], n, gain[..., columns]).to(low)
            if low == weight.dtype:
                torch.mm(grad.t(), a.view(rows, -1), out=d_weight[:, columns])
            else:
                d_weight[:, columns] = grad.t() @ a.view(rows, -1)
            d_shift[..., columns] = d_a.sum((1, 2), keepdim=True)
            d_gain[..., columns] = (d_a * n).sum((1, 2), keepdim=True)
            d_n = d_a.mul_(gain[..., columns])
            m1 += d_n.sum(-1, keepdim=True)
            m2 += (d_n * n).sum(-1, keepdim=True)
            d_normed += d_n.split(d, dim=-1)
        # Layer norm: df = rstd (dn - mean(dn) - n mean(dn n)), both means over all features.
        width = d * len(features)
        slope = rstd.square() * (m2 / width)
        offset = slope * mean - rstd * (m1 / width)
        d_features = [
            (d_n * rstd + torch.addcmul(offset, f, slope, value=-1)).to(f.dtype)
            for d_n, f in zip(d_normed, features, strict=True)
        ]
        return d_gain, d_shift, d_weight, grad.sum(0).to(weight.dtype), None, *d_features


def iterate_groups(
    features: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns of the concatenation, (f - mean) rstd) of a few features at a time."""
    d = features[0].shape[-1]
    offset = -mean * rstd
    for i in range(0, len(features), FEATURES_AT_ONCE):
        part = features[i : i + FEATURES_AT_ONCE]
        joined = mean.new_empty(*mean.shape[:-1], len(part) * d)
        for f, place in zip(part, joined.split(d, dim=-1), strict=True):
            torch.addcmul(offset, f.to(mean.dtype), rstd, out=place)
        yield slice(i * d, (i + len(part)) * d), joined


def joint_statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(variance + 1e-5) of the concatenation of equally wide features."""
    wide = torch.promote_types(features[0].dtype, torch.float32)
    # The fused norm returns mean and 1 / sqrt(variance); torch.var_mean takes 6 times as long on a
    # CPU.
    moments = [
        torch.native_layer_norm(f.to(wide), f.shape[-1:], None, None, 0.0)[1:] for f in features
    ]
    means, roots = (torch.stack(part) for part in zip(*moments, strict=True))
    variances = roots.pow(-2)
    spread, mean = torch.var_mean(means, dim=0, correction=0)
    # Law of total variance: the mean of the features' variances plus the variance of their means.
    return mean, torch.rsqrt(variances.mean(0) + spread + 1e-5)
