"""The parts of DiMR: time-dependent norms, attention, GEGLU, the two blocks, the cascade between branches.

Tensors are channels last, (b, n, d) for tokens and (b, h, w, d) for maps. Time-dependent vectors come as arguments,
(b, 1, ..., 1, d): a module states how many it wants and their values at initialisation in `vectors`.
Section numbers are those of arXiv 2406.09416 unless said otherwise; where text and released code differ, the code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), keeping nothing of it for the backward pass, which computes it again."""
    if not torch.is_grad_enabled():
        return function(*args)
    # There is no dropout to repeat, and saving the random state would wait for the device.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


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
        start = torch.cat([torch.full((width,), value) for width, value in zip(widths, initial, strict=True)])
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

    The fused kernel has its epsilon inside the root: 1e-16 there is 1e-8 outside at x = 0 and, to rounding, wherever
    rms is not near 1e-8 itself.
    """
    return F.rms_norm(x, x.shape[-1:], eps=1e-16)


class TimeRMSNorm(nn.Module):
    """TDRMSN: x / (rms(x) + 1e-8) times a time-dependent gain; the norm of the released models, not of the text."""

    vectors = (1.0,)

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (b, ..., d); gain (b, 1, ..., d)."""
        return over_rms(x) * gain


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


NORMS: dict[str, Any] = {"TDRMSN": TimeRMSNorm, "LN": TimeLayerNorm, "RMSN": RMSNorm, "ADARMSN": ClassRMSNorm}


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
        q, k, v = self.qkv(self.norm(x, *time)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Norm, then W2 (gelu(W0 x + b0) * (W1 x + b1)) + b2 (section 3.2, GLU); W0 and W1 are the halves of `up`."""

    def __init__(self, dim: int, hidden: int, norm: str):
        super().__init__()
        self.norm = NORMS[norm](dim)
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, ..., d) -> (b, ..., d), without the residual."""
        gate, value = self.up(self.norm(x, *time)).chunk(2, dim=-1)
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
        self.depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.mlp = GEGLU(dim, hidden, norm)
        self.vectors = self.mlp.norm.vectors

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, h, w, d) -> (b, h, w, d)."""
        # The permuted view is a channels-last image and so is the convolution's result: no copy either way.
        x = x + self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
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

    The features are never concatenated whole: the statistics of the norm come from those of its slices, and the
    projection is a sum over groups of slices. The shuffle's channels are (row, column, channel), channel fastest.

    Args:
        dim_in, count: width and number of the features; dim: width of the next branch; ratio: of the resolutions.
    """

    group = 8  # features normalised and projected at once: enough for a wide matrix product, a fifth of XL's memory

    def __init__(self, dim_in: int, count: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.project = nn.Linear(dim_in * count, dim * ratio**2)
        self.vectors = ((dim_in * count, 1.0), (dim_in * count, 0.0), (dim, 1.0), (dim, 0.0))

    def forward(self, features: Sequence[Tensor], time: Sequence[Tensor]) -> Tensor:
        """Features (b, h, w, dim_in) each -> (b, h ratio, w ratio, dim); time: gain and shift before, and after."""
        gain, shift, gain_out, shift_out = time
        mean, rstd = joint_statistics(features)
        groups = [features[i : i + self.group] for i in range(0, len(features), self.group)]
        width = self.group * features[0].shape[-1]
        parts = zip(
            groups, gain.split(width, -1), shift.split(width, -1), self.project.weight.split(width, 1), strict=True
        )
        out = self.project.bias.to(mean.dtype)
        for group in parts:
            # Always recomputed in the backward pass: kept, the groups would be the largest activation of all, and one
            # more elementwise pass over them costs 1 % of a training step.
            out = out + recomputed(_project, mean, rstd, *group)
        b, h, w, _ = out.shape
        r = self.ratio
        out = out.view(b, h, w, r, r, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, -1)
        return layer_norm(out.to(gain_out.dtype), gain_out, shift_out)


def joint_statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + 1e-5) over the last axes of equally wide features as if concatenated."""
    wide = torch.promote_types(features[0].dtype, torch.float32)
    pairs = [torch.var_mean(f.to(wide), dim=-1, correction=0, keepdim=True) for f in features]
    variances, means = (torch.stack(part) for part in zip(*pairs, strict=True))
    spread, mean = torch.var_mean(means, dim=0, correction=0)
    # law of total variance: the mean of the slices' variances plus the variance of their means
    return mean, torch.rsqrt(variances.mean(0) + spread + 1e-5)


def _project(mean: Tensor, rstd: Tensor, part: Sequence[Tensor], gain: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """W (gain (f - mean) rstd + shift) for a few features f, with the columns of W that belong to them."""
    gains, shifts = gain.chunk(len(part), dim=-1), shift.chunk(len(part), dim=-1)
    normed = [torch.addcmul(s, (f - mean) * rstd, g) for f, g, s in zip(part, gains, shifts, strict=True)]
    return F.linear(torch.cat(normed, dim=-1).to(weight.dtype), weight)
