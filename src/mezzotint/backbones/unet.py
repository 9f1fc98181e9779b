"""simple diffusion's U-Net (arXiv 2301.11093; specs/simple-diffusion.md section 4).

Most blocks, and the dropout, are at 16x16. The paper lists blocks and widths. The inside of a
block is our choice: section 6's ResBlock with additive skips, and section 6's attention, after each
ResBlock of a level that has it and between the two ResBlocks of the middle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor, nn

from mezzotint.backbones import BASE, SMALL, Backbone, Family, Preset, registry
from mezzotint.backbones.checkpointing import run_block
from mezzotint.backbones.inputs import check_input, input_factor, wavelet_at
from mezzotint.backbones.layers import Attention, Conditioning, Down, Head, ResBlock, Stem, Up
from mezzotint.backbones.sizes import (
    Blocks,
    Channels,
    CheckedConfig,
    Classes,
    Dropout,
    Heads,
    Multiplier,
    Patch,
    Size,
    Width,
)
from mezzotint.core.fields import Range
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.prediction import named


@dataclass(frozen=True, kw_only=True)
class UNetConfig(CheckedConfig):
    """Hyper-parameters; the first four are every backbone's (see `Config`).

    width: channels at full resolution; multipliers: their factor, level by level.
    emb_dim: width of the conditioning.
    blocks: ResBlocks per level on the way down; the way up has one more.
    attention: per level, whether self-attention follows each ResBlock. heads: of that attention.
    dropout: probability, in blocks whose map at the native size is at most `dropout_from` wide.
    transform, patch: input transform (none, dwt, conv) and its linear down-sampling factor.
    augment_label: whether the network reads EDM's augmentation label; set by data.augment.
    """

    size: Size
    channels: Channels = 3
    num_classes: Classes = 1000
    prediction: str = "v"
    width: Width = 128
    emb_dim: Width = 1024
    multipliers: tuple[Multiplier, ...] = (1, 2, 4, 8, 8)
    blocks: tuple[Blocks, ...] = (3, 4, 4, 12, 4)
    attention: tuple[bool, ...] = (False, False, False, True, True)
    heads: Heads = 4
    dropout: Dropout = 0.1
    dropout_from: Annotated[int, Range(0, 16_384)] = 16
    transform: str = "none"
    patch: Patch = 1
    augment_label: bool = False


class Block(nn.Module):
    """ResBlock, then self-attention over the map where the level has it."""

    def __init__(self, res: ResBlock, attention: Attention | None):
        super().__init__()
        self.res = res
        self.attention = attention

    def forward(self, h: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """(b, c, h, w) to the same shape."""
        h = self.res(h, emb, skip)
        return h if self.attention is None else self.attention(h)


class UNet(Backbone):
    """simple diffusion's U-Net: (z, noise, cond) -> [output of z's shape], zero at initialisation.

    `noise` is the log-SNR (b,). Sides may differ; both must be multiples of `factor`.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        c = config
        levels = len(c.multipliers)
        if not levels:
            raise ValueError("multipliers is empty; give one per level")
        if not len(c.blocks) == len(c.attention) == levels:
            raise ValueError(f"multipliers, blocks and attention must be equally long: {c}")
        self.factor = input_factor((c.size, c.size), c.transform, c.patch, levels - 1)
        widths = [c.width * m for m in c.multipliers]

        def block(level: int, skip: bool, attention: bool) -> Block:
            dropout = c.dropout if c.size // c.patch // 2**level <= c.dropout_from else 0.0
            return Block(
                ResBlock(widths[level], c.emb_dim, dropout, skip),
                Attention(widths[level], c.heads) if attention else None,
            )

        self.conditioning = Conditioning(c.width, c.emb_dim, c.num_classes, c.augment_label)
        self.stem = Stem(c.channels, widths[0], c.transform, c.patch)
        self.down = nn.ModuleList(
            nn.ModuleList(block(i, False, c.attention[i]) for _ in range(c.blocks[i]))
            for i in range(levels)
        )
        self.pool = nn.ModuleList(Down(widths[i], widths[i + 1]) for i in range(levels - 1))
        self.middle = nn.ModuleList(
            [block(levels - 1, False, True), block(levels - 1, False, False)]
        )
        self.up = nn.ModuleList(
            nn.ModuleList(block(i, True, c.attention[i]) for _ in range(c.blocks[i] + 1))
            for i in range(levels)
        )
        self.unpool = nn.ModuleList(Up(widths[i + 1], widths[i]) for i in range(levels - 1))
        self.head = Head(widths[0], c.channels, c.transform, c.patch)

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """(b, channels, h, w), log-SNR (b,) and conditions to one output of z's shape."""
        check_input(z, self.config.channels, self.factor)
        emb = self.conditioning(noise, cond)
        h = self.stem(z)
        skips: list[Tensor] = []
        for i, blocks in enumerate(self.down):
            # A level's input is a skip too: the way up has one block more than the way down.
            skips.append(h)
            for block in blocks.children():
                h = run_block(block, self.checkpointing, h, emb)
                skips.append(h)
            if i < len(self.pool):
                h = self.pool[i](h)
        for block in self.middle:
            h = run_block(block, self.checkpointing, h, emb)
        for i, blocks in reversed(list(enumerate(self.up))):
            for block in blocks.children():
                h = run_block(block, self.checkpointing, h, emb, skips.pop())
            if i > 0:
                h = self.unpool[i - 1](h)
        return [self.head(h)]


def parameterisation(config: UNetConfig) -> Parameterisation:
    """v by default; `noise` is the log-SNR, which the network embeds (section 2)."""
    return Parameterisation(kind=named(config.prediction), noise=lambda logsnr: logsnr)


def schedule(config: UNetConfig) -> Spec:
    """Cosine shifted to a reference of 32 pixels, the best of the paper's ablation [M].

    Smaller images are not shifted.
    """
    return Spec("cosine", {"image_d": config.size, "noise_d": min(32, config.size)})


_256 = {
    "multipliers": (1, 1, 2, 4, 8, 8),
    "blocks": (1, 2, 2, 4, 12, 4),
    "attention": (False, False, False, False, True, True),
}
_PAPER = "simple diffusion, arXiv 2301.11093"
_PROTOCOL = (
    "FID of 50k samples against validation statistics, no guidance; NFE 1000 by a later table"
)
_NOTE = (
    "block lists are recollections of the paper; "
    "it prints neither parameters nor GMAC of the U-Nets"
)

_TINY = UNetConfig(
    size=32,
    num_classes=10,
    width=16,
    emb_dim=128,
    multipliers=(1, 2, 4),
    blocks=(1, 1, 1),
    attention=(False, False, True),
    heads=4,
    dropout=0.0,
)
_LARGER = replace(
    _TINY,
    size=64,
    multipliers=(1, 2, 4, 4),
    blocks=(1, 2, 3, 3),
    attention=(False, False, True, True),
)

registry.add(
    "unet",
    Family(
        config=UNetConfig,
        module=UNet,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "unet-128": Preset(
                config=UNetConfig(size=128),
                paper=_PAPER,
                fid="2.88",
                protocol=_PROTOCOL,
                note=_NOTE,
            ),
            "unet-256": Preset(
                config=UNetConfig(size=256, **_256),
                paper=_PAPER,
                fid="3.71",
                protocol=_PROTOCOL,
                note=_NOTE,
            ),
            "unet-512": Preset(
                config=UNetConfig(size=512, transform="dwt", patch=2, **_256),
                paper=_PAPER,
                fid="4.28",
                protocol=_PROTOCOL,
                note=f"{_NOTE}; at 512 it is the list of 256 behind one wavelet level, "
                "the least certain",
            ),
            "unet-tiny": Preset(
                config=_TINY,
                at_size=(wavelet_at,),
                paper="laptop size of the same network; "
                "digits of 16 to 64 pixels in minutes on a CPU",
            ),
            "unet-mini": Preset(
                config=replace(
                    _TINY,
                    size=64,
                    multipliers=(1, 2, 4, 8),
                    blocks=(1, 1, 2, 2),
                    attention=(False, False, False, True),
                ),
                at_size=(wavelet_at,),
                paper="none: the network of `eurosat-64`, for hours on a CPU; 64 to 256 pixels",
            ),
            "unet-small": Preset(
                config=replace(_LARGER, width=64, emb_dim=256), at_size=(wavelet_at,), paper=SMALL
            ),
            "unet-base": Preset(
                config=replace(_LARGER, width=128, emb_dim=512, heads=8),
                at_size=(wavelet_at,),
                paper=BASE,
            ),
        },
    ),
)
