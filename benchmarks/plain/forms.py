"""The plain form of each optimisation in our networks, for `speed.py --switches`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.backbones import diffit, dimr_blocks, dimr_cascade
from mezzotint.backbones.kernels import depthwise
from mezzotint.backbones.kernels.depthwise import residual_depthwise


def plain_vectors(
    self: dimr_blocks.TimeVectors, tau: Tensor, label: Tensor | None = None
) -> tuple[Tensor, ...]:
    """One chain of small operations per vector, as published: without classes."""
    assert self.classes is None
    parts = zip(
        *(p.split(self.widths) for p in (self.p0, self.p1, self.w_minus_1, self.b)), strict=True
    )
    result = []
    for p0, p1, w, b in parts:
        s = torch.sigmoid((1 + w) * tau[:, None] + b)
        result.append(s * p0 + (1 - s) * p1)
    return tuple(result)


def plain_projection(
    features: Any, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, parts: Any
) -> Tensor:
    """Everything concatenated."""
    x = torch.cat(list(features), dim=-1)
    return F.linear(F.layer_norm(x, x.shape[-1:]) * gain + shift, weight, bias)


def copied_depthwise(x: Tensor, weight: Tensor, bias: Tensor, kernel: str) -> Tensor:
    """Layout copies around the convolution."""
    x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return residual_depthwise(x, weight, bias).contiguous()


def torch_depthwise(x: Tensor, weight: Tensor, bias: Tensor, kernel: str) -> Tensor:
    """The convolution with torch's own gradients."""
    padding = weight.shape[-1] // 2
    return x + F.conv2d(
        x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=len(weight)
    ).permute(0, 2, 3, 1)


def torch_norm(self: dimr_blocks.TimeRMSNorm, x: Tensor, gain: Tensor) -> Tensor:
    """The norm from torch's operations and their gradients."""
    return dimr_blocks.divide_by_rms(x) * gain


def joined_geglu(self: dimr_blocks.GEGLU, x: Tensor, *time: Tensor) -> Tensor:
    """Gate and value from one product."""
    gate, value = self.up(self.norm(x, *time)).chunk(2, dim=-1)
    return self.down(F.gelu(gate) * value)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Heads filled up with zeros to a multiple of 8."""
    d = q.shape[-1]
    q, k, v = (F.pad(t, (0, -d % 8)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale or d**-0.5)[..., :d]


def float_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """In float32, as the published code has it."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale)


def all_terms(self: diffit.DiffiT, c: Tensor) -> tuple[Tensor, Tensor]:
    """The dead key term too."""
    terms = self.temporal(c).view(-1, 3, self.config.depth, self.config.width).permute(1, 2, 0, 3)
    return terms[0], terms[1]


def fused_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """torch's fused attention with the bias as its mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


def written_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T + bias) written out."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias.to(q.dtype)).softmax(-1).to(
        v.dtype
    ) @ v


Swap = Callable[[], AbstractContextManager[Any]]
SWITCHES: list[tuple[str, str, Swap]] = [
    (
        "dimr",
        "time vectors one by one",
        lambda: patch.object(dimr_blocks.TimeVectors, "forward", plain_vectors),
    ),
    (
        "dimr",
        "cascade concatenated",
        lambda: patch.object(dimr_cascade, "normed_projection", plain_projection),
    ),
    (
        "dimr",
        "layout copies",
        lambda: patch.object(depthwise, "residual_depthwise", copied_depthwise),
    ),
    (
        "dimr",
        "depthwise gradients of torch",
        lambda: patch.object(depthwise, "residual_depthwise", torch_depthwise),
    ),
    ("dimr", "norm of torch", lambda: patch.object(dimr_blocks.TimeRMSNorm, "forward", torch_norm)),
    (
        "dimr",
        "GEGLU in one product",
        lambda: patch.object(dimr_blocks.GEGLU, "forward", joined_geglu),
    ),
    (
        "dimr",
        "attention fused",
        lambda: patch.object(dimr_blocks, "attention", F.scaled_dot_product_attention),
    ),
    ("dimr", "attention padded", lambda: patch.object(dimr_blocks, "attention", padded_attention)),
    (
        "dimr",
        "attention in float32",
        lambda: patch.object(dimr_blocks, "attention", float_attention),
    ),
    ("diffit", "dead key term", lambda: patch.object(diffit.DiffiT, "temporal_terms", all_terms)),
    ("diffit", "attention fused", lambda: patch.object(diffit, "biased_attention", fused_biased)),
    (
        "diffit",
        "attention written out",
        lambda: patch.object(diffit, "biased_attention", written_biased),
    ),
]
