"""DiMR's cascade: all features of a branch, normalised and projected for the next branch.

The normalised features together are the network's largest activation, so none is kept for the
backward pass. Section numbers are those of arXiv 2406.09416.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.dimr_blocks import time_layer_norm
from mezzotint.backbones.kernels.depthwise import autocast_dtype


class Cascade(nn.Module):
    """From a branch's features to the next branch: TD-LN, Linear, pixel shuffle, TD-LN (3.1).

    The shuffle's channels are (row, column, channel), channel fastest.

    Args:
        dim_in, count: width and number of the features. dim: width of the next branch.
        ratio: of the resolutions.
    """

    def __init__(self, dim_in: int, count: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.project = nn.Linear(dim_in * count, dim * ratio**2)
        self.vectors = ((dim_in * count, 1.0), (dim_in * count, 0.0), (dim, 1.0), (dim, 0.0))
        self.parts = Parts()

    def compile_parts(self, compiler: Callable[..., Any]) -> None:
        """Compile the elementwise parts of the projection by `compiler`, torch.compile or alike."""
        self.parts = Parts(*(compiler(getattr(Parts, part.name)) for part in fields(Parts)))

    def forward(self, features: Sequence[Tensor], time: Sequence[Tensor]) -> Tensor:
        """Features (b, h, w, dim_in) each -> (b, h ratio, w ratio, dim).

        time: gain and shift of the first norm, then of the second.
        """
        gain, shift, gain_out, shift_out = time
        weight, bias = self.project.weight, self.project.bias
        out = normed_projection(features, gain, shift, weight, bias, self.parts)
        b, h, w, _ = out.shape
        r = self.ratio
        out = out.view(b, h, w, r, r, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, -1)
        return time_layer_norm(out.to(gain_out.dtype), gain_out, shift_out)


# --- The elementwise parts, each one kernel or two where it is compiled ---------------------------


def statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / sqrt(variance + 1e-5) of the concatenation of equally wide features.

    By sums alone, without a tensor of a feature's size. The variance is the difference of two
    moments: it loses digits where the mean is many standard deviations.
    """
    wide = torch.promote_types(features[0].dtype, torch.float32)
    size = len(features) * features[0].shape[-1]
    sums = [f.sum(-1, keepdim=True, dtype=wide) for f in features]
    norms = [torch.linalg.vector_norm(f, dim=-1, keepdim=True, dtype=wide) for f in features]
    mean = torch.stack(sums).sum(0) / size
    # var = E[f^2] - E[f]^2
    variance = torch.stack(norms).square().sum(0) / size - mean.square()
    return mean, torch.rsqrt(variance.clamp(min=0) + 1e-5)


def normalise(
    features: Sequence[Tensor], mean: Tensor, rstd: Tensor, gain: Tensor, shift: Tensor,
    low: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the concatenation of gain (f - mean) rstd + shift, (b, h, w, count d), in `low`."""
    d, offset = features[0].shape[-1], -mean * rstd
    pairs = list(zip(gain.split(d, dim=-1), shift.split(d, dim=-1), strict=True))
    if torch.compiler.is_compiling():
        return torch.cat(
            [
                torch.addcmul(s, torch.addcmul(offset, f, rstd), g).to(low)
                for f, (g, s) in zip(features, pairs, strict=True)
            ],
            dim=-1,
        )
    joined = mean.new_empty(*mean.shape[:-1], len(features) * d, dtype=low)
    for f, (g, s), place in zip(features, pairs, joined.split(d, dim=-1), strict=True):
        torch.addcmul(s, torch.addcmul(offset, f, rstd), g, out=place)
    return joined


def gradient_sums(
    features: Sequence[Tensor], mean: Tensor, rstd: Tensor, gain: Tensor, d_a: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of gain and shift, and the sums over channels of d_n and d_n n.

    With n = (f - mean) rstd, a = gain n + shift and d_n = gain d_a; d_a (b, h, w, count d) is a's
    gradient.
    """
    d = features[0].shape[-1]
    d_gain, d_shift = [], []
    m1, m2 = torch.zeros_like(mean), torch.zeros_like(mean)
    groups = zip(features, d_a.split(d, dim=-1), gain.split(d, dim=-1), strict=True)
    for f, grad, g in groups:
        n = torch.addcmul(-mean * rstd, f, rstd)
        d_shift.append(grad.sum((1, 2), keepdim=True, dtype=mean.dtype))
        d_gain_each = grad * n
        d_gain.append(d_gain_each.sum((1, 2), keepdim=True))
        m1, m2 = m1 + weighted_sum(grad, g), m2 + weighted_sum(d_gain_each, g)
    return torch.cat(d_gain, dim=-1), torch.cat(d_shift, dim=-1), m1, m2


def weighted_sum(x: Tensor, g: Tensor) -> Tensor:
    """Return the sum over channels of g x, for x (b, h, w, c) and g (b, 1, 1, c)."""
    if torch.compiler.is_compiling():  # a product would need x in memory
        return (g * x).sum(-1, keepdim=True)
    out = x.flatten(1, 2) @ g.view(len(g), -1, 1).to(x.dtype)
    return out.view(*x.shape[:-1], 1)


def feature_gradients(
    features: Sequence[Tensor], rstd: Tensor, gain: Tensor, d_a: Tensor, slope: Tensor,
    offset: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Return gain d_a rstd + offset - slope f for every feature f, in its dtype."""
    d = features[0].shape[-1]
    groups = zip(features, d_a.split(d, dim=-1), gain.split(d, dim=-1), strict=True)
    return [
        torch.addcmul(torch.addcmul(offset, f, slope, value=-1), g * grad, rstd).to(f.dtype)
        for f, grad, g in groups
    ]


@dataclass(frozen=True)
class Parts:
    """The functions above, plain or compiled."""

    statistics: Callable[..., tuple[Tensor, Tensor]] = statistics
    normalise: Callable[..., Tensor] = normalise
    gradient_sums: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = gradient_sums
    feature_gradients: Callable[..., list[Tensor]] = feature_gradients


# --- The whole as one operation -------------------------------------------------------------------


def normed_projection(
    features: Sequence[Tensor],
    gain: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    parts: Parts,
) -> Tensor:
    """Return W (gain LN(f) + shift) + b, with f the concatenation of `features`.

    LN has no weights and eps 1e-5.

    Args:
        features: count of (b, h, w, d). gain, shift: (b, 1, 1, count d).
        weight: (out, count d). bias: (out,).
    """
    kind = features[0].device.type
    low = autocast_dtype(kind) or weight.dtype
    # The compiler chooses by itself what to keep and what to compute again.
    if torch.compiler.is_compiling():
        mean, rstd = joint_statistics(features) if kind == "cpu" else statistics(features)
        a = normalise(features, mean, rstd, gain, shift, low)
        return F.linear(a, weight.to(low)) + bias.to(mean.dtype)
    if kind == "cpu":
        return NormedProjectionCPU.apply(gain, shift, weight, bias, low, *features)
    return NormedProjection.apply(gain, shift, weight, bias, low, parts, *features)


class NormedProjection(torch.autograd.Function):
    """`normed_projection` in one product, keeping the features alone for backward.

    The output is W a + b with a = gain n + shift and n = (f - mean) rstd. If kept, a would be the
    largest activation of the network. The backward pass computes it again from the features; plain
    checkpointing would repeat the matrix product too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        low: torch.dtype,
        parts: Parts,
        *features: Tensor,
    ) -> Tensor:
        """Compute the product in `low`, the statistics in float32 or wider."""
        mean, rstd = parts.statistics(features)
        ctx.low, ctx.parts = low, parts
        ctx.save_for_backward(gain, shift, weight, mean, rstd, *features)
        a = parts.normalise(features, mean, rstd, gain, shift, low)
        return a @ weight.to(low).t() + bias.to(mean.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of gain, shift, weight, bias and every feature."""
        gain, shift, weight, mean, rstd, *features = ctx.saved_tensors
        grad = grads[0].to(ctx.low).flatten(0, 2)
        a = ctx.parts.normalise(features, mean, rstd, gain, shift, ctx.low)
        d_weight = (grad.t() @ a.flatten(0, 2)).to(weight.dtype)
        del a  # makes room for its gradient
        d_a = (grad @ weight.to(ctx.low)).view(*mean.shape[:-1], -1)
        d_gain, d_shift, m1, m2 = ctx.parts.gradient_sums(features, mean, rstd, gain, d_a)
        # Layer norm: df = rstd (dn - mean(dn) - n mean(dn n)), both means over all features.
        width = gain.shape[-1]
        slope = rstd.square() * (m2 / width)
        offset = slope * mean - rstd * (m1 / width)
        d_features = ctx.parts.feature_gradients(features, rstd, gain, d_a, slope, offset)
        d_bias = grad.sum(0, dtype=mean.dtype).to(weight.dtype)
        d_gain, d_shift = d_gain.to(gain.dtype), d_shift.to(shift.dtype)
        return d_gain, d_shift, d_weight, d_bias, None, None, *d_features


# --- CPU ------------------------------------------------------------------------------------------


# Features normalised and projected at once: wide enough for a fast matrix product, and a fifth of
# the memory of all of DiMR-XL's.
FEATURES_AT_ONCE = 8


class NormedProjectionCPU(torch.autograd.Function):
    """`NormedProjection` on a CPU: a few features at a time, in longer loops and few buffers.

    This costs no time and saves 12 % (float32) to 15 % (bf16) of the peak (docs/performance.md).
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
