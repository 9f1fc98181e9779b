"""DiMR: several branches see the same noisy image at rising resolution; each hands all its features to the next.

Liu, Zeng, He, Yu, Shen, Chen, "Alleviating distortion in image generation via multi-resolution diffusion models and
time-dependent layer normalization", NeurIPS 2024, arXiv 2406.09416. The coarsest branch is a U-ViT-like transformer
with a class token, the others are ConvNeXt-like; time enters only through the parameters of the norms. Where the text
and the released code differ this file follows the code: the cascade takes every block's output, the blocks' norm is a
time-dependent RMS norm, and 20 blocks asked for are 21 built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones import Backbone, Family, Preset, registry
from mezzotint.backbones.checkpointing import Checkpointing, run_block
from mezzotint.backbones.dimr_blocks import (
    NORMS,
    Cascade,
    ClassRMSNorm,
    ConvNeXtBlock,
    LongSkip,
    TimeVectors,
    TransformerBlock,
    layer_norm,
)
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.prediction import named
from mezzotint.process.schedules.ddpm import Table
from mezzotint.process.schedules.linear_vp import linear_vp_time
from mezzotint.process.schedules.scaled_linear import scaled_linear


@dataclass(frozen=True, kw_only=True)
class DiMRConfig:
    """A DiMR network; tuples hold one entry per branch, coarse to fine.

    size, channels: of the input. num_classes: real classes; null_label: one more embedding row for "no class".
    patches: patch sizes, each a multiple of the next, the last usually 1. dims: widths. hidden_dims: widths of the GEGLU.
    depths: blocks built, odd (the published configs' 20 builds 21). stages: "transformer" or "convnext".
    heads: of every attention. kernel_size: of every depthwise convolution, odd.
    norm: of the blocks: TDRMSN (released models), LN (the paper's text), RMSN, ADARMSN.
    time: the process whose step n = 1 ... 1000 the network is told: "scaled_linear" (latent models: the table of
        Stable Diffusion) or "linear_vp" (pixel models, after U-ViT: the variance-preserving SDE).
    """

    size: int = 64
    channels: int = 3
    num_classes: int = 1000
    null_label: bool = True
    patches: tuple[int, ...] = (4, 2, 1)
    dims: tuple[int, ...] = (768, 384, 192)
    hidden_dims: tuple[int, ...] = (1536, 768, 384)
    depths: tuple[int, ...] = (15, 9, 9)
    stages: tuple[str, ...] = ("transformer", "convnext", "convnext")
    heads: int = 16
    kernel_size: int = 7
    norm: str = "TDRMSN"
    time: str = "linear_vp"
    prediction: str = "eps"

    def __post_init__(self) -> None:
        per_branch = {
            name: getattr(self, name)
            for name in ("patches", "dims", "hidden_dims", "depths", "stages")
        }
        if len({len(values) for values in per_branch.values()}) != 1 or not self.patches:
            raise ValueError(
                f"one entry per branch in each of {', '.join(per_branch)}; given {per_branch}"
            )
        numbers = (
            self.size,
            self.channels,
            self.heads,
            *self.patches,
            *self.dims,
            *self.hidden_dims,
            *self.depths,
        )
        if min(numbers) < 1 or self.num_classes < 0:
            raise ValueError(f"sizes of a network must be positive: {self}")
        if any(depth % 2 == 0 for depth in self.depths):
            raise ValueError(
                f"depths {self.depths} must be odd: pairs joined by long skips and a block in the middle"
            )
        if any(a % b for a, b in zip(self.patches, self.patches[1:], strict=False)):
            raise ValueError(
                f"patches {self.patches}: each must be a multiple of the next, as in (4, 2, 1)"
            )
        if self.size % self.patches[0]:
            near = self.size // self.patches[0] * self.patches[0]
            raise ValueError(
                f"size {self.size} is not a multiple of the coarsest patch {self.patches[0]}; "
                f"try {near or self.patches[0]} or {near + self.patches[0]}"
            )
        for stage, dim in zip(self.stages, self.dims, strict=True):
            if stage not in ("transformer", "convnext"):
                raise ValueError(f"stage {stage!r} must be transformer or convnext")
            if stage == "transformer" and dim % self.heads:
                fit = [h for h in range(1, min(dim, 64) + 1) if dim % h == 0]
                raise ValueError(f"heads {self.heads} do not divide width {dim}; these do: {fit}")
        if "transformer" not in self.stages and self.num_classes:
            raise ValueError(
                "convnext stages see no class: without a transformer stage num_classes must be 0"
            )
        if "transformer" in self.stages and not self.rows:
            raise ValueError(
                "num_classes 0 needs null_label=True: the class token must be something"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        if self.time not in ("scaled_linear", "linear_vp"):
            raise ValueError(f"time {self.time!r} must be scaled_linear or linear_vp")

    @property
    def needs_label(self) -> bool:
        """Whether "no class" is nothing that the network could be told."""
        return bool(self.num_classes) and not self.null_label and "transformer" in self.stages

    @property
    def rows(self) -> int:
        """Rows of the class embedding."""
        return self.num_classes + self.null_label


class Branch(nn.Module):
    """One resolution: patches + positions + cascade, a symmetric stack with long skips, a head (spec 2.3 to 2.7).

    Args:
        config: of the network. i: which branch.
        vectors: (width, initial value) of every time-dependent vector so far; the branch appends its own.
    """

    def __init__(self, config: DiMRConfig, i: int, vectors: list[tuple[int, float]]):
        super().__init__()
        dim, self.size, self.pairs = (
            config.dims[i],
            config.size // config.patches[i],
            config.depths[i] // 2,
        )
        self.transformer = config.stages[i] == "transformer"
        self.patch = nn.Conv2d(config.channels, dim, config.patches[i], stride=config.patches[i])
        self.positions = nn.Parameter(torch.empty(self.size**2, dim))
        self.classes = nn.Parameter(torch.empty(config.rows, dim)) if self.transformer else None
        self.cascade = None
        if i > 0:
            count = config.depths[i - 1] + 1
            self.cascade = Cascade(
                config.dims[i - 1], count, dim, config.patches[i - 1] // config.patches[i]
            )
            vectors += self.cascade.vectors

        def block() -> TransformerBlock | ConvNeXtBlock:
            if self.transformer:
                return TransformerBlock(dim, config.hidden_dims[i], config.heads, config.norm)
            return ConvNeXtBlock(dim, config.hidden_dims[i], config.kernel_size, config.norm)

        blocks = [block() for _ in range(2 * self.pairs + 1)]
        self.blocks = nn.ModuleList(blocks)
        self.per_block = len(blocks[0].vectors)
        vectors += [(dim, value) for block in blocks for value in block.vectors]
        self.skips = nn.ModuleList(LongSkip(dim) for _ in range(self.pairs))
        self.head = nn.Conv2d(dim, config.channels, 3, padding=1)
        vectors += [(dim, 1.0), (dim, 0.0)]

    def embed(self, z: Tensor) -> Tensor:
        """Patches plus positions, (b, c, H, W) -> (b, h, w, d): the strided convolution as one matrix product."""
        p = self.patch.stride[0]
        b, c, h, w = z.shape
        cells = z.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(cells, self.patch.weight.flatten(1), self.patch.bias) + self.position(
            h // p, w // p
        )

    def position(self, h: int, w: int) -> Tensor:
        """Position embeddings (h, w, d): the top left of the table, an axis that is too short stretched first.

        The stretching (bilinear, corners not aligned) is our choice; the released code stops at the table's edge.
        """
        table = self.positions.view(self.size, self.size, -1)
        if h > self.size or w > self.size:
            image, target = table.permute(2, 0, 1)[None], (max(h, self.size), max(w, self.size))
            table = F.interpolate(image, size=target, mode="bilinear", align_corners=False)[
                0
            ].permute(1, 2, 0)
        return table[:h, :w]

    def forward(
        self,
        z: Tensor,
        features: Sequence[Tensor],
        label: Tensor | None,
        time: Sequence[Tensor],
        checkpointing: Checkpointing,
    ) -> tuple[list[Tensor], Tensor]:
        """This branch's features, (b, h, w, d) each, and its prediction (b, c, h, w).

        Args:
            z: the noisy image at full resolution. features: of the coarser branch. label: (b,) rows of the embedding.
            time: this branch's time-dependent vectors, (b, d) each. checkpointing: of the blocks, see `run`.
        """
        maps = iter([v.to(z.dtype)[:, None, None] for v in time])
        x = self.embed(z)
        if self.cascade is not None:
            x = x + self.cascade(features, list(islice(maps, 4)))
        _, h, w, _ = x.shape
        if self.classes is not None and label is not None:
            x = torch.cat([F.embedding(label, self.classes)[:, None], x.flatten(1, 2)], dim=1)

        def as_map(x: Tensor) -> Tensor:
            return x[:, 1:].unflatten(1, (h, w)) if self.transformer else x

        stack, features = [], [as_map(x)]
        for j, block in enumerate(self.blocks):
            if j > self.pairs:
                x = self.skips[j - self.pairs - 1](x, stack.pop())
            vectors = [v[:, 0] if self.transformer else v for v in islice(maps, self.per_block)]
            x = run_block(block, checkpointing, x, *vectors, dropout=False)
            if j < self.pairs:
                stack.append(x)
            features.append(as_map(x))
        out = self.head(layer_norm(features[-1], *maps).permute(0, 3, 1, 2))
        return features, out.contiguous()


class DiMR(Backbone):
    """The network: backbone(z, noise, cond) -> predictions of all branches, coarse to fine.

    Attributes:
        checkpointing: of every block, see `run`; the cascade is always computed again.
    """

    def __init__(self, config: DiMRConfig):
        super().__init__(config)
        vectors: list[tuple[int, float]] = []
        self.branches = nn.ModuleList()
        self.counts: list[int] = []
        for i in range(len(config.dims)):
            before = len(vectors)
            self.branches.append(Branch(config, i, vectors))
            self.counts.append(len(vectors) - before)
        self.time = TimeVectors(*zip(*vectors, strict=True))
        self.apply(initialise)

    def no_decay_parameters(self) -> set[str]:
        """Parameters that weight decay leaves alone: w and b of the time-dependent vectors, nothing else (spec 4)."""
        return {"time.w_minus_1", "time.b"}

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """Predictions (b, c, H / ratio, W / ratio) of every branch, the finest last.

        Args:
            z: (b, c, H, W); H and W multiples of the coarsest patch. Up to the native size positions are the top left
                of the table, beyond it they are interpolated.
            noise: (b,) 8 n / 1000 - 4, which rises with the noise from -4 to 4.
            cond: label (b,), or None for the null label.

        Errors: ValueError for a size, channels or condition that the network does not take.
        """
        label = self.label(z, cond)
        time = iter(self.time(noise / 4))  # tau = noise / 4 (spec 2.1)
        features: list[Tensor] = []
        outputs = []
        for branch, count in zip(self.branches, self.counts, strict=True):
            features, out = branch(
                z, features, label, list(islice(time, count)), self.checkpointing
            )
            outputs.append(out)
        return outputs

    def label(self, z: Tensor, cond: Cond) -> Tensor | None:
        """Rows of the class embedding, (b,), after checking the input."""
        if cond.label is not None and cond.label.shape[0] != z.shape[0]:
            raise ValueError(
                f"{cond.label.shape[0]} labels for a batch of {z.shape[0]}; give one per image"
            )
        c, patch = self.config, self.config.patches[0]
        if z.shape[1] != c.channels or z.shape[2] % patch or z.shape[3] % patch:
            near = [max(s // patch, 1) * patch for s in z.shape[2:]]
            raise ValueError(
                f"input {tuple(z.shape[1:])}: this network takes {c.channels} channels and multiples of {patch}; "
                f"try ({c.channels}, {near[0]}, {near[1]})"
            )
        if cond.text is not None:
            raise ValueError("DiMR takes labels, not text")
        if "transformer" not in c.stages:
            if cond.label is not None:
                raise ValueError("this network takes no label: it has no transformer stage")
            return None
        if cond.label is None:
            if not c.null_label:
                raise ValueError(
                    f"this network has no null label: give a label in 0 ... {c.num_classes - 1}"
                )
            return torch.full((len(z),), c.num_classes, device=z.device)
        # Elsewhere than on the CPU looking at the labels would wait for the device; there the caller checks.
        if cond.label.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = cond.label.aminmax()
            if low < 0 or high >= c.rows:
                null = f", {c.num_classes} meaning no class" if c.null_label else ""
                raise ValueError(
                    f"labels {int(low)} ... {int(high)}: allowed are 0 ... {c.rows - 1}{null}"
                )
        return cond.label


def initialise(module: nn.Module) -> None:
    """Spec 2.8: linear layers and embeddings normal with std 0.02 cut at 2, zero biases; convolutions as PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Branch):
        for table in (module.positions, module.classes):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
    if isinstance(module, ClassRMSNorm):  # comes after its own linear layer
        nn.init.zeros_(module.linear.weight)


def parameterisation(config: DiMRConfig) -> Parameterisation:
    """The output is `prediction` (eps as published); the network is told 8 n / 1000 - 4 of the step n (spec 2.10).

    n is the inverse of the config's process, fractional between the table's entries and held at its ends. For pixel
    models this rising time is our choice: the released sde.py has a path that feeds log-SNR / 4, clipped to -6.9 ...
    3.45 and falling with noise, and which one the published pixel models used is not stated.
    """
    kind = named(config.prediction)
    if config.time == "linear_vp":
        return Parameterisation(
            kind=kind, noise=lambda logsnr: 8 * linear_vp_time(logsnr).clamp(0, 1) - 4
        )
    with torch.device(
        "cpu"
    ):  # the table is numbers, also where the network is built on the meta device
        table = scaled_linear()
    assert isinstance(table, Table)
    return Parameterisation(
        kind=kind, noise=lambda logsnr: 8 * (table.index(logsnr) + 1) / 1000 - 4
    )


def schedule(config: DiMRConfig) -> Spec:
    """The process the network is trained on: Stable Diffusion's table, or the variance-preserving SDE for pixels."""
    return Spec(config.time)


def published(
    size: int, patches: tuple[int, ...], width: int, depths: tuple[int, ...], pixels: bool
) -> DiMRConfig:
    """Spec 3: the width halves from branch to branch, the GEGLU is twice as wide, only the first is a transformer."""
    dims = tuple(width >> i for i in range(len(depths)))
    return DiMRConfig(
        size=size,
        channels=3 if pixels else 4,
        patches=patches,
        dims=dims,
        hidden_dims=tuple(2 * d for d in dims),
        depths=depths,
        stages=("transformer", *["convnext"] * (len(depths) - 1)),
        time="linear_vp" if pixels else "scaled_linear",
    )


PAPER = "DiMR (arXiv 2406.09416), ImageNet"
GUIDED = "FID-50K, ADM evaluator, 50 per class; DPM-Solver++ single-step order 3, 250 network times, guidance unstated"
UNGUIDED = "FID-50K, ADM evaluator, no guidance; the sampler is not stated (U-ViT's 64 px recipe: 50 steps)"
FROM_COUNTS = "Heads are not stated (16 as in the released sizes); widths and depths are those that give the counts. "

registry.add(
    "dimr",
    Family(
        config=DiMRConfig,
        module=DiMR,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "dimr-m-3r-64": Preset(
                config=published(64, (4, 2, 1), 768, (15, 9, 9), pixels=True),
                paper=f"{PAPER} 64x64 pixels",
                params="133 M",
                fid="3.65",
                protocol=UNGUIDED,
                note=FROM_COUNTS
                + "The paper's 132.7 and 132.9 M are those of other block norms (RMSN, LN).",
            ),
            "dimr-l-3r-64": Preset(
                config=published(64, (4, 2, 1), 768, (33, 17, 17), pixels=True),
                paper=f"{PAPER} 64x64 pixels",
                params="284 M",
                fid="2.21",
                protocol=UNGUIDED,
                note=FROM_COUNTS + "The paper's 284.0 M is that of the RMSN block norm.",
            ),
            "dimr-xl-2r-256": Preset(
                config=published(32, (2, 1), 960, (39, 21), pixels=False),
                paper=f"{PAPER} 256x256 latents",
                codec="sd-vae-ft-ema",
                params="505 M",
                gmac="160",
                fid="1.70",
                protocol=GUIDED,
            ),
            "dimr-g-2r-256": Preset(
                config=published(32, (2, 1), 1152, (57, 29), pixels=False),
                paper=f"{PAPER} 256x256 latents",
                codec="sd-vae-ft-ema",
                params="1.06 B",
                gmac="331",
                fid="1.63",
                protocol=GUIDED,
            ),
            "dimr-xl-3r-512": Preset(
                config=published(64, (4, 2, 1), 960, (39, 21, 21), pixels=False),
                paper=f"{PAPER} 512x512 latents",
                codec="sd-vae-ft-ema",
                params="525 M",
                gmac="206",
                fid="2.89",
                protocol=GUIDED,
                note=FROM_COUNTS + "The paper's 524.8 M is that of the RMSN block norm.",
            ),
            "dimr-tiny": Preset(
                config=replace(
                    published(32, (4, 2, 1), 128, (5, 3, 3), pixels=True), num_classes=10, heads=4
                ),
                paper="none: DiMR that trains on a laptop, 32 or 64 pixels",
            ),
            "dimr-latent-tiny": Preset(
                config=replace(
                    published(16, (2, 1), 128, (5, 3), pixels=False), num_classes=10, heads=4
                ),
                paper="none: latent DiMR that trains on a laptop, on latents of 128x128 images",
                codec="sd-vae-ft-ema",
            ),
        },
    ),
)
