"""SiD2's residual U-ViT (arXiv 2410.19324; specs/simple-diffusion.md section 9).

One long residual per down-sampling instead of a skip per block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor, nn

from mezzotint.backbones import BASE, SMALL, Backbone, Family, Preset, registry
from mezzotint.backbones.checkpointing import run_block
from mezzotint.backbones.inputs import check_input, convolution_at, input_factor
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
    Size,
    TextWidth,
    Width,
)
from mezzotint.backbones.text_conditioning import TextConditioning, attention_mask
from mezzotint.core.fields import Range
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.prediction import named


@dataclass(frozen=True, kw_only=True)
class SiD2Config(CheckedConfig):
    """Hyper-parameters; the first four are every backbone's (see `Config`).

    width: channels of the finest level.
    multipliers: their factor, level by level, the last for the middle.
    kinds: "res" or "transformer" for each level's blocks, like `multipliers`.
    emb_dim: width of the conditioning (not in the paper; simple diffusion's 1024).
    blocks: blocks per level above the middle, on the way down and again on the way up.
    depth: blocks of the middle.
    heads: of every transformer block (4 or 8 in the paper: [?]).
    dropout: probability, in blocks whose map at the native size is at most `dropout_from` wide.
    transform, patch: input transform (none, dwt, conv) and its linear down-sampling factor.
    text_dim: width of the text embeddings (T5-XXL: 4096), 0 for none; see `TextConditioning`.
    augment_label: whether the network reads EDM's augmentation label; set by data.augment.
    """

    size: Size
    channels: Channels = 3
    num_classes: Classes = 1000
    prediction: str = "v"
    width: Width = 128
    emb_dim: Width = 1024
    multipliers: tuple[Multiplier, ...] = (1, 2, 4, 8)
    kinds: tuple[str, ...] = ("res", "res", "transformer", "transformer")
    blocks: tuple[Blocks, ...] = (3, 3, 3)
    depth: Blocks = 16
    heads: Heads = 4
    dropout: Dropout = 0.1
    dropout_from: Annotated[int, Range(0, 16_384)] = 32
    transform: str = "none"
    patch: Patch = 1
    text_dim: TextWidth = 0
    augment_label: bool = False


class SiD2(Backbone):
    """SiD2's residual U-ViT: (z, noise, cond) -> [output of z's shape], zero at initialisation.

    p are the features before a down-sampling, q those after it. On the way up h <- up(h - q) + p,
    without bias: if the middle does nothing, the decoder starts from p. Each transformer level has
    its own learned positions, added right after the down-sampling (before q is taken: our choice)
    and resized for other inputs. The convolutions of the resampling are 1x1 (section 9 leaves 1x1
    or 3x3 open: our choice).

    `noise` is the log-SNR (b,). Sides may differ; both must be multiples of `factor`.
    """

    def __init__(self, config: SiD2Config):
        super().__init__(config)
        c = config
        levels = len(c.blocks)
        if not len(c.multipliers) == len(c.kinds) == levels + 1:
            raise ValueError(
                f"multipliers and kinds need one entry per level and one for the middle: {c}"
            )
        if unknown := set(c.kinds) - {"res", "transformer"}:
            raise ValueError(f"unknown kinds of block {sorted(unknown)}; known: res, transformer")
        counts = zip(c.kinds, (*c.blocks, c.depth), strict=True)
        if c.text_dim and not any(kind == "transformer" and count for kind, count in counts):
            raise ValueError(
                f"text_dim {c.text_dim} needs a transformer block, and kinds, blocks and depth "
                "give none"
            )
        self.factor = input_factor((c.size, c.size), c.transform, c.patch, levels)
        widths = [c.width * m for m in c.multipliers]
        sides = [c.size // c.patch // 2**i for i in range(levels + 1)]
        dropout = [c.dropout if side <= c.dropout_from else 0.0 for side in sides]

        # The transformer blocks of every level read the same tokens.
        text_channels = widths[-1] if c.text_dim else 0

        def stack(i: int, count: int) -> nn.ModuleList:
            if c.kinds[i] == "res":
                return nn.ModuleList(
                    ResBlock(widths[i], c.emb_dim, dropout[i]) for _ in range(count)
                )
            return nn.ModuleList(
                TransformerBlock(widths[i], c.emb_dim, c.heads, dropout[i], text_channels)
                for _ in range(count)
            )

        self.conditioning = Conditioning(c.width, c.emb_dim, c.num_classes, c.augment_label)
        self.stem = Stem(c.channels, widths[0], c.transform, c.patch)
        self.positions = nn.ModuleList(
            PositionEmbedding(widths[i], (sides[i], sides[i]))
            if c.kinds[i] == "transformer"
            else nn.Identity()
            for i in range(levels + 1)
        )
        self.down = nn.ModuleList(stack(i, c.blocks[i]) for i in range(levels))
        self.pool = nn.ModuleList(Down(widths[i], widths[i + 1]) for i in range(levels))
        self.middle = stack(levels, c.depth)
        self.words = TextConditioning(c.text_dim, widths[-1], c.emb_dim) if c.text_dim else None
        self.unpool = nn.ModuleList(Up(widths[i + 1], widths[i], bias=False) for i in range(levels))
        self.up = nn.ModuleList(stack(i, c.blocks[i]) for i in range(levels))
        self.head = Head(widths[0], c.channels, c.transform, c.patch)

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """(b, channels, h, w), log-SNR (b,) and conditions to one output of z's shape."""
        check_input(z, self.config.channels, self.factor)
        tokens = mask = pooled = None
        if self.words is not None:
            tokens, mask, pooled = self.words(cond, len(z))
        emb = self.conditioning(noise, cond, pooled)
        h = self.positions[0](self.stem(z))
        residuals: list[tuple[Tensor, Tensor]] = []
        for i, blocks in enumerate(self.down):
            h = self._run(i, blocks, h, emb, tokens, mask)
            p = h
            q = h = self.positions[i + 1](self.pool[i](p))
            residuals.append((p, q))
        h = self._run(len(self.down), self.middle, h, emb, tokens, mask)
        for i in reversed(range(len(self.up))):
            p, q = residuals.pop()
            h = self.unpool[i](h - q) + p
            h = self._run(i, self.up[i], h, emb, tokens, mask)
        return [self.head(h)]

    def _run(
        self,
        level: int,
        blocks: nn.Module,
        h: Tensor,
        emb: Tensor,
        tokens: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Run the blocks of a level; those of a transformer read the text too."""
        text = ()
        if mask is not None and self.config.kinds[level] == "transformer":
            text = tokens, attention_mask(h.shape[2] * h.shape[3], mask)
        for block in blocks.children():
            h = run_block(block, self.checkpointing, h, emb, *text)
        return h


def parameterisation(config: SiD2Config) -> Parameterisation:
    """v by default; `noise` is the log-SNR, which the network embeds (section 2)."""
    return Parameterisation(kind=named(config.prediction), noise=lambda logsnr: logsnr)


def schedule(config: SiD2Config) -> Spec:
    """Interpolated between references of 32 pixels and the image's own size, bounds -10 and 10.

    Section 1 states this at 512. Other sizes, and the order of the two ends, are our reading.
    """
    low, high = min(32, config.size), config.size
    return Spec(
        "cosine_interpolated",
        {
            "image_d": config.size,
            "noise_d_low": low,
            "noise_d_high": high,
            "logsnr_min": -10.0,
            "logsnr_max": 10.0,
        },
    )


def _published(
    size: int, transform: str, patch: int, gmac: str, fid: str, certainty: str = ""
) -> Preset:
    return Preset(
        config=SiD2Config(
            size=size, transform=transform, patch=patch, dropout_from=size // patch // 4
        ),
        paper="Simpler Diffusion (SiD2), arXiv 2410.19324",
        gmac=gmac,
        fid=fid,
        protocol="FID of 50k samples, guidance interval on, 512 steps; "
        "scale and interval are not known",
        note=f"GMAC are of the blocks alone: no stem, resampling, FiLM or head{certainty}",
    )


_TINY = SiD2Config(
    size=32,
    num_classes=10,
    width=16,
    emb_dim=128,
    multipliers=(1, 2, 4, 8),
    kinds=("res", "res", "transformer", "transformer"),
    blocks=(1, 1, 1),
    depth=3,
    dropout=0.0,
)
_LARGER = replace(_TINY, size=64, blocks=(2, 2, 2))

registry.add(
    "sid2",
    Family(
        config=SiD2Config,
        module=SiD2,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "sid2-128": _published(
                128, "none", 1, "137", "1.26", "; the FID at 128 is a recollection"
            ),
            "sid2-256": _published(256, "conv", 2, "137", "1.73"),
            "sid2-512": _published(512, "conv", 4, "137", "2.19"),
            "sid2-256-flop": _published(256, "none", 1, "653", "1.38"),
            "sid2-512-flop": _published(512, "conv", 2, "653", "1.48"),
            "sid2-tiny": Preset(
                config=_TINY,
                at_size=(convolution_at,),
                paper="laptop size of the same network; 16 to 64 pixels in minutes on a CPU",
            ),
            "sid2-small": Preset(
                config=replace(_LARGER, width=48, emb_dim=256, depth=6, heads=6),
                at_size=(convolution_at,),
                paper=SMALL,
            ),
            "sid2-base": Preset(
                config=replace(_LARGER, width=96, emb_dim=512, depth=10, heads=12),
                at_size=(convolution_at,),
                paper=BASE,
            ),
        },
    ),
)
