# ruff: noqa: D101, D102  (the published names; the docstring below speaks for all)
"""Plain DiMR, with the operations of the published code: the baseline of the speed ratios.

The tests compare `mezzotint.backbones.dimr` with it. Attention is in float32, every block is
checkpointed, each time-dependent parameter is computed by itself and stored on its module, each
forward synchronises with the device, the cascade's input is concatenated, and layouts are permuted
around every depthwise convolution. State-dict names are the official ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TDP(nn.Module):
    def __init__(self, dim: int, initial: float):
        super().__init__()
        self.param0 = nn.Parameter(torch.full((dim,), initial))
        self.param1 = nn.Parameter(torch.full((dim,), initial))
        self.nodecay_weight = nn.Parameter(torch.zeros(dim))
        self.nodecay_bias = nn.Parameter(torch.zeros(dim))
        self.current: Tensor | None = None

    def seed_time(self, tau: Tensor) -> None:
        s = torch.sigmoid((1 + self.nodecay_weight) * tau[:, None] + self.nodecay_bias)
        self.current = s * self.param0 + (1 - s) * self.param1

    def forward(self, ndim: int) -> Tensor:
        b, d = self.current.shape
        return self.current.view(b, *[1] * (ndim - 2), d)


class TimeLayerNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = TDP(dim, 1.0)
        self.bias = TDP(dim, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * self.weight(x.ndim) + self.bias(x.ndim)


class TimeRMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = TDP(dim, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8) * self.scale(x.ndim)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8) * self.scale


class AdaRMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (
            x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
            * (1 + self.linear(x[:, 0]))[:, None]
        )


NORMS = {"LN": TimeLayerNorm, "TDRMSN": TimeRMSNorm, "RMSN": RMSNorm, "ADARMSN": AdaRMSNorm}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, norm: str):
        super().__init__()
        self.heads = heads
        self.norm = NORMS[norm](dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.dense = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.query_key_value(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (
            t.view(b, n, self.heads, d // self.heads).transpose(1, 2).float() for t in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.dense(out.transpose(1, 2).reshape(b, n, d))


class GEGLU(nn.Module):
    def __init__(self, dim: int, hidden: int, norm: str):
        super().__init__()
        self.norm = NORMS[norm](dim)
        self.w0 = nn.Linear(dim, hidden)
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x)) * self.w1(x))


class ChannelLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous()


class ChannelFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2).contiguous()


class Block(nn.Module):
    def __init__(self, kind: str, dim: int, hidden: int, heads: int, kernel: int, norm: str):
        super().__init__()
        if kind == "transformer":
            self.block1 = Attention(dim, heads, norm)
        else:
            depthwise = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
            self.block1 = nn.Sequential(ChannelFirst(), depthwise, ChannelLast())
        self.block2 = GEGLU(dim, hidden, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block1(x)
        return x + self.block2(x)


class Positions(nn.Module):
    def __init__(self, size: int, dim: int):
        super().__init__()
        self.size = size
        self.position_embeddings = nn.Embedding(size * size, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        rows = torch.arange(h, device=x.device)[:, None] * self.size + torch.arange(
            w, device=x.device
        )
        return x + self.position_embeddings(rows)


class Kernel(nn.Module):
    def __init__(self, dim_in: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.kernel = nn.Linear(dim_in, dim * ratio**2)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        r = self.ratio
        x = self.kernel(x).reshape(b, h, w, r, r, -1).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h * r, w * r, -1)


class Stage(nn.Module):
    def __init__(self, config, i: int):
        super().__init__()
        c, patch, dim = config, config.patches[i], config.dims[i]
        self.kind = c.stages[i]
        conv = nn.Conv2d(c.channels, dim, patch, stride=patch)
        self.input_layer = nn.Sequential(
            nn.Identity(), conv, ChannelLast(), Positions(c.size // patch, dim)
        )
        if self.kind == "transformer":
            self.class_embeds = nn.Embedding(c.rows, dim)
        if i > 0:
            dim_in = c.dims[i - 1] * (2 * (c.depths[i - 1] // 2) + 2)
            shuffle = Kernel(dim_in, dim, c.patches[i - 1] // patch)
            self.upsample = nn.Sequential(TimeLayerNorm(dim_in), shuffle, TimeLayerNorm(dim))
        k = c.depths[i] // 2
        self.blocks = nn.ModuleList(
            Block(self.kind, dim, c.hidden_dims[i], c.heads, c.kernel_size, c.norm)
            for _ in range(2 * k + 1)
        )
        self.skip_denses = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(k))
        self.output_layer = nn.Sequential(
            TimeLayerNorm(dim), ChannelFirst(), nn.Conv2d(dim, c.channels, 3, padding=1)
        )

    def forward(self, image: Tensor, coarser: Tensor | None, y: Tensor | None, checkpointing: bool):
        x = self.input_layer(image)
        if coarser is not None:
            x = x + self.upsample(coarser)
        b, h, w, d = x.shape
        token = self.kind == "transformer"
        if token:
            x = torch.cat([self.class_embeds(y)[:, None], x.reshape(b, h * w, d)], dim=1)
        external, stack, k = [x], [], len(self.skip_denses)
        for j, block in enumerate(self.blocks):
            if j > k:
                x = self.skip_denses[j - k - 1](torch.cat([x, stack.pop()], dim=-1))
            x = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
            external.append(x)
            if j < k:
                stack.append(x)
        external = [(e[:, 1:].reshape(b, h, w, d) if token else e) for e in external]
        return torch.cat(external, dim=-1), self.output_layer(external[-1])


class PlainDiMR(nn.Module):
    """forward(x, log_snr, y) -> predictions, coarse to fine.

    `log_snr` is the published code's name for 8 n / 1000 - 4.

    Args:
        config: a `DiMRConfig`. checkpointing: the published code cannot switch it off.
    """

    def __init__(self, config, checkpointing: bool = True):
        super().__init__()
        self.checkpointing = checkpointing
        self.stages = nn.ModuleList(Stage(config, i) for i in range(len(config.dims)))

    def forward(self, x: Tensor, log_snr: Tensor, y: Tensor | None) -> list[Tensor]:
        tau = log_snr / 4
        if torch.all(tau == tau[0]):  # the published code's shortcut, and its synchronisation
            tau = tau[:1]
        for module in self.modules():
            if isinstance(module, TDP):
                module.seed_time(tau)
        features, outputs = None, []
        for stage in self.stages:
            features, out = stage(x, features, y, self.checkpointing)
            outputs.append(out)
        return outputs
