"""Plain latent DiffiT: every term of the paper's equations written out.

The baseline of the speed ratios, and what the tests compare `mezzotint.backbones.diffit` with. It
materialises softmax(q k^T + B), gathers B in every block, computes the temporal key although
softmax cancels it, and projects the condition in every block. Written from specs/diffit.md alone,
which lists the keys of the published state dict.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_FEATURES = 256


def holder(**members: nn.Module | Tensor) -> Any:
    """Return a module that does nothing but hold its members under the keys of the state dict."""
    module = nn.Module()
    for key, member in members.items():
        if isinstance(member, nn.Module | nn.Parameter):
            setattr(module, key, member)
        else:
            module.register_buffer(key, member)
    return module


def layer_norm(tokens: Tensor) -> Tensor:
    """Normalise without weights."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def grid_positions(side: int, width: int) -> Tensor:
    """Return (1, side^2, width): the column's sines and cosines, then the row's."""
    k = torch.arange(width // 4, dtype=torch.float64)
    coordinate = torch.arange(side, dtype=torch.float64)
    angle = torch.outer(coordinate, 10000 ** (-4 * k / width))
    code = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    columns, rows = code.repeat(side, 1), code.repeat_interleave(side, 0)
    return torch.cat([columns, rows], 1).float()[None]


def bias_rows(window: int) -> Tensor:
    """Return (n, n), n = window^2: the row of the bias table for each query and key."""
    cell = torch.arange(window**2)
    down = (cell // window)[:, None] - cell // window
    across = (cell % window)[:, None] - cell % window
    return (down + window - 1) * (2 * window - 1) + across + window - 1


def time_features(noise: Tensor) -> Tensor:
    """Return the cosines and sines of the network's number."""
    k = torch.arange(TIME_FEATURES // 2, dtype=torch.float32, device=noise.device)
    angle = torch.outer(noise.float(), torch.exp(k * (-math.log(10000) / len(k))))
    return torch.cat([angle.cos(), angle.sin()], 1)


class PlainDiffiT(nn.Module):
    """forward(z, noise, label) -> one output, for a `mezzotint.backbones.diffit.DiffiTConfig`."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = c = config
        self.side = c.size // c.patch
        self.window = c.window or self.side
        self.out_channels = c.channels * (1 + c.learned_variance)
        hidden, table = round(c.mlp_ratio * c.width), (2 * self.window - 1) ** 2
        self.pos_embed = nn.Parameter(grid_positions(self.side, c.width), requires_grad=False)
        self.x_embedder = holder(proj=nn.Conv2d(c.channels, c.width, c.patch, stride=c.patch))
        self.t_embedder = holder(
            mlp=nn.Sequential(
                nn.Linear(TIME_FEATURES, c.width), nn.SiLU(), nn.Linear(c.width, c.width)
            )
        )
        self.y_embedder = holder(embedding_table=nn.Embedding(c.num_classes + 1, c.width))
        self.blocks = nn.ModuleList(
            holder(
                attn=holder(
                    relative_position_bias_table=nn.Parameter(torch.zeros(table, c.heads)),
                    relative_position_index=bias_rows(self.window),
                    qkv_temb=nn.Linear(c.width, 3 * c.width),
                    qkv=nn.Linear(c.width, 3 * c.width),
                    proj=nn.Linear(c.width, c.width),
                ),
                mlp=holder(fc2=nn.Linear(hidden, c.width), fc1=nn.Linear(c.width, hidden)),
            )
            for _ in range(c.depth)
        )
        self.final_layer = holder(linear=nn.Linear(c.width, c.patch**2 * self.out_channels))

    def forward(self, z: Tensor, noise: Tensor, label: Tensor) -> Tensor:
        """z (b, channels, size, size), noise (b,), label (b,) to (b, out_channels, size, size)."""
        features = time_features(noise).to(self.t_embedder.mlp[0].weight.dtype)
        condition = self.y_embedder.embedding_table(label) + self.t_embedder.mlp(features)
        tokens = self.pos_embed + self.x_embedder.proj(z).flatten(2).mT
        for block in self.blocks:
            # eq. 7: h = x + TMSA(LN(x), c)
            windows = self.cut_windows(layer_norm(tokens))
            c = condition.repeat_interleave(len(windows) // len(tokens), 0)
            tokens = self.join_windows(self.tmsa(block.attn, windows, c)) + tokens
            # eq. 8: y = h + MLP(LN(h))
            hidden = F.gelu(block.mlp.fc1(layer_norm(tokens)), approximate="tanh")
            tokens = block.mlp.fc2(hidden) + tokens
        cells = self.final_layer.linear(F.silu(layer_norm(tokens)))
        p = self.config.patch
        cells = cells.unflatten(2, (p, p, -1)).unflatten(1, (self.side, self.side))
        return torch.einsum("bhwpqc->bchpwq", cells).reshape(len(z), -1, *z.shape[2:])

    def tmsa(self, attn: Any, tokens: Tensor, c: Tensor) -> Tensor:
        """Eq. 3 to 6 on windows (b, n, width) with one condition each, (b, width)."""
        n, heads = tokens.shape[1], self.config.heads
        mixed = attn.qkv_temb(c)[:, None] + attn.qkv(tokens)
        q, k, v = mixed.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        rows = attn.relative_position_bias_table[attn.relative_position_index.flatten()]
        bias = rows.view(n, n, heads).permute(2, 0, 1)
        weights = (bias + q / q.shape[-1] ** 0.5 @ k.mT).softmax(-1)
        return attn.proj((weights @ v).transpose(1, 2).flatten(2))

    def cut_windows(self, tokens: Tensor) -> Tensor:
        """(b, side^2, d) to (b windows, window^2, d), the windows of an image in a row."""
        w, count = self.window, self.side // self.window
        if count == 1:
            return tokens
        cut = tokens.unflatten(1, (count, w, count, w)).transpose(2, 3)
        return cut.flatten(3, 4).flatten(0, 2)

    def join_windows(self, windows: Tensor) -> Tensor:
        """The inverse of `cut_windows`."""
        w, count = self.window, self.side // self.window
        if count == 1:
            return windows
        cut = windows.unflatten(0, (-1, count, count)).unflatten(3, (w, w))
        return cut.transpose(2, 3).flatten(1, 4)
