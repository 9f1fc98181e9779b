# ruff: noqa: D102  (every class says what its call does)
"""Plain simple diffusion U-ViT and its loss, from specs/simple-diffusion.md sections 2, 5 and 6.

The baseline of the speed ratios, and what the tests compare `mezzotint.backbones.uvit` with.
Attention scores are materialised, tokens and maps are copied into each other's layout, and the loss
compares noises. Parameter names are those of our network, so that weights load unchanged.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with bias, 32 groups or as many as leave 4 channels to each."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


class FiLM(nn.Module):
    """h (1 + scale) + shift, both from the conditioning vector."""

    def __init__(self, emb: int, channels: int):
        super().__init__()
        self.linear = nn.Linear(emb, 2 * channels)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.linear(emb).chunk(2, dim=1)
        shape = (len(h), -1, 1, 1) if h.ndim == 4 else (len(h), 1, scale.shape[1])
        return h * (1 + scale.reshape(shape)) + shift.reshape(shape)


class ResBlock(nn.Module):
    """n = Norm(h); n = (n + Norm'(skip)) / sqrt 2; swish, conv, Norm, FiLM, swish, conv; h + n."""

    def __init__(self, channels: int, emb: int, skip: bool):
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.norm_skip = norm(channels) if skip else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = FiLM(emb, channels)

    def forward(self, h: Tensor, emb: Tensor, skip: Tensor | None) -> Tensor:
        n = self.norm1(h)
        if skip is not None:
            n = (n + self.norm_skip(skip)) / math.sqrt(2)
        n = self.conv1(F.silu(n))
        n = F.silu(self.film(self.norm2(n), emb))
        return h + self.conv2(n)


class Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt d) v) of the normalised tokens, q and k normalised per head."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, bias=False)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.norm_q, self.norm_k = nn.LayerNorm(channels // heads), nn.LayerNorm(channels // heads)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.norm_q(q) / math.sqrt(c // self.heads), self.norm_k(k)
        weights = torch.softmax(q @ k.transpose(2, 3), dim=-1)
        return x + self.out((weights.to(v.dtype) @ v).transpose(1, 2).reshape(b, n, c))


class TransformerBlock(nn.Module):
    """First the MLP with FiLM before its swish, then attention."""

    def __init__(self, channels: int, emb: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, bias=False)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.film = FiLM(emb, 4 * channels)
        self.attention = Attention(channels, heads)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = x + self.down(F.silu(self.film(self.up(self.norm(x)), emb)))
        return self.attention(x)


class Conditioning(nn.Module):
    """swish(MLP(sinusoid(1000 u)) + embedding(label)), u the cosine schedule's time."""

    def __init__(self, width: int, emb: int, num_classes: int):
        super().__init__()
        self.width = width
        self.noise = nn.Sequential(nn.Linear(width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if num_classes:
            self.label = nn.Embedding(num_classes + 1, emb)

    def forward(self, logsnr: Tensor, label: Tensor | None) -> Tensor:
        u = 2 / math.pi * torch.atan(torch.exp(-logsnr.clip(-20, 20) / 2))
        frequency = 10000 ** (-torch.arange(self.width // 2, device=u.device) / (self.width // 2))
        angle = 1000 * u[:, None] * frequency
        emb = self.noise(torch.cat([torch.sin(angle), torch.cos(angle)], dim=1))
        return F.silu(emb if label is None else emb + self.label(label))


class Conv(nn.Module):
    """A convolution under the name `conv`, as stems, heads and resamplings hold theirs."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class Head(nn.Module):
    """Norm, swish, 3x3 convolution."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.norm = norm(width)
        self.conv = nn.Conv2d(width, channels, 3, padding=1)


class Table(nn.Module):
    """Learned positions under the name `table`."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.table = nn.Parameter(0.01 * torch.randn(1, channels, side, side))


class PlainUViT(nn.Module):
    """forward(z, logsnr, label) -> v, for a config without input transform and without dropout."""

    def __init__(self, config):
        super().__init__()
        c, levels = config, len(config.blocks)
        assert c.transform == "none", "the plain twin has no input transform"
        widths = [c.width * m for m in c.multipliers]
        self.conditioning = Conditioning(c.width, c.emb_dim, c.num_classes)
        self.stem = Conv(c.channels, widths[0], 3)
        self.down = nn.ModuleList(
            nn.ModuleList(ResBlock(widths[i], c.emb_dim, False) for _ in range(c.blocks[i]))
            for i in range(levels)
        )
        self.pool = nn.ModuleList(Conv(widths[i], widths[i + 1], 1) for i in range(levels))
        self.positions = Table(widths[-1], c.size // 2**levels)
        self.middle = nn.ModuleList(
            TransformerBlock(widths[-1], c.emb_dim, c.heads) for _ in range(c.depth)
        )
        self.unpool = nn.ModuleList(Conv(widths[i + 1], widths[i], 1) for i in range(levels))
        self.up = nn.ModuleList(
            nn.ModuleList(ResBlock(widths[i], c.emb_dim, True) for _ in range(c.blocks[i] + 1))
            for i in range(levels)
        )
        self.head = Head(widths[0], c.channels)

    def forward(self, z: Tensor, logsnr: Tensor, label: Tensor | None) -> Tensor:
        emb = self.conditioning(logsnr, label)
        h = self.stem.conv(z)
        skips = []
        for blocks, pool in zip(self.down, self.pool, strict=True):
            skips.append(h)
            for block in blocks:
                h = block(h, emb, None)
                skips.append(h)
            h = pool.conv(F.avg_pool2d(h, 2))
        h = h + self.positions.table
        b, c, height, width = h.shape
        x = h.reshape(b, c, height * width).permute(0, 2, 1).contiguous()
        for block in self.middle:
            x = block(x, emb)
        h = x.permute(0, 2, 1).reshape(b, c, height, width).contiguous()
        for unpool, blocks in zip(reversed(self.unpool), reversed(self.up), strict=True):
            h = F.interpolate(unpool.conv(h), scale_factor=2, mode="nearest")
            for block in blocks:
                h = block(h, emb, skips.pop())
        return self.head.conv(F.silu(self.head.norm(h)))


def loss(net: PlainUViT, x: Tensor, eps: Tensor, logsnr: Tensor, label: Tensor | None) -> Tensor:
    """Section 2: v is predicted; the squared error of eps_hat = sigma z + alpha v, unweighted."""
    alpha = torch.sqrt(torch.sigmoid(logsnr))[:, None, None, None]
    sigma = torch.sqrt(torch.sigmoid(-logsnr))[:, None, None, None]
    z = alpha * x + sigma * eps
    v = net(z, logsnr, label)
    return ((eps - (sigma * z + alpha * v)) ** 2).mean(dim=(1, 2, 3))
