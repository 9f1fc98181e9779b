"""Image-space DiffiT: a U-Net of residual cells, each a convolution and a windowed DiffiT block.

DiffiT, arXiv 2312.02139; specs/diffit.md section 4.

    x_hat = Conv3x3(Swish(GN(x)))       out = x + Block(x_hat, c)        (eq. 9-10)

Block and TMSA are those of `diffit.py`. Tokens are the pixels of the feature map. Attention stays
within windows that do not shift, and positions enter through the relative bias alone. The authors
published neither code nor weights of this network. Where the paper contradicts itself we read:

    blocks per stage    4 everywhere (appendix H.1); I.1's 1,2,2,2 are read as EDM's multipliers
    channels            FFHQ-64: 128, 256, 256, 256 (table S.2, its 16x16x128 read as 256, as in
                        figure 4); CIFAR-10: 128, 256, 256 (I.1: doubled between the first two
                        stages only)
    window              8 for FFHQ-64, 4 for CIFAR-10 (I.1)
    widths              time 512, first features 128 (section 5.1's prose, read as EDM's 4 x 128)

Where it says nothing we choose: 4 heads; MLP ratio 4; layer norms without weights, as in the latent
network; gcd(32, C/4) groups (EDM: the smaller of the two); a 1x1 convolution as the outer skip
where channels change; skips between encoder and decoder concatenated, one per resolution, after
up-sampling; down-sampling by a 3x3 convolution of stride 2, which starts as the mean of 2x2 pixels;
up-sampling by nearest neighbour and a 3x3 convolution, which starts as the identity; dropout (off
by default; EDM trains with 0.13 and 0.05) between Swish and convolution, where EDM has it; labels,
and EDM's augmentation label through a linear map without bias, added to the time vector.
Projections that end a residual branch, and the head, start at zero.

No checkpoint needs the temporal key W_kt, which softmax cancels (see `diffit.py`), so it is left
out. EDM's preconditioning is the family's `Parameterisation`, at the end of this file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mezzotint.backbones import BASE, SMALL, Backbone, Family, Preset, registry
from mezzotint.backbones.checkpointing import Checkpointing, run_block
from mezzotint.backbones.diffit import Block, TimeMLP, relative_index
from mezzotint.backbones.inputs import (
    check_input,
    check_sides,
    depth_to_space,
    label_rows,
    patch_at,
    space_to_depth,
)
from mezzotint.backbones.layers import AugmentEmbedding, FiLM
from mezzotint.backbones.sizes import (
    Channels,
    CheckedConfig,
    Classes,
    Depth,
    Dropout,
    Heads,
    Multiplier,
    Patch,
    Ratio,
    Size,
    Width,
    Window,
)
from mezzotint.core.fields import Range
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.prediction import named


@dataclass(frozen=True, kw_only=True)
class DiffiTImageConfig(CheckedConfig):
    """Hyper-parameters of image-space DiffiT.

    size, channels: of the image. num_classes: class labels, 0 for none.
    prediction: what the output predicts, by name.
    data_std: the standard deviation of the data that EDM's preconditioning assumes.
    width: channels of the first stage.
    multipliers: channels of each stage over `width`, one stage per resolution.
    blocks: cells per stage, in the encoder and again in the decoder.
    window: pixels per side of an attention window. heads: of attention.
    mlp_ratio: hidden width of the MLP over the cell's width.
    time_width: of the time vector. dropout: probability before each cell's convolution.
    augment_label: whether the network reads EDM's augmentation label; set by data.augment.
    patch: pixels per side of a cell of the network's grid; 1 in the paper.
    film: whether the time vector also scales and shifts the norm of every cell, as in ADM's U-Net;
        not in the paper.
    """

    size: Size = 64
    channels: Channels = 3
    num_classes: Classes = 0
    prediction: str = "edm"
    data_std: Annotated[float, Range(1e-6, 1000)] = 0.5
    width: Width = 128
    multipliers: tuple[Multiplier, ...] = (1, 2, 2, 2)
    blocks: Depth = 4
    window: Window = 8
    heads: Heads = 4
    mlp_ratio: Ratio = 4.0
    time_width: Width = 512
    dropout: Dropout = 0.0
    augment_label: bool = False
    patch: Patch = 1
    film: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.multipliers:
            raise ValueError("multipliers is empty; give one per stage")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of heads {self.heads}"
            )
        check_sides(self.size, self.size, self.tile)

    @property
    def tile(self) -> int:
        """What the sides of the image must be multiples of: the window at the coarsest stage."""
        return self.patch * self.window * 2 ** (len(self.multipliers) - 1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a GroupNorm for any multiple of 4 channels, with at least 4 channels per group."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def set_to_box_filter(conv: nn.Module, rows: slice, gain: float) -> None:
    """Set a convolution to `gain` times each channel's sum over `rows` x `rows` of the kernel."""
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    nn.init.zeros_(bias)
    with torch.no_grad():
        weight.zero_()
        weight.diagonal()[rows, rows] = gain


class Cell(nn.Module):
    """x + Block(Conv3x3(Swish(GN(x))), c), the paper's residual cell (eq. 9-10)."""

    def __init__(self, inputs: int, outputs: int, config: DiffiTImageConfig):
        super().__init__()
        self.window = config.window
        self.norm = group_norm(inputs)
        self.film = FiLM(config.time_width, inputs) if config.film else None
        self.dropout = nn.Dropout(config.dropout)
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.block = Block(outputs, config.heads, config.window, round(config.mlp_ratio * outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        for linear in (self.block.attn.proj, self.block.fc2):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, c: Tensor, q_t: Tensor, v_t: Tensor, index: Tensor) -> Tensor:
        """(b, inputs, h, w), channels last in memory, to (b, outputs, h, w).

        c: the time vector, (b, time_width). q_t, v_t: (b, outputs). index: `relative_index` of one
        window.
        """
        b, _, height, width = x.shape
        w = self.window
        # ADM's adaptive norm (arXiv 2105.05233, section 3.1), with 1 + scale: it starts near GN(x).
        normed = self.norm(x) if self.film is None else self.film(self.norm(x), c)
        x_hat = self.conv(self.dropout(F.silu(normed))).permute(0, 2, 3, 1)
        # The only copy that windows cost: on the way back they are a strided operand of the sum.
        tokens = (
            x_hat.reshape(b, height // w, w, width // w, w, -1)
            .transpose(2, 3)
            .reshape(b, -1, w * w, q_t.shape[1])
        )
        tokens = self.block(tokens, q_t, v_t, index, w, (w, w))
        windows = tokens.view(b, height // w, width // w, w, w, -1).transpose(2, 3)
        skip = self.skip(x).permute(0, 2, 3, 1)
        return (skip.reshape(windows.shape) + windows).reshape(skip.shape).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """The cells of one resolution."""

    def __init__(self, inputs: int, outputs: int, config: DiffiTImageConfig):
        super().__init__()
        self.cells = nn.ModuleList(
            Cell(outputs if i else inputs, outputs, config) for i in range(config.blocks)
        )

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        terms: Iterator[Tensor],
        index: Tensor,
        checkpointing: Checkpointing,
    ) -> Tensor:
        """Run the cells in turn; `terms` yields each cell's [q_t, v_t], (b, 2 outputs)."""
        for cell in self.cells:
            q_t, v_t = next(terms).chunk(2, dim=1)
            x = run_block(cell, checkpointing, x, c, q_t, v_t, index)
        return x


class DiffiTImage(Backbone):
    """Image-space DiffiT; see `DiffiTImageConfig`."""

    def __init__(self, config: DiffiTImageConfig):
        super().__init__(config)
        c = config
        widths = [c.width * m for m in c.multipliers]
        first = [c.width, *widths[:-1]]  # channels of the input of each encoder stage
        self.time = TimeMLP(c.time_width)
        self.label = nn.Embedding(c.num_classes + 1, c.time_width) if c.num_classes else None
        self.augment = AugmentEmbedding(c.time_width) if c.augment_label else None
        self.tokenizer = nn.Conv2d(c.channels * c.patch**2, c.width, 3, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(w, w, 3, stride=2, padding=1) for w in widths[:-1])
        self.encoder = nn.ModuleList(Stage(i, w, c) for i, w in zip(first, widths, strict=True))
        self.ups = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in widths[:0:-1])
        self.decoder = nn.ModuleList(
            Stage(below + w, w, c) for below, w in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head_norm = group_norm(widths[0])
        self.head = nn.Conv2d(widths[0], c.channels * c.patch**2, 3, padding=1)
        # q_t and v_t of every cell in one product, in the order encoder, decoder.
        self.terms = [w for w in widths + widths[-2::-1] for _ in range(c.blocks)]
        self.temporal = nn.Linear(c.time_width, 2 * sum(self.terms))
        for name in ("weight", "bias"):
            nn.init.zeros_(self.head.get_parameter(name))
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        # A random map passes little of an image's mean colour, and the next norm hides the rest.
        for down in self.downs:
            set_to_box_filter(down, rows=slice(1, 3), gain=1 / 4)
        for up in self.ups:
            set_to_box_filter(up, rows=slice(1, 2), gain=1.0)

    def condition(self, noise: Float[Tensor, " b"], cond: Cond) -> Float[Tensor, "b c"]:
        """Return c = MLP(sin-cos(noise)) + Emb(label) + W augment; no label is the null label."""
        c = self.time(noise)
        c = c if self.augment is None else c + self.augment(cond, c.shape[0])
        if cond.text is not None:
            raise ValueError("DiffiT takes labels, not text")
        label = label_rows(cond.label, self.config.num_classes, noise.shape[0], noise.device)
        return c if self.label is None else c + self.label(label)

    def forward(
        self, z: Float[Tensor, "b c h w"], noise: Float[Tensor, " b"], cond: Cond
    ) -> list[Tensor]:
        """Return [prediction], of z's shape.

        Args:
            z: height and width multiples of patch * window * 2^(stages - 1).
            noise: ln(sigma/alpha) / 4.
            cond: labels in 0...num_classes, or none; none for an unconditional network.
        """
        check_input(z, self.config.channels, self.config.tile)
        c = self.condition(noise, cond)
        terms = iter(self.temporal(c).split([2 * w for w in self.terms], dim=1))
        index = relative_index(self.config.window, self.config.window, z.device)

        cells = space_to_depth(z, self.config.patch)
        x = self.tokenizer(cells.contiguous(memory_format=torch.channels_last))
        skips = []
        x = self.encoder[0](x, c, terms, index, self.checkpointing)
        for down, stage in zip(self.downs, self.encoder[1:], strict=True):
            skips.append(x)
            x = stage(down(x), c, terms, index, self.checkpointing)
        for up, stage in zip(self.ups, self.decoder, strict=True):
            x = up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = stage(torch.cat([x, skips.pop()], dim=1), c, terms, index, self.checkpointing)
        return [depth_to_space(self.head(F.silu(self.head_norm(x))), self.config.patch)]


def parameterisation(config: DiffiTImageConfig) -> Parameterisation:
    """EDM's preconditioning (EDM table 1) of y = x + s eps, with d the data's standard deviation.

    c_noise = ln(s) / 4 and c_in = 1 / sqrt(s^2 + d^2).
    """

    # s = sigma / alpha, so ln(s) / 4 = -logsnr / 8
    def noise(logsnr: Tensor) -> Tensor:
        return -logsnr / 8

    # c_in y = z / (alpha sqrt(s^2 + d^2)), with alpha inside the root
    def scale(logsnr: Tensor) -> Tensor:
        return (sigma(logsnr) ** 2 + config.data_std**2 * alpha(logsnr) ** 2).rsqrt()

    return Parameterisation(
        kind=named(config.prediction, config.data_std), noise=noise, scale=scale
    )


def schedule(config: DiffiTImageConfig) -> Spec:
    """Return EDM's training distribution, ln(sigma/alpha) ~ N(-1.2, 1.2^2) (section 5).

    That is of EDM's row; a network that predicts another gets the cosine (our choice). Above the
    paper's 64 pixels the log-SNR falls by 2 ln(size / 64), simple diffusion's shift.
    """
    if config.prediction != "edm":
        return Spec("cosine", {"image_d": config.size, "noise_d": min(64, config.size)})
    # simple diffusion, arXiv 2301.11093, section 2; ln(sigma/alpha) is minus half the log-SNR.
    return Spec("lognormal", {"mean": -1.2 + math.log(max(1.0, config.size / 64)), "std": 1.2})


def patch_and_window_at(size: int) -> dict[str, object]:
    """Return config fields: the patch of `patch_at`, and a window of an eighth of the grid.

    The coarsest of four stages is then one window, as in the paper at 64 pixels.
    """
    patch = patch_at(size)
    return {"patch": patch, "window": max(1, size // patch // 8)}


def levels_at(size: int) -> dict[str, object]:
    """Return config fields: the patch of `patch_at`, and as many stages as the windows allow."""
    patch = patch_at(size)
    return {"patch": patch, "multipliers": (1, 2, 4, 8)[: 4 if size // patch % 32 == 0 else 3]}


# A narrow finest stage and a wide coarse one: after three minutes the error is 0.6 of that at width
# 32 with multipliers (1, 2, 2) (benchmarks/results/choices-eurosat.json).
_TINY = DiffiTImageConfig(
    size=32,
    num_classes=10,
    width=16,
    multipliers=(1, 2, 4, 8),
    blocks=1,
    window=4,
    heads=2,
    time_width=128,
)
_LARGER = replace(_TINY, size=64, multipliers=(1, 2, 4, 4), window=8, heads=4)


registry.add(
    "diffit_image",
    Family(
        config=DiffiTImageConfig,
        module=DiffiTImage,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "diffit-cifar10": Preset(
                config=DiffiTImageConfig(
                    size=32, multipliers=(1, 2, 2), window=4, augment_label=True
                ),
                paper="DiffiT (arXiv 2312.02139), CIFAR-10 32x32, unconditional",
                fid="1.95",
                protocol="FID-50K against the training set; "
                "EDM's deterministic Heun, 18 steps (35 calls)",
                note="The paper prints no size for image space and contradicts itself; "
                "see backbones/diffit_image.py.",
            ),
            "diffit-ffhq64": Preset(
                config=DiffiTImageConfig(
                    size=64, multipliers=(1, 2, 2, 2), window=8, augment_label=True
                ),
                paper="DiffiT (arXiv 2312.02139), FFHQ 64x64, unconditional",
                fid="2.22",
                protocol="FID-50K against the training set; "
                "EDM's deterministic Heun, 40 steps (79 calls)",
                note="The paper prints no size for image space and contradicts itself; "
                "see backbones/diffit_image.py.",
            ),
            "diffit-tiny": Preset(
                config=_TINY,
                at_size=(levels_at,),
                paper="none: image-space DiffiT that trains on a laptop",
            ),
            "diffit-small": Preset(
                config=replace(_LARGER, width=64, time_width=256, blocks=3),
                at_size=(patch_and_window_at,),
                paper=SMALL,
            ),
            "diffit-base": Preset(
                config=replace(_LARGER, width=128, time_width=512, blocks=4),
                at_size=(patch_and_window_at,),
                paper=BASE,
            ),
        },
    ),
)
