# ruff: noqa: D102  (every class says what its call does)
"""Plain latent DiffiT: the network as its paper and specs/diffit.md describe it, with the authors' key names.

The baseline of every ratio and the oracle of every fast path in `mezzotint.backbones.diffit`: softmax(Q K^T + B) is
materialised, B is gathered in every block, the temporal key that softmax cancels is computed, and every block projects
the condition itself. Transcribed from the specification alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """x_embedder: a convolution of kernel and stride p; tokens row-major."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedder(nn.Module):
    """t_embedder: 256 sin-cos features, Linear, SiLU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.exp(
            -math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128
        )
        angle = t[:, None].float() * frequency[None]
        return self.mlp(
            torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1).to(self.mlp[0].weight.dtype)
        )


class LabelEmbedder(nn.Module):
    """y_embedder: one row per class and one for none."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """TMSA (eq. 3-6), every term of it."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.scale = (width // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        position = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        offset = position[:, :, None] - position[:, None, :] + window - 1
        self.register_buffer("relative_position_index", offset[0] * (2 * window - 1) + offset[1])
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv_temb = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        b, n, width = x.shape
        qkv = self.qkv(x) + self.qkv_temb(c)[:, None]
        q, k, v = qkv.reshape(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(
            n, n, self.heads
        )
        attention = (q * self.scale) @ k.transpose(-2, -1) + bias.permute(2, 0, 1)[None]
        out = torch.softmax(attention, dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, width))


class Mlp(nn.Module):
    """fc1, tanh-GELU, fc2."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Eq. 7-8; windows, where smaller than the grid, are cut out around the attention."""

    def __init__(self, width: int, heads: int, window: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, window)
        self.mlp = Mlp(width, round(width * mlp_ratio))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = x + self.windowed(self.norm1(x), c)
        return x + self.mlp(self.norm2(x))

    def windowed(self, x: Tensor, c: Tensor) -> Tensor:
        b, n, width = x.shape
        w, side = self.attn.window, math.isqrt(n)
        m = side // w
        if m == 1:
            return self.attn(x, c)
        x = x.view(b, m, w, m, w, width).permute(0, 1, 3, 2, 4, 5).reshape(b * m * m, w * w, width)
        x = self.attn(x, c.repeat_interleave(m * m, dim=0))
        return x.view(b, m, m, w, w, width).permute(0, 1, 3, 2, 4, 5).reshape(b, n, width)


class FinalLayer(nn.Module):
    """LN without weights, SiLU, Linear."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.silu(self.norm_final(x)))


def positions(side: int, width: int) -> Tensor:
    """Columns in the first half of the channels, rows in the second, each [sin, cos]."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    codes = []
    for coordinate in (torch.arange(side * side) % side, torch.arange(side * side) // side):
        angle = coordinate.double()[:, None] * frequency[None]
        codes += [torch.sin(angle), torch.cos(angle)]
    return torch.cat(codes, dim=1).float()[None]


class DiffiT(nn.Module):
    """Arguments are those of `mezzotint.backbones.diffit.DiffiTConfig`; called as (x, t, y)."""

    def __init__(self, config):
        super().__init__()
        c = config
        side = c.size // c.patch
        self.patch, self.out_channels = c.patch, c.channels * (2 if c.learned_variance else 1)
        self.x_embedder = PatchEmbed(c.channels, c.patch, c.width)
        self.t_embedder = TimeEmbedder(c.width)
        self.y_embedder = LabelEmbedder(c.num_classes, c.width)
        self.pos_embed = nn.Parameter(positions(side, c.width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.window or side, c.mlp_ratio) for _ in range(c.depth)
        )
        self.final_layer = FinalLayer(c.width, c.patch**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x)
        side, p = math.isqrt(x.shape[1]), self.patch
        x = x.view(-1, side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * p, side * p)
