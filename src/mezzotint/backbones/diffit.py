"""Latent DiffiT: a transformer whose attention depends on the noise level.

DiffiT, arXiv 2312.02139; specs/diffit.md sections 1 and 2.

    q = x W_qs + c W_qt     k = x W_ks + c W_kt     v = x W_vs + c W_vt                (eq. 3-5)
    TMSA(x, c) = proj(softmax(q k^T / sqrt(d) + B) v)                                  (eq. 6)
    h = x + TMSA(LN(x), c)        y = h + MLP(LN(h))                                   (eq. 7-8)

c is one vector per image, MLP(sin-cos(noise)) + Emb(label). B is a learned bias per relative
position, block and head.

Softmax ignores what is constant over the keys, and its rows sum to one. So c W_kt has no effect,
and c W_vt is one vector added to every token:
TMSA = proj(softmax((q_s + q_t) k_s^T / sqrt(d) + B) v_s + v_t). This file computes that. W_kt (37 M
of the 561 M parameters) is kept because the authors' checkpoints contain it: it is the last third
of `temporal.weight` and `temporal.bias`, and its gradient is exactly zero.

At other than the native size, positions and bias tables are interpolated linearly: the image keeps
its extent and is cut into more or fewer tokens. With a `window` the tables fit as they are. The
interpolation is our choice; the authors publish one size per network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mezzotint.backbones import Backbone, Family, Preset, registry
from mezzotint.backbones.checkpointing import run_block
from mezzotint.backbones.inputs import check_input, check_sides, label_rows
from mezzotint.backbones.sizes import (
    Channels,
    CheckedConfig,
    Classes,
    Depth,
    Heads,
    Patch,
    Ratio,
    Size,
    Width,
    Window,
)
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.logsnr import widest_float
from mezzotint.process.prediction import named
from mezzotint.process.schedules.ddpm import Table, linear_ddpm

FREQUENCIES = 256  # width of the sin-cos embedding before its MLP


@dataclass(frozen=True, kw_only=True)
class DiffiTConfig(CheckedConfig):
    """Hyper-parameters of latent DiffiT.

    size, channels: of the latents. num_classes: class labels; the null label comes on top.
    prediction: what the output predicts, by name.
    patch: latent cells per token side. width, depth, heads: of the transformer.
    mlp_ratio: hidden width of the MLP over `width`.
    window: tokens per side of an attention window; None is global attention, as published.
    learned_variance: the output has twice the channels, prediction first.
    """

    size: Size = 32
    channels: Channels = 4
    num_classes: Classes = 1000
    prediction: str = "eps"
    patch: Patch = 2
    width: Width = 1152
    depth: Depth = 28
    heads: Heads = 16
    mlp_ratio: Ratio = 4.0
    window: Window | None = None
    learned_variance: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of 4 and heads {self.heads}")
        check_sides(self.size, self.size, self.tile)

    @property
    def tile(self) -> int:
        """What the sides of the latents must be multiples of: a patch, or a window of patches."""
        return self.patch * (self.window or 1)

    @property
    def table_side(self) -> int:
        """Tokens per side of the square of a bias table: the window, or the whole native grid."""
        return self.window or self.size // self.patch


def time_embedding(noise: Float[Tensor, " b"], width: int) -> Float[Tensor, "b {width}"]:
    """Return [cos, sin] of `noise` at frequencies 10000^(-i / (width/2)), float32 (section 2)."""
    half = width // 2
    frequency = torch.exp(
        -math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=noise.device)
    )
    angle = noise.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def sincos_positions(
    height: int, width: int, side: int, channels: int, device: torch.device | None = None
) -> Float[Tensor, "1 {height}*{width} {channels}"]:
    """Return the fixed 2-D positions of a grid, row-major (section 2).

    The first half of the channels encodes the column, the second the row, each as [sin, cos] at
    frequencies 10000^(-k / (channels/4)). The coordinates run over 0...side-1, whatever the grid's
    height and width. float64; float32 on MPS.
    """
    dtype = widest_float(device or torch.get_default_device())
    k = torch.arange(channels // 4, dtype=dtype, device=device)
    frequency = 10000.0 ** (-k / (channels // 4))

    def code(coordinate: Tensor) -> Tensor:
        angle = coordinate.reshape(-1, 1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    # The device is given: after transformers has loaded a model, linspace may no longer follow
    # `with torch.device(...)`.
    rows = torch.linspace(0, side - 1, height, dtype=dtype, device=k.device)
    columns = torch.linspace(0, side - 1, width, dtype=dtype, device=k.device)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([code(column), code(row)], dim=1)[None]


def relative_index(
    height: int, width: int, device: torch.device | None = None
) -> Int[Tensor, " ({height}*{width})**2"]:
    """Return the row of the bias table for every (query, key) of a window, query-major.

    Swin's indexing (section 1): (r_i - r_j + h - 1)(2w - 1) + (c_i - c_j + w - 1).
    """
    r = torch.arange(height, device=device)
    c = torch.arange(width, device=device)
    row = (r[:, None] - r + height - 1) * (2 * width - 1)
    column = c[:, None] - c + width - 1
    return (row[:, None, :, None] + column[None, :, None, :]).reshape(-1)


def resize_table(
    table: Float[Tensor, "(2*{side}-1)**2 heads"], side: int, height: int, width: int
) -> Float[Tensor, "(2*{height}-1)*(2*{width}-1) heads"]:
    """Resize a bias table of side x side windows to height x width windows, bilinearly.

    Displacements 1-side ... side-1 are mapped onto 1-height ... height-1: zero stays zero, and the
    ends stay the ends.
    """
    old = 2 * side - 1
    wide = torch.promote_types(table.dtype, torch.float32)

    # Linear interpolation as a matrix (2 new_side - 1, old).
    def hat(new_side: int) -> Tensor:
        displacement = torch.arange(1 - new_side, new_side, dtype=wide, device=table.device)
        coordinate = displacement * ((side - 1) / max(new_side - 1, 1)) + side - 1
        return (
            1 - (coordinate[:, None] - torch.arange(old, dtype=wide, device=table.device)).abs()
        ).clamp(min=0)

    grid = table.to(wide).view(old, old, -1)
    resized = torch.einsum("ai,bj,ijh->abh", hat(height), hat(width), grid)
    return resized.flatten(0, 1).to(table.dtype)


def gather_bias(
    table: Float[Tensor, "m heads"], index: Int[Tensor, " {tokens}**2"], tokens: int
) -> Tensor:
    """Return (1, heads, tokens, tokens), contiguous in the keys as fused kernels need it."""
    return table.t().index_select(1, index).view(1, -1, tokens, tokens)


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + bias) v for (b, heads, n, d) and bias (1, heads, n, n)."""
    # One core: without gradients the fused CPU kernel is 1.3-2x faster in float32. For a bias that
    # needs gradients torch has no fused CPU kernel; its fallback is 1.1-2.3x slower than the
    # products written out. In bf16 these are 1.6x faster than the fused kernel at 256 tokens, and
    # as fast at 1024, where memory decides.
    bias = bias.to(q.dtype)
    trained = torch.is_grad_enabled() and bias.requires_grad
    if q.device.type == "cpu" and (trained or (q.dtype == torch.bfloat16 and q.shape[-2] <= 512)):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.add_(bias).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class TimeMLP(nn.Module):
    """Linear, SiLU, Linear on the sin-cos embedding of the noise level: (b,) -> (b, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, noise: Tensor) -> Tensor:
        """(b,) of any float dtype to (b, width) of the weights' dtype."""
        embedding = time_embedding(noise, FREQUENCIES).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(embedding)))


class TMSA(nn.Module):
    """Time-dependent self-attention within windows, with relative-position bias (eq. 3-6)."""

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # outputs (3, heads, width / heads)
        self.proj = nn.Linear(width, width)
        self.bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.bias_table, std=0.02)

    def forward(self, x: Tensor, q_t: Tensor, v_t: Tensor, bias: Tensor) -> Tensor:
        """Attend within windows: x (b, windows, tokens, width) to the same shape.

        q_t, v_t: (b, width). bias: (1, heads, tokens, tokens).
        """
        b, windows, n, width = x.shape
        # The bias joins the time vectors: attention's weights sum to one, so what is added to all
        # values passes unchanged, and what is added to all keys cancels in the softmax. So its
        # gradient needs no sum over the tokens of its own.
        q_bias, _, v_bias = self.qkv.bias.chunk(3)
        q, k, v = F.linear(x, self.qkv.weight).view(b, windows, n, 3, self.heads, -1).unbind(3)
        q = q + (q_t + q_bias).to(q.dtype).view(b, 1, 1, self.heads, -1)
        q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
        out = biased_attention(q, k, v, bias).transpose(1, 2).reshape(b, windows, n, width)
        return self.proj(out + (v_t + v_bias).to(out.dtype).view(b, 1, 1, width))


class Block(nn.Module):
    """h = x + TMSA(LN(x)), y = h + MLP(LN(h)); norms without weights (eq. 7-8, section 1)."""

    def __init__(self, width: int, heads: int, side: int, hidden: int):
        super().__init__()
        self.attn = TMSA(width, heads, side)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(
        self, x: Tensor, q_t: Tensor, v_t: Tensor, index: Tensor, side: int, window: tuple[int, int]
    ) -> Tensor:
        """x (b, windows, tokens, width) to the same shape.

        q_t, v_t: (b, width). index: `relative_index` of `window`. side: of the native window.
        """
        table = self.attn.bias_table
        if window != (side, side):
            table = resize_table(table, side, *window)
        x = x + self.attn(layer_norm(x), q_t, v_t, gather_bias(table, index, x.shape[2]))
        return x + self.fc2(F.gelu(self.fc1(layer_norm(x)), approximate="tanh"))


def layer_norm(x: Tensor) -> Tensor:
    """Normalise over the last dimension, without weights, epsilon 1e-6 (section 1).

    In float32 or wider. On a CPU torch would keep the statistics of bfloat16 in bfloat16.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.layer_norm(wide, x.shape[-1:], eps=1e-6).to(x.dtype)


class DiffiT(Backbone):
    """Latent DiffiT; see `DiffiTConfig`."""

    def __init__(self, config: DiffiTConfig):
        super().__init__(config)
        c = config
        # The product c W_kt of every block, which has no effect.
        self.skipped_macs = c.depth * c.width**2
        grid = c.size // c.patch
        self.out_channels = c.channels * (2 if c.learned_variance else 1)
        self.patch = nn.Conv2d(c.channels, c.width, c.patch, c.patch)
        # A parameter without gradient, not a buffer: the authors store and count it (561.330 M).
        self.positions = nn.Parameter(
            sincos_positions(grid, grid, grid, c.width).to(torch.get_default_dtype()),
            requires_grad=False,
        )
        self.time = TimeMLP(c.width)
        self.label = nn.Embedding(c.num_classes + 1, c.width)
        # Rows (part, block, width), parts q, v and the unused k: one product serves every block.
        self.temporal = nn.Linear(c.width, 3 * c.depth * c.width)
        block = c.width, c.heads, c.table_side, round(c.mlp_ratio * c.width)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(c.depth))
        self.final = nn.Linear(c.width, c.patch**2 * self.out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights (section 2): Xavier, N(0, 0.02) for label and time, final zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # Xavier's bound of one block's (3 width, width), not of all blocks together.
        bound = (6 / (4 * self.config.width)) ** 0.5
        nn.init.uniform_(self.temporal.weight, -bound, bound)
        nn.init.xavier_uniform_(self.patch.weight.view(self.config.width, -1))
        nn.init.zeros_(self.patch.get_parameter("bias"))
        for weight in (self.label.weight, self.time.fc1.weight, self.time.fc2.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.final.weight)

    def condition(self, noise: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c"]:
        """Return c = MLP(sin-cos(noise)) + Emb(label); no label is the null label."""
        if cond.text is not None:
            raise ValueError("DiffiT takes labels, not text")
        label = label_rows(cond.label, self.config.num_classes, noise.shape[0], noise.device)
        return self.time(noise) + self.label(label)

    def temporal_terms(self, c: Float[Tensor, "b c"]) -> tuple[Tensor, Tensor]:
        """Return q_t and v_t of every block, each (depth, b, width); k_t has no effect."""
        depth, width = self.config.depth, self.config.width
        live = 2 * depth * width
        terms = F.linear(c, self.temporal.weight[:live], self.temporal.bias[:live])
        q, v = terms.view(-1, 2, depth, width).permute(1, 2, 0, 3).unbind(0)
        return q, v

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """Return (1, tokens, width): stored positions on the native grid, computed on others."""
        side = self.config.size // self.config.patch
        if grid == (side, side):
            return self.positions
        positions = sincos_positions(*grid, side, self.config.width, self.positions.device)
        return positions.to(self.positions.dtype)

    def forward(
        self, z: Float[Tensor, "b c h w"], noise: Float[Tensor, " b"], cond: Cond
    ) -> list[Tensor]:
        """Return [prediction], with the variance stacked on its channels where it is learned.

        Args:
            z: height and width multiples of patch (times window).
            noise: index into the 1000-step table, 0 (clean) to 999, not necessarily whole.
            cond: labels in 0...num_classes, or none.
        """
        check_input(z, self.config.channels, self.config.tile)
        b, p = z.shape[0], self.config.patch
        rows, columns = z.shape[-2] // p, z.shape[-1] // p
        h, w = (self.config.window, self.config.window) if self.config.window else (rows, columns)
        q_t, v_t = self.temporal_terms(self.condition(noise, cond))
        x = self.patch(z).flatten(2).transpose(1, 2) + self.positions_for((rows, columns))
        # From here to the output tokens stay in window order: all but attention works per token.
        x = x.view(b, rows // h, h, columns // w, w, -1).transpose(2, 3)
        x = x.reshape(b, -1, h * w, self.config.width).contiguous()
        index = relative_index(h, w, z.device)
        for i, block in enumerate(self.blocks):
            inputs = x, q_t[i], v_t[i], index, self.config.table_side, (h, w)
            x = run_block(block, self.checkpointing, *inputs)
        # Section 2, final layer: LN, SiLU, Linear; patches are (row, column, channel).
        out = self.final(F.silu(layer_norm(x)))
        out = out.view(b, rows // h, columns // w, h, w, p, p, self.out_channels)
        out = out.permute(0, 7, 1, 3, 5, 2, 4, 6)
        return [out.reshape(b, self.out_channels, rows * p, columns * p)]


def parameterisation(config: DiffiTConfig) -> Parameterisation:
    """The output is eps as published; `noise` is the index into DDPM's linear table."""
    # The table needs values, also where the network is built on the meta device.
    with torch.device("cpu"):
        table = linear_ddpm()
    assert isinstance(table, Table)
    return Parameterisation(
        kind=named(config.prediction), noise=table.index, learned_variance=config.learned_variance
    )


def schedule(config: DiffiTConfig) -> Spec:
    """ADM's 1000 steps, beta 1e-4 ... 0.02 (section 5)."""
    return Spec("linear_ddpm", {})


registry.add(
    "diffit",
    Family(
        config=DiffiTConfig,
        module=DiffiT,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "diffit-256": Preset(
                config=DiffiTConfig(size=32),
                paper="DiffiT (arXiv 2312.02139), ImageNet 256x256 latents, "
                "depth 28 as released (the paper says 30)",
                codec="sd-vae-ft-ema",
                params="561 M",
                gmac="114",
                fid="1.73",
                protocol="FID-50K, ADM evaluator; ancestral, 250 of 1000 steps; "
                "power-cosine guidance 4.4 (paper: 4.6)",
                note="The paper's 114 G leaves out the two attention products (4.23 G). "
                "37.19 M parameters, the temporal keys, have no effect; they are counted and kept "
                "but not computed.",
            ),
            "diffit-512": Preset(
                config=DiffiTConfig(size=64),
                paper="DiffiT (arXiv 2312.02139), ImageNet 512x512 latents, "
                "depth 28 as released (the paper says 30)",
                codec="sd-vae-ft-ema",
                fid="2.67",
                protocol="FID-50K, ADM evaluator; ancestral, 250 of 1000 steps; "
                "constant guidance 1.49",
                note="The paper states neither size nor cost at 512. 37.19 M parameters, the "
                "temporal keys, have no effect; they are counted and kept but not computed.",
            ),
            "diffit-latent-tiny": Preset(
                config=DiffiTConfig(size=16, num_classes=10, width=128, depth=6, heads=4),
                paper="none: latent DiffiT that trains on a laptop, on latents of 128x128 images",
                codec="sd-vae-ft-ema",
            ),
        },
    ),
)
