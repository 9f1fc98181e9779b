"""The layers of DiMR: time-dependent norms, attention, GEGLU and the two blocks.

Tensors are channels last, (b, n, d) for tokens and (b, h, w, d) for maps. Time-dependent vectors
come as arguments, (b, 1, ..., 1, d); a module's `vectors` holds their values at initialisation, one
per vector. Section numbers are those of arXiv 2406.09416; where text and released code differ, we
follow the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mezzotint.backbones.kernels.depthwise import ResidualDepthwise
from mezzotint.backbones.layers import attention


class TimeVectors(nn.Module):
    """All time-dependent vectors of a network, computed in one operation per forward (section 3.2).

    s = sigmoid(w tau + b),  v(tau) = s p0 + (1 - s) p1, elementwise. As the released code does, the
    module stores w - 1. With a class embedding e_c, v(tau, c) = v(tau) + W e_c (ours).

    Args:
        widths: of the vectors, in the order in which `forward` returns them.
        initial: their values at initialisation, 1 for a gain and 0 for a shift. p0 = p1, so v
            starts constant in tau.
        rows, class_dim: of the class embedding; a class_dim of 0 is none.
    """

    def __init__(
        self, widths: Sequence[int], initial: Sequence[float], rows: int = 0, class_dim: int = 0
    ):
        super().__init__()
        self.widths = list(widths)
        start = torch.cat(
            [torch.full((width,), value) for width, value in zip(widths, initial, strict=True)]
        )
        self.p0 = nn.Parameter(start)
        self.p1 = nn.Parameter(start.clone())
        self.w_minus_1 = nn.Parameter(torch.zeros_like(start))
        self.b = nn.Parameter(torch.zeros_like(start))
        self.classes, self.class_vectors = None, None
        if class_dim:
            self.classes = nn.Embedding(rows, class_dim)
            self.class_vectors = nn.Linear(class_dim, len(start), bias=False)

    def forward(self, tau: Tensor, label: Tensor | None = None) -> tuple[Tensor, ...]:
        """tau (b,) and label (b,) -> one (b, width) per vector, in float32 or wider.

        Args:
            label: rows of the class embedding, where there is one.
        """
        wide = torch.promote_types(self.p0.dtype, torch.float32)
        p0, p1, w_minus_1, b = (p.to(wide) for p in (self.p0, self.p1, self.w_minus_1, self.b))
        s = torch.sigmoid((1 + w_minus_1) * tau.to(wide)[:, None] + b)
        vectors = torch.lerp(p1, p0, s)
        if self.classes is not None and self.class_vectors is not None:
            vectors = vectors + self.class_vectors(self.classes(label)).to(wide)
        return vectors.split(self.widths, dim=1)


def time_layer_norm(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """TD-LN (section 3.2): layer norm, eps 1e-5 in the root, with gain and shift per image.

    In float32 or wider. On a CPU torch would keep the statistics of bfloat16 in bfloat16.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = F.layer_norm(wide, x.shape[-1:], eps=1e-5)
    return torch.addcmul(shift, normed.to(torch.promote_types(x.dtype, gain.dtype)), gain)


class TimeLayerNorm(nn.Module):
    """LN: the paper's TD-LN in the blocks."""

    vectors = (1.0, 0.0)

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        """x (b, ..., d); gain and shift (b, 1, ..., d)."""
        return time_layer_norm(x, gain, shift)


def divide_by_rms(x: Tensor) -> Tensor:
    """Return x / (rms(x) + 1e-8) over the last axis."""
    # The fused kernel has its epsilon inside the root: 1e-16 there is 1e-8 outside at x = 0.
    # Elsewhere the two differ by 1e-8 / rms, about float32's rounding (5e-7 at rms 0.02). float64
    # follows the formula.
    if x.dtype == torch.float64:
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return x / (rms + 1e-8)
    return F.rms_norm(x, x.shape[-1:], eps=1e-16)


class TimeRMSNorm(nn.Module):
    """TDRMSN: x / (rms(x) + 1e-8) times a time-dependent gain.

    The norm of the released models; the paper's text has `TimeLayerNorm`.
    """

    vectors = (1.0,)

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        """x (b, ..., d); gain (b, 1, ..., d)."""
        compiled = torch.compiler.is_compiling()
        on_cpu = x.device.type == "cpu" and x.dtype != torch.float64
        if on_cpu and torch.is_grad_enabled() and not compiled:
            return TimeRMSNormCPU.apply(x, gain)
        return divide_by_rms(x) * gain


class TimeRMSNormCPU(torch.autograd.Function):
    """`divide_by_rms(x) * gain` in training on a CPU, where torch would also keep x / rms(x).

    Gradients of TDRMSN, with r = 1 / rms(x), n = r x and d the width:
    dgain = sum dy n,   dx = r (gain dy - n sum(gain dy n) / d).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        """x (b, ..., d); gain (b, 1, ..., d)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = norm.square_().div_(x.shape[-1]).add_(1e-16).rsqrt_()
        ctx.save_for_backward(x, gain, r)
        return (x * r).mul_(gain).to(torch.promote_types(x.dtype, gain.dtype))

    @staticmethod
    @once_differentiable  # r is a constant here, and depends on x
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the gradients of x and gain."""
        (grad,), (x, gain, r) = grads, ctx.saved_tensors
        n = x * r
        d_n = grad * n
        d_gain = d_n.sum(tuple(range(1, x.ndim - 1)), keepdim=True)
        mean = d_n.mul_(gain).mean(-1, keepdim=True)
        d_x = n.mul_(mean).neg_().addcmul_(grad, gain).mul_(r)
        return d_x.to(x.dtype), d_gain.to(gain.dtype)


class RMSNorm(nn.Module):
    """RMSN: x / (rms(x) + 1e-8) times one learned gain."""

    vectors = ()

    def __init__(self, dim: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (b, ..., d)."""
        return divide_by_rms(x) * self.gain


class ClassRMSNorm(nn.Module):
    """ADARMSN: RMS norm, eps 1e-6 in the root, with the gain 1 + W c; W is zero at initialisation.

    c is the first entry along the first axis of positions: the class token of a transformer, the
    first row of a map. On a map it differs from column to column, as in the released code.
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

    def padding(self, device_type: str) -> int:
        """Return the zeros that fill a head up to a multiple of 8, as CUDA's fused kernels need."""
        return -(self.out.in_features // self.heads) % 8 if device_type == "cuda" else 0

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, n, d) -> (b, n, d), without the residual."""
        x, width = self.norm(x, *time), self.out.in_features // self.heads
        up, down, scale = self.qkv.weight, self.out.weight, None
        if more := self.padding(x.device.type):
            # Zeros in the weights cost less than in q, k, v and their gradients, and are as exact.
            up = F.pad(up.unflatten(0, (-1, width)), (0, 0, 0, more)).flatten(0, 1)
            down = F.pad(down.unflatten(1, (-1, width)), (0, more)).flatten(1)
            scale = width**-0.5
        q, k, v = F.linear(x, up).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
        return F.linear(mixed, down, self.out.bias)


class GEGLU(nn.Module):
    """Norm, then W2 (gelu(W0 x + b0) * (W1 x + b1)) + b2 (section 3.2, GLU).

    W0 and W1 are the halves of `up`.
    """

    def __init__(self, dim: int, hidden: int, norm: str):
        super().__init__()
        self.norm = NORMS[norm](dim)
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, *time: Tensor) -> Tensor:
        """x (b, ..., d) -> (b, ..., d), without the residual."""
        x = self.norm(x, *time)
        if x.device.type == "cpu":
            # Two products: gelu then reads contiguous memory, and the gradients of gate and value
            # need no joining, which costs more than a second product on a CPU (1 to 18 % of this
            # layer and its backward pass).
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
    """x += depthwise convolution(x), without norm; x += GEGLU(x).

    No LayerScale, unlike ConvNeXt.
    """

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
    """Linear of [x, skip] (U-ViT's long skip), as two products instead of a concatenation."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x and skip (b, ..., d) -> (b, ..., d)."""
        left, right = self.linear.weight.chunk(2, dim=1)
        out = F.linear(x, left, self.linear.bias)
        if x.device.type == "cpu":
            return out + F.linear(skip, right)
        # The second product adds to the first as it writes.
        return torch.addmm(out.flatten(0, -2), skip.flatten(0, -2), right.t()).view_as(x)
