"""simple diffusion's U-ViT (arXiv 2301.11093; specs/simple-diffusion.md section 6).

Convolutions down to 16x16, a transformer there, a skip per block on the convolutional levels alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor, nn

from mezzotint.backbones import (
    BASE,
    SMALL,
    Backbone,
    Family,
    Preset,
    native_side,
    native_size,
    registry,
)
from mezzotint.backbones.checkpointing import run_block
from mezzotint.backbones.inputs import check_input, input_factor, wavelet_at
from mezzotint.backbones.layers import (
    Conditioning,
    Down,
    Head,
    PositionEmbedding,
    ResBlock,
    Stem,
    TransformerBlock,
    Up,
)
from mezzotint.backbones.sizes import (
    Blocks,
    Channels,
    CheckedConfig,
    Classes,
    Dropout,
    Heads,
    Multiplier,
    Patch,
    Sides,
    TextWidth,
    Width,
)
from mezzotint.backbones.text_conditioning import TextConditioning, attention_mask
from mezzotint.core.fields import Range
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.prediction import named


@dataclass(frozen=True, kw_only=True)
class UViTConfig(CheckedConfig):
    """Hyper-parameters; the first four are every backbone's (see `Config`).

    size: (height, width), or one number for a square.
    width: channels at full resolution.
    multipliers: their factor, level by level, the last for the transformer.
    emb_dim: width of the conditioning.
    blocks: ResBlocks per convolutional level on the way down; the way up has one more.
    depth, heads: transformer blocks and their heads.
    dropout: probability, in blocks whose map at the native size has at most `dropout_from`² cells.
    transform, patch: input transform (none, dwt, conv) and its linear down-sampling factor.
    text_dim: width of the text embeddings (T5-XXL: 4096), 0 for none; see `TextConditioning`.
    position_std: standard deviation of the positions at initialisation (section 6: 0.01).
    augment_label: whether the network reads EDM's augmentation label; set by data.augment.
    """

    size: Sides
    channels: Channels = 3
    num_classes: Classes = 1000
    prediction: str = "v"
    width: Width = 128
    emb_dim: Width = 1024
    multipliers: tuple[Multiplier, ...] = (1, 2, 4, 16)
    blocks: tuple[Blocks, ...] = (2, 2, 2)
    depth: Blocks = 36
    heads: Heads = 4
    dropout: Dropout = 0.2
    dropout_from: Annotated[int, Range(0, 16_384)] = 16
    transform: str = "none"
    patch: Patch = 1
    text_dim: TextWidth = 0
    position_std: Annotated[float, Range(0, 100)] = 0.01
    augment_label: bool = False


class UViT(Backbone):
    """simple diffusion's U-ViT: (z, noise, cond) -> [output of z's shape], zero at initialisation.

    `noise` is the log-SNR (b,). Sides may differ; both must be multiples of `factor`. Positions are
    resized to the input.

    With 2 blocks down and 3 up per level the published size has 2.46 B parameters and 546 GMAC in
    its blocks. The third block on the way up takes the level's input as its skip, as in the U-Net
    (2 or 3 per level: [?], section 6).
    """

    def __init__(self, config: UViTConfig):
        super().__init__(config)
        c = config
        levels = len(c.blocks)
        if len(c.multipliers) != levels + 1:
            raise ValueError(
                f"multipliers need one entry per level of blocks and one for the transformer: {c}"
            )
        if c.text_dim and not c.depth:
            raise ValueError(f"text_dim {c.text_dim} needs a transformer block; set depth to 1")
        self.factor = input_factor(native_size(c), c.transform, c.patch, levels)
        widths = [c.width * m for m in c.multipliers]
        height, width = native_size(c)
        maps = [(height // (c.patch * 2**i), width // (c.patch * 2**i)) for i in range(levels + 1)]
        dropout = [c.dropout if h * w <= c.dropout_from**2 else 0.0 for h, w in maps]

        def res(i: int, count: int, skip: bool) -> nn.ModuleList:
            return nn.ModuleList(
                ResBlock(widths[i], c.emb_dim, dropout[i], skip) for _ in range(count)
            )

        self.conditioning = Conditioning(c.width, c.emb_dim, c.num_classes, c.augment_label)
        self.stem = Stem(c.channels, widths[0], c.transform, c.patch)
        self.down = nn.ModuleList(res(i, c.blocks[i], False) for i in range(levels))
        self.pool = nn.ModuleList(Down(widths[i], widths[i + 1]) for i in range(levels))
        self.positions = PositionEmbedding(widths[-1], maps[-1], c.position_std)
        self.words = TextConditioning(c.text_dim, widths[-1], c.emb_dim) if c.text_dim else None
        text_channels = widths[-1] if c.text_dim else 0
        self.middle = nn.ModuleList(
            TransformerBlock(widths[-1], c.emb_dim, c.heads, dropout[-1], text_channels)
            for _ in range(c.depth)
        )
        self.unpool = nn.ModuleList(Up(widths[i + 1], widths[i]) for i in range(levels))
        self.up = nn.ModuleList(res(i, c.blocks[i] + 1, True) for i in range(levels))
        self.head = Head(widths[0], c.channels, c.transform, c.patch)

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """(b, channels, h, w), log-SNR (b,) and conditions to one output of z's shape."""
        check_input(z, self.config.channels, self.factor)
        text_tokens = mask = pooled = None
        if self.words is not None:
            text_tokens, mask, pooled = self.words(cond, len(z))
        emb = self.conditioning(noise, cond, pooled)
        h = self.stem(z)
        skips: list[Tensor] = []
        for blocks, pool in zip(self.down, self.pool, strict=True):
            skips.append(h)
            for block in blocks.children():
                h = run_block(block, self.checkpointing, h, emb)
                skips.append(h)
            h = pool(h)
        h = self.positions(h)
        mask = None if mask is None else attention_mask(h.shape[2] * h.shape[3], mask)
        for block in self.middle:
            h = run_block(block, self.checkpointing, h, emb, text_tokens, mask)
        for i in reversed(range(len(self.up))):
            h = self.unpool[i](h)
            for block in self.up[i].children():
                h = run_block(block, self.checkpointing, h, emb, skips.pop())
        return [self.head(h)]


def parameterisation(config: UViTConfig) -> Parameterisation:
    """v by default; `noise` is the log-SNR, which the network embeds (section 2)."""
    return Parameterisation(kind=named(config.prediction), noise=lambda logsnr: logsnr)


def schedule(config: UViTConfig) -> Spec:
    """Cosine shifted to a reference of 64 pixels, the text's default (section 1).

    Smaller images are not shifted. An image that is no square counts as the square of its area, for
    which mean-pooling to the reference gains as much (our choice).
    """
    side = native_side(config)
    return Spec("cosine", {"image_d": side, "noise_d": min(64, side)})


_PAPER = "simple diffusion, arXiv 2301.11093"
_TEXT_PROTOCOL = "zero-shot FID of 30k samples for COCO captions; guidance and steps not known"
T5_XXL_WIDTH = 4096
_PROTOCOL = "FID of 50k samples against {} statistics, no guidance; NFE 1000 by a later table"
_NOTE = (
    "2 B or 2.5 B are both reported; 555 GMAC is reached with 3x3 convolutions around the "
    "resampling, where public transcriptions have 1x1 and so do we"
)


def _published(size: int, transform: str, patch: int, fid: str, against: str) -> Preset:
    return Preset(
        config=UViTConfig(size=size, transform=transform, patch=patch),
        paper=_PAPER,
        params="2 B",
        gmac="555",
        fid=fid,
        protocol=_PROTOCOL.format(against),
        note=_NOTE,
    )


def _text(size: tuple[int, int] | int, patch: int, fid: str | None = None) -> Preset:
    """Return a model of text to image: the U-ViT of the classes, with captions in their place."""
    return Preset(
        config=UViTConfig(
            size=size, num_classes=0, transform="dwt", patch=patch, text_dim=T5_XXL_WIDTH
        ),
        paper=f"{_PAPER}: text to image",
        fid=fid,
        protocol=_TEXT_PROTOCOL if fid else None,
        note="the paper names T5-XXL and three sizes; the network is that of the classes (our "
        "choice), and GMAC are without text",
    )


_TINY = UViTConfig(
    size=32,
    num_classes=10,
    width=16,
    emb_dim=128,
    multipliers=(1, 2, 8),
    blocks=(1, 1),
    depth=3,
    dropout=0.0,
)

registry.add(
    "uvit",
    Family(
        config=UViTConfig,
        module=UViT,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "uvit-128": _published(128, "none", 1, "3.23", "validation"),
            "uvit-256": _published(256, "dwt", 2, "2.77", "training"),
            "uvit-512": _published(512, "dwt", 4, "4.53", "validation"),
            "uvit-text-256": _text(256, 2, "8.30"),
            "uvit-text-512": _text(512, 4),
            "uvit-text-384x640": _text((384, 640), 4),
            "uvit-tiny": Preset(
                config=_TINY,
                at_size=(wavelet_at,),
                paper="laptop size of the same network; 16 to 64 pixels in minutes on a CPU",
            ),
            "uvit-small": Preset(
                config=replace(_TINY, size=64, width=64, emb_dim=256, depth=6, heads=8),
                at_size=(wavelet_at,),
                paper=SMALL,
            ),
            "uvit-base": Preset(
                config=replace(
                    _TINY, size=64, width=96, emb_dim=512, blocks=(2, 2), depth=12, heads=12
                ),
                at_size=(wavelet_at,),
                paper=BASE,
            ),
            "uvit-text-tiny": Preset(
                config=UViTConfig(
                    size=64,
                    num_classes=0,
                    prediction="x",
                    # The transformer alone, on patches. With a convolutional level around it, and
                    # with positions that start near zero, it did not learn from captions where
                    # things are in the first 19,000 images.
                    width=256,
                    emb_dim=256,
                    multipliers=(1,),
                    blocks=(),
                    depth=4,
                    dropout=0.0,
                    transform="conv",
                    patch=8,
                    text_dim=64,
                    position_std=0.5,
                ),
                paper="laptop size that reads captions instead of labels; T5 encoder of width 64",
            ),
        },
    ),
)
