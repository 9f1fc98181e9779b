"""JiT: a plain transformer on large patches of pixels that predicts the clean image.

"Back to basics: let denoising generative models denoise", arXiv 2511.13720; specs/jit.md.

    z = t x + (1 - t) e,  e ~ N(0, s^2)      s = size / 256, t = 1 clean              (section 1)
    h = x + gate Attention(RMSNorm(x) (1 + scale) + shift)
    y = h + gate SwiGLU(RMSNorm(h) (1 + scale) + shift)                               (section 3)

(shift, scale, gate) are linear in SiLU(c), c = MLP(sin-cos(t)) + Emb(label). Before block
`context_start`, tokens that repeat the label's embedding are prepended; they are dropped before the
head. With a patch of size / 16 every resolution costs the same 256 tokens.

At other than the native size the image keeps its extent and is cut into more or fewer tokens: fixed
and rotary positions run over the same range (our choice; the authors publish one size per network).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.backbones import SMALL, Backbone, Family, Preset, registry
from mezzotint.backbones.checkpointing import run_block
from mezzotint.backbones.diffit import TimeMLP, sincos_positions
from mezzotint.backbones.inputs import check_input, check_sides, label_rows, patch_at
from mezzotint.backbones.layers import AugmentEmbedding, attention, zero_init
from mezzotint.backbones.sizes import (
    Channels,
    CheckedConfig,
    Classes,
    Depth,
    Dropout,
    Heads,
    Patch,
    Size,
    TextWidth,
    Width,
)
from mezzotint.backbones.text_conditioning import TextConditioning, add_text, attention_mask
from mezzotint.core.fields import Range
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.logsnr import widest_float
from mezzotint.process.prediction import named

THETA = 10_000.0  # base of the rotary frequencies


@dataclass(frozen=True, kw_only=True)
class JiTConfig(CheckedConfig):
    """Hyper-parameters; the first four are every backbone's (see `Config`).

    patch: pixels per token side; size / 16 in the paper.
    width, depth, heads: of the transformer.
    bottleneck: channels between the two linear maps of the patch embedding.
    context_tokens: tokens that repeat the label. context_start: block before which they are added.
    dropout: probability in the middle half of the blocks, on the attention and on what the
        projections read and give.
    noise_scale: standard deviation s of the noise where images are in [-1, 1]; size / 256.
    text_dim: width of the text embeddings (T5-XXL: 4096), 0 for none; see `TextConditioning`. Their
        mean is added to the label's embedding, which the context tokens repeat.
    augment_label: whether the network reads EDM's augmentation label; set by data.augment.
    """

    size: Size = 256
    channels: Channels = 3
    num_classes: Classes = 1000
    prediction: str = "x"
    patch: Patch = 16
    width: Width = 768
    depth: Depth = 12
    heads: Heads = 12
    bottleneck: Width = 128
    context_tokens: Annotated[int, Range(1, 4096)] = 32
    context_start: Annotated[int, Range(0, 1024)] = 4
    dropout: Dropout = 0.0
    noise_scale: Annotated[float, Range(1e-3, 1000, "a standard deviation")] = 1.0
    text_dim: TextWidth = 0
    augment_label: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # Two halves of a head (rows, columns), each in pairs; the fixed positions in quarters.
        if self.width % 4 or self.width % self.heads or self.width // self.heads % 4:
            fit = [h for h in range(1, 65) if self.width % (4 * h) == 0]
            raise ValueError(
                f"width {self.width} over heads {self.heads} must be a multiple of 4; "
                + (f"heads that fit: {fit}" if fit else "take a width that is a multiple of 4")
            )
        if self.context_start >= self.depth:
            raise ValueError(
                f"context_start {self.context_start} must be a block of depth {self.depth}, "
                f"0 to {self.depth - 1}"
            )
        check_sides(self.size, self.size, self.patch)

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU: two thirds of 4 width, rounded down."""
        return 8 * self.width // 3


def flow_time(logsnr: Tensor, noise_scale: float) -> Tensor:
    """Return JiT's t in (0, 1), 1 clean, of a log-SNR of the unit-variance process; any shape."""
    # specs/jit.md section 1: t = sigmoid(l / 2 + ln s), since alpha / sigma = t / ((1 - t) s).
    return torch.sigmoid(logsnr / 2 + math.log(noise_scale))


def rotary_table(
    rows: int, columns: int, side: int, head_width: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the 2-D rotary positions, each (rows columns, head_width).

    The first half of a head turns with the row, the second with the column, pairs of neighbouring
    channels by the same angle. The coordinates run over 0 ... side - 1 whatever the grid. float32.
    """
    half = head_width // 2
    dtype = widest_float(device or torch.get_default_device())
    k = torch.arange(0, half, 2, dtype=dtype, device=device)
    frequency = THETA ** (-k / half)  # section 3

    def angles(count: int) -> Tensor:
        coordinate = torch.linspace(0, side - 1, count, dtype=dtype, device=k.device)
        return (coordinate[:, None] * frequency).repeat_interleave(2, dim=1)

    row = angles(rows)[:, None].expand(rows, columns, half)
    column = angles(columns)[None].expand(rows, columns, half)
    angle = torch.cat([row, column], -1).flatten(0, 1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels: x (b, heads, n, d), tables (n, d)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return x * cosine.to(x.dtype) + turned * sine.to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift for tokens (b, n, d) and vectors (b, d)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) times a weight, over the last dimension."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        # Under autocast x may be narrower than the weight, with FSDP wider.
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        weight = self.weight.to(wide)
        return F.rms_norm(x.to(wide), self.weight.shape, weight, 1e-6).to(x.dtype)


class Block(nn.Module):
    """Attention with rotary positions and SwiGLU, both modulated by the condition (section 3)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float, text: bool = False):
        super().__init__()
        self.heads = heads
        self.norm1 = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(width // heads)
        self.norm_k = RMSNorm(width // heads)
        self.text = nn.Linear(width, 2 * width, bias=False) if text else None
        self.proj = nn.Linear(width, width)
        self.norm2 = RMSNorm(width)
        self.up = nn.Linear(width, 2 * hidden)  # the gated half first
        self.down = nn.Linear(hidden, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.dropout = nn.Dropout(dropout)

    def attend(
        self, x: Tensor, cosine: Tensor, sine: Tensor, text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """(b, n, width) to the same shape; see `forward`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if self.text is not None and text is not None:
            k, v = add_text(k, v, self.text, text)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        n = x.shape[1]
        q = rotate(self.norm_q(q), cosine[:n], sine[:n]).to(v.dtype)
        k = rotate(self.norm_k(k), cosine, sine).to(v.dtype)
        if self.training and self.dropout.p:
            p = self.dropout.p
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        else:
            mixed = attention(q, k, v, mask)
        return self.dropout(self.proj(mixed.transpose(1, 2).flatten(2)))

    def forward(
        self,
        x: Tensor,
        active: Tensor,
        cosine: Tensor,
        sine: Tensor,
        text: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x (b, n, width) to the same shape.

        active: SiLU(c), (b, width). cosine, sine: (n + t, width / heads), 1 and 0 for context and
        text tokens. text: (b, t, width), if any. mask: of `attention_mask`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(active).chunk(6, 1)
        mixed = self.attend(modulate(self.norm1(x), shift1, scale1), cosine, sine, text, mask)
        x = torch.addcmul(x, gate1[:, None], mixed)
        gated, plain = self.up(modulate(self.norm2(x), shift2, scale2)).chunk(2, -1)
        return torch.addcmul(x, gate2[:, None], self.down(self.dropout(F.silu(gated) * plain)))


class JiT(Backbone):
    """JiT: (z, t, cond) -> [x of z's shape], zero at initialisation; see `JiTConfig`."""

    def __init__(self, config: JiTConfig):
        super().__init__(config)
        c = config
        grid = c.size // c.patch
        self.patch = nn.Sequential(
            nn.Conv2d(c.channels, c.bottleneck, c.patch, c.patch, bias=False),
            nn.Conv2d(c.bottleneck, c.width, 1),
        )
        # A parameter without gradient, not a buffer: the authors store and count it.
        self.positions = nn.Parameter(
            sincos_positions(grid, grid, grid, c.width).to(torch.get_default_dtype()),
            requires_grad=False,
        )
        self.context_positions = nn.Parameter(torch.empty(1, c.context_tokens, c.width))
        self.time = TimeMLP(c.width)
        self.label = nn.Embedding(c.num_classes + 1, c.width)
        self.augment = AugmentEmbedding(c.width) if c.augment_label else None
        self.words = TextConditioning(c.text_dim, c.width, c.width) if c.text_dim else None
        middle = range(c.depth // 4, c.depth // 4 * 3)
        self.blocks = nn.ModuleList(
            Block(c.width, c.heads, c.hidden, c.dropout if i in middle else 0.0, c.text_dim > 0)
            for i in range(c.depth)
        )
        self.norm = RMSNorm(c.width)
        self.modulation = nn.Linear(c.width, 2 * c.width)
        self.head = nn.Linear(c.width, c.patch**2 * c.channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights (section 3): Xavier, N(0, 0.02) for label, time, context; gates zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        normal = (self.label.weight, self.time.fc1.weight, self.time.fc2.weight)
        for weight in (*normal, self.context_positions):
            nn.init.normal_(weight, std=0.02)
        zero_init(self.modulation)
        zero_init(self.head)
        for block in self.blocks:
            assert isinstance(block, Block)
            zero_init(block.modulation)

    def no_decay_parameters(self) -> set[str]:
        """Return the names of positions, norms and biases; the paper has no decay at all."""
        return {n for n, p in self.named_parameters() if p.ndim == 1 or "positions" in n}

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
        """Return [prediction] of z's shape.

        Args:
            z: height and width multiples of the patch.
            noise: t in (0, 1), 1 clean.
            cond: labels in 0...num_classes, or none; text for a network with text_dim.
        """
        c = self.config
        if cond.text is not None and self.words is None:
            raise ValueError(
                "text was given to a network without text input; pass a label or no condition"
            )
        check_input(z, c.channels, c.patch)
        b, grid = z.shape[0], (z.shape[-2] // c.patch, z.shape[-1] // c.patch)
        label = self.label(label_rows(cond.label, c.num_classes, b, z.device))
        tokens = mask = None
        if self.words is not None:
            tokens, mask, pooled = self.words(cond, b)
            label = label + pooled
        active = self.time(noise) + label
        active = F.silu(active if self.augment is None else active + self.augment(cond, b))
        x = self.patch(z).flatten(2).transpose(1, 2) + self.positions_for(grid)
        context = label[:, None] + self.context_positions
        cosine, sine = rotary_table(*grid, c.size // c.patch, c.width // c.heads, z.device)
        # Context and text tokens are not turned: angle 0. The text stands behind the image.
        if tokens is not None:
            behind = (0, 0, 0, tokens.shape[1])
            cosine, sine = F.pad(cosine, behind, value=1.0), F.pad(sine, behind)
        for i, block in enumerate(self.blocks):
            if i == c.context_start:
                x = torch.cat([context.to(x.dtype), x], 1)
                cosine = torch.cat([cosine.new_ones(c.context_tokens, cosine.shape[1]), cosine])
                sine = torch.cat([sine.new_zeros(c.context_tokens, sine.shape[1]), sine])
            text = () if mask is None else (tokens, attention_mask(x.shape[1], mask))
            x = run_block(block, self.checkpointing, x, active, cosine, sine, *text)
        shift, scale = self.modulation(active).chunk(2, 1)
        out = self.head(modulate(self.norm(x[:, c.context_tokens :]), shift, scale))
        # Patches are (row, column, channel).
        out = out.view(b, *grid, c.patch, c.patch, c.channels).permute(0, 5, 1, 3, 2, 4)
        return [out.reshape(z.shape)]


def parameterisation(config: JiTConfig) -> Parameterisation:
    """x as published; `noise` is t, and the input has the scale of z = t x + (1 - t) e."""
    s = config.noise_scale

    def scale(logsnr: Tensor) -> Tensor:
        # specs/jit.md section 1: sqrt(t^2 + (1 - t)^2 s^2)
        t = flow_time(logsnr, s)
        noise = torch.sigmoid(-logsnr / 2 - math.log(s)) * s
        return (t.square() + noise.square()).sqrt()  # ONNX has no hypot

    return Parameterisation(
        kind=named(config.prediction), noise=lambda logsnr: flow_time(logsnr, s), scale=scale
    )


def schedule(config: JiTConfig) -> Spec:
    """t = sigmoid(-0.8 + 0.8 n), n normal: a log-normal sigma of mean 0.8 + ln s (section 1)."""
    return Spec("lognormal", {"mean": 0.8 + math.log(config.noise_scale), "std": 0.8})


def tokens_at(size: int) -> dict[str, object]:
    """Return config fields: a patch that leaves at most 16 cells on a side."""
    return {"patch": patch_at(size, cells=16)}


def noise_at(size: int) -> dict[str, object]:
    """Return config fields: the scale of the noise; 1 below 256 pixels (our choice)."""
    return {"noise_scale": max(1.0, size / 256)}


_PAPER = "JiT, arXiv 2511.13720"
_B = JiTConfig()
_L = JiTConfig(width=1024, depth=24, heads=16, context_start=8)
_H = JiTConfig(width=1280, depth=32, heads=16, context_start=10, bottleneck=256, dropout=0.2)
_G = replace(_H, width=1664, depth=40)


def _published(config: JiTConfig, size: int, fid: str, note: str = "") -> Preset:
    return Preset(
        config=replace(config, size=size, patch=size // 16, noise_scale=size / 256),
        paper=_PAPER,
        fid=fid,
        protocol="FID-50K, 50 images per class, Heun in z, 50 steps, guided above t = 0.1; "
        f"600 epochs{note}",
    )


_TINY = JiTConfig(
    size=32,
    num_classes=10,
    patch=2,
    width=128,
    depth=6,
    heads=4,
    bottleneck=32,
    context_tokens=8,
    context_start=2,
)

registry.add(
    "jit",
    Family(
        config=JiTConfig,
        module=JiT,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "jit-b-256": _published(_B, 256, "3.66"),
            "jit-l-256": _published(_L, 256, "2.36"),
            "jit-h-256": _published(_H, 256, "1.86"),
            "jit-g-256": _published(_G, 256, "1.82", " (about 320)"),
            "jit-b-512": _published(_B, 512, "4.02"),
            "jit-l-512": _published(_L, 512, "2.53"),
            "jit-h-512": _published(_H, 512, "1.94"),
            "jit-g-512": _published(_G, 512, "1.78", " (about 320)"),
            "jit-b-1024": _published(_B, 1024, "4.82"),
            "jit-tiny": Preset(
                config=_TINY,
                at_size=(tokens_at, noise_at),
                paper="none: JiT that trains on a laptop; 256 tokens at any size",
            ),
            "jit-small": Preset(
                config=replace(
                    _TINY,
                    size=64,
                    patch=4,
                    width=384,
                    depth=10,
                    heads=6,
                    bottleneck=96,
                    context_tokens=16,
                    context_start=3,
                ),
                at_size=(tokens_at, noise_at),
                paper=SMALL,
            ),
        },
    ),
)
