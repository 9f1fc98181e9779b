"""The parts of DiMR: time-dependent norms, attention, GEGLU, the two blocks, the cascade between branches.

Tensors are channels last, (b, n, d) for tokens and (b, h, w, d) for maps. Time-dependent vectors come as arguments,
(b, 1, ..., 1, d): a module states how many it wants and their values at initialisation in `vectors`.
Section numbers are those of arXiv 2406.09416 unless said otherwise; where text and released code differ, the code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.kernels.depthwise import ResidualDepthwise
from mezzotint.backbones.layers import attention


class TimeVectors(nn.Module):
    """Every time-dependent vector of a network, side by side: one fused operation per forward (section 3.2).

    s = sigmoid(w tau + b),  v(tau) = s p0 + (1 - s) p1, elementwise; the released code stores w - 1.

    Args:
        widths: of the vectors, in the order in which `forward` returns them.
        initial: their values at initialisation, 1 for a gain and 0 for a shift. p0 = p1, so v starts constant in tau.
    """

    def __init__(self, widths: Sequence[int], initial: Sequence[float]):
        super().__init__()
        self.widths = list(widths)
        start = torch.cat(
            [torch.full((width,), value) for width, value in zip(widths, initial, strict=True)]
        )
        self.p0 = nn.Parameter(start)
        self.p1 = nn.Parameter(start.clone())
        self.w_minus_1 = nn.Parameter(torch.zeros_like(start))
        self.b = nn.Parameter(torch.zeros_like(start))

    def forward(self, tau: Tensor) -> tuple[Tensor, ...]:
        """tau (b,) -> one (b, width) per vector, in float32 or wider."""
        wide = torch.promote_types(self.p0.dtype, torch.float32)
        p0, p1, w_minus_1, b = (p.to(wide) for p in (self.p0, self.p1, self.w_minus_1, self.b))
        s = torch.sigmoid((1 + w_minus_1) * tau.to(wide)[:, None] + b)
        return torch.lerp(p1, p0, s).split(self.widths, dim=1)


def layer_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """TD-LN (section 3.2): layer normalisation, eps 1e-5 in the root, with a gain and a shift per image."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-5), gain)


class TimeLayerNorm(nn.Module):
    """LN: the paper's TD-LN in the blocks."""

    vectors = (1.0, 0.0)

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """x (b, ..., d); gain and shift (b, 1, ..., d)."""
        return layer_norm(x, gain, shift)


def over_rms(x: Tensor) -> Tensor:
    """x / (rms(x) + 1e-8) over the last axis.

    The fused kernel has its epsilon inside the root: 1e-16 there is 1e-8 outside at x = 0, and elsewhere the two differ
    by 1e-8 / rms, which float32 hardly sees (5e-7 at rms 0.02). float64 follows the formula.
    """
    if x.dtype == torch.float64:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / (rms + 1e-8)
    return F.rms_norm(x, x.shape[-1:], eps=1e-16)


class TimeRMSNorm(nn.Module):
    """TDRMSN: x / (rms(x) + 1e-8) times a time-dependent gain; the norm of the released models, not of the text."""

    vectors = (1.0,)

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (b, ..., d); gain (b, 1, ..., d)."""
        plain = x.device.type != "cpu" or x.dtype == torch.float64 or torch.compiler.is_compiling()
        return (
            over_rms(x) * gain if plain or not torch.is_grad_enabled() else TimeRMS.apply(x, gain)
        )


class TimeRMS(torch.autograd.Function):
    """`over_rms(x) * gain` in training on a CPU, where torch has no fused norm and keeps x / rms(x) beside x.

    Derivative of TDRMSN, with r = 1 / rms(x), n = r x and d the width:
    dgain = sum dy n, dx = r (gain dy - n sum(gain dy n) / d).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        """x (b, ..., d); gain (b, 1, ..., d)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = norm.square_().div_(x.shape[-1]).add_(1e-16).rsqrt_()
        ctx.save_for_backward(x, gain, r)
        return (x * r).mul_(gain).to(torch.promote_types(x.dtype, gain.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and gain."""
        (grad,), (x, gain, r) = grads, ctx.saved_tensors
        n = x * r
        d_n = grad * n
        d_gain = d_n.sum(tuple(range(1, x.ndim - 1)), keepdim=True)
        mean = d_n.mul_(gain).mean(-1, keepdim=True)
        d_x = n.mul_(mean).neg_().addcmul_(grad, gain).mul_(r)
        return d_x.to(x.dtype), d_gain.to(gain.dtype)


class RMSNorm(nn.Module):
    """RMSN: the same with one learned gain."""

    vectors = ()

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (b, ..., d)."""
        return over_rms(x) * self.gain


class ClassRMSNorm(nn.Module):
    """ADARMSN: RMS with eps 1e-6 in the root and the gain 1 + W c, W zero at initialisation.

    c is the first entry along the first axis of positions: the class token of a transformer, the first row of a map
    (so there it differs from column to column, as in the released code).
    """

    vectors = ()

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, ..., d)."""
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * (1 + self.linear(x[:, :1]))


NORMS: dict[str, Any] = {
    "TDRMSN": TimeRMSNorm,
    "LN": TimeLayerNorm,
    "RMSN": RMSNorm,
    "ADARMSN": ClassRMSNorm,
}


class Attention(nn.Module):
    """Norm, then multi-head self-attention in the working dtype; no bias on q, k, v."""

    def __init__(self, dim: int, heads: int, norm: str):
        super().__init__()
        self.heads = heads
        self.norm = NORMS[norm](dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, n, d) -> (b, n, d), without the residual."""
        q, k, v = (
            self.qkv(self.norm(x, *time)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Norm, then W2 (gelu(W0 x + b0) * (W1 x + b1)) + b2 (section 3.2, GLU); W0 and W1 are the halves of `up`."""

    def __init__(self, dim: int, hidden: int, norm: str):
        super().__init__()
        self.norm = NORMS[norm](dim)
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, ..., d) -> (b, ..., d), without the residual."""
        x = self.norm(x, *time)
        if x.device.type == "cpu":
            # Two products: gate and value lie apart, so gelu runs over contiguous memory and their gradients need no
            # joining, which here costs more than the second product (1 to 18 % of this and its backward pass).
            halves = zip(self.up.weight.chunk(2), self.up.bias.chunk(2), strict=True)
            gate, value = (F.linear(x, weight, bias) for weight, bias in halves)
        else:
            gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * value)


class TransformerBlock(nn.Module):
    """x += attention(x); x += GEGLU(x)."""

    def __init__(self, dim: int, hidden: int, heads: int, norm: str):
        super().__init__()
        self.attention = Attention(dim, heads, norm)
        self.mlp = GEGLU(dim, hidden, norm)
        self.vectors = self.attention.norm.vectors + self.mlp.norm.vectors

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, n, d) -> (b, n, d)."""
        half = len(time) // 2
        x = x + self.attention(x, *time[:half])
        return x + self.mlp(x, *time[half:])


class ConvNeXtBlock(nn.Module):
    """x += depthwise convolution(x), no norm before it; x += GEGLU(x). No LayerScale, unlike ConvNeXt."""

    def __init__(self, dim: int, hidden: int, kernel: int, norm: str):
        super().__init__()
        self.depthwise = ResidualDepthwise(dim, kernel)
        self.mlp = GEGLU(dim, hidden, norm)
        self.vectors = self.mlp.norm.vectors

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, h, w, d) -> (b, h, w, d)."""
        x = self.depthwise(x)
        return x + self.mlp(x, *time)


class LongSkip(nn.Module):
    """Linear of [x, skip] (U-ViT's long skip), the product split instead of the inputs joined."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x and skip (b, ..., d) -> (b, ..., d)."""
        left, right = self.linear.weight.chunk(2, dim=1)
        return F.linear(x, left, self.linear.bias) + F.linear(skip, right)


class Cascade(nn.Module):
    """All features of a branch brought to the next: TD-LN, Linear, pixel shuffle, TD-LN (section 3.1).

    The features are never concatenated whole, see `normed_projection`. The shuffle's channels are (row, column,
    channel), channel fastest.

    Args:
        dim_in, count: width and number of the features; dim: width of the next branch; ratio: of the resolutions.
    """

    def __init__(self, dim_in: int, count: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.project = nn.Linear(dim_in * count, dim * ratio**2)
        self.vectors = ((dim_in * count, 1.0), (dim_in * count, 0.0), (dim, 1.0), (dim, 0.0))

    def forward(self, features: Sequence[Tensor], time: Sequence[Tensor]) -> Tensor:
        """Features (b, h, w, dim_in) each -> (b, h ratio, w ratio, dim); time: gain and shift before, and after."""
        gain, shift, gain_out, shift_out = time
        out = normed_projection(features, gain, shift, self.project.weight, self.project.bias)
        b, h, w, _ = out.shape
        r = self.ratio
        out = out.view(b, h, w, r, r, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, -1)
        return layer_norm(out.to(gain_out.dtype), gain_out, shift_out)


def normed_projection(
    features: Sequence[Tensor], gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """W (gain LN(f) + shift) + b of the features f as if concatenated, LN without weights and with eps 1e-5.

    Args:
        features: count of (b, h, w, d). gain, shift: (b, 1, 1, count d). weight: (out, count d). bias: (out,).
    """
    kind = features[0].device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    low = torch.get_autocast_dtype(kind) if mixed else weight.dtype
    if (
        torch.compiler.is_compiling()
    ):  # the compiler chooses by itself what to keep and what to make again
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


GROUP = 8  # features normalised and projected at once: wide enough for the matrix product, a fifth of XL's memory


class NormedProjection(torch.autograd.Function):
    """`normed_projection` a few features at a time, keeping for the backward pass only what others keep already.

    With n = (f - mean) rstd and a = gain n + shift, both of one group of features, the output is sum W a + b. Kept, the
    a of all groups would be the largest activation of the network; they are made again from the features, one
    elementwise pass, where plain checkpointing would repeat the matrix product too.
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
        """The products run in `low`, statistics in float32 or wider."""
        mean, rstd = joint_statistics(features)
        ctx.low = low
        ctx.save_for_backward(gain, shift, weight, mean, rstd, *features)
        rows = mean.numel()
        out = bias.to(mean.dtype).repeat(rows, 1)
        for columns, n in normed_groups(features, mean, rstd):
            a = torch.addcmul(shift[..., columns], n, gain[..., columns], out=n).to(low)
            out += a.view(rows, -1) @ weight[:, columns].to(low).t()
        return out.view(*features[0].shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gain, shift, weight, bias and every feature."""
        gain, shift, weight, mean, rstd, *features = ctx.saved_tensors
        rows, d, low = mean.numel(), features[0].shape[-1], ctx.low
        grad = grads[0].reshape(rows, -1).to(low)
        d_gain, d_shift, d_weight = (
            torch.empty_like(gain),
            torch.empty_like(shift),
            torch.empty_like(weight),
        )
        d_normed: list[Tensor] = []
        m1, m2 = torch.zeros_like(mean), torch.zeros_like(mean)
        for columns, n in normed_groups(features, mean, rstd):
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
        # layer normalisation: df = rstd (dn - mean(dn) - n mean(dn n)), both means over all features
        width = d * len(features)
        slope = rstd.square() * (m2 / width)
        offset = slope * mean - rstd * (m1 / width)
        d_features = [
            (d_n * rstd + torch.addcmul(offset, f, slope, value=-1)).to(f.dtype)
            for d_n, f in zip(d_normed, features, strict=True)
        ]
        return d_gain, d_shift, d_weight, grad.sum(0).to(weight.dtype), None, *d_features


def normed_groups(
    features: Sequence[Tensor], mean: Tensor, rstd: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """(columns, (f - mean) rstd) of a few features at a time, side by side; columns of the whole concatenation."""
    d = features[0].shape[-1]
    offset = -mean * rstd
    for i in range(0, len(features), GROUP):
        part = features[i : i + GROUP]
        joined = mean.new_empty(*mean.shape[:-1], len(part) * d)
        for f, place in zip(part, joined.split(d, dim=-1), strict=True):
            torch.addcmul(offset, f.to(mean.dtype), rstd, out=place)
        yield slice(i * d, (i + len(part)) * d), joined


def joint_statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + 1e-5) over the last axes of equally wide features as if concatenated."""
    wide = torch.promote_types(features[0].dtype, torch.float32)
    # The fused norm's own statistics: torch.var_mean takes 6 times as long on the CPU. It gives 1 / sqrt(variance).
    moments = [
        torch.native_layer_norm(f.to(wide), f.shape[-1:], None, None, 0.0)[1:] for f in features
    ]
    means, roots = (torch.stack(part) for part in zip(*moments, strict=True))
    variances = roots.pow(-2)
    spread, mean = torch.var_mean(means, dim=0, correction=0)
    # law of total variance: the mean of the slices' variances plus the variance of their means
    return mean, torch.rsqrt(variances.mean(0) + spread + 1e-5)
