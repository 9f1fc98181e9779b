"""DiMR: a cascade of branches that see the same noisy image at rising resolution.

Liu, Zeng, He, Yu, Shen, Chen, "Alleviating distortion in image generation via multi-resolution
diffusion models and time-dependent layer normalization", NeurIPS 2024, arXiv 2406.09416.

The coarsest branch is a U-ViT-like transformer with a class token, the others are ConvNeXt-like.
Time enters through the parameters of the norms alone. Where text and released code differ, this
file follows the code: the cascade takes the output of every block, the norm of the blocks is a
time-dependent RMS norm, and a config of 20 blocks builds 21. "Spec" is specs/dimr.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones import BASE, SMALL, Backbone, Family, Preset, registry
from mezzotint.backbones.checkpointing import Checkpointing, run_block
from mezzotint.backbones.dimr_blocks import (
    ClassRMSNorm,
    ConvNeXtBlock,
    LongSkip,
    TimeVectors,
    TransformerBlock,
    time_layer_norm,
)
from mezzotint.backbones.dimr_cascade import Cascade
from mezzotint.backbones.dimr_config import DiMRConfig
from mezzotint.backbones.inputs import GRID, check_input, depth_to_space, label_rows, patch_at
from mezzotint.backbones.kernels.depthwise import compute_dtype
from mezzotint.backbones.layers import AugmentEmbedding
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond, Parameterisation
from mezzotint.process.prediction import named
from mezzotint.process.schedules.ddpm import Table
from mezzotint.process.schedules.linear_vp import linear_vp_time
from mezzotint.process.schedules.scaled_linear import scaled_linear


class Branch(nn.Module):
    """One resolution: patches, positions and cascade, blocks with long skips, head (spec 2.3-2.7).

    Args:
        config: of the network. i: index of the branch.
        vectors: (width, initial value) of every time-dependent vector so far; the branch appends
            its own.
    """

    def __init__(self, config: DiMRConfig, i: int, vectors: list[tuple[int, float]]):
        super().__init__()
        dim, self.size, self.pairs = (
            config.dims[i],
            config.size // config.patches[i],
            config.depths[i] // 2,
        )
        self.transformer = config.stages[i] == "transformer"
        self.pool = config.image_input_ratio[i] if config.image_input_ratio else 1
        kernel = config.patches[i] // self.pool
        self.patch = nn.Conv2d(config.channels, dim, kernel, stride=kernel)
        self.positions = nn.Parameter(torch.empty(self.size**2, dim))
        self.classes = nn.Parameter(torch.empty(config.rows, dim)) if self.transformer else None
        self.augment = AugmentEmbedding(dim) if config.augment_label else None
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
        self.pixels = config.patches[-1]  # per side of the block that a cell predicts
        self.head = nn.Conv2d(dim, config.channels * self.pixels**2, 3, padding=1)
        vectors += [(dim, 1.0), (dim, 0.0)]

    def embed(self, z: Tensor) -> Tensor:
        """Embed patches and add positions, (b, c, H, W) -> (b, h, w, d)."""
        # spec 2.3, step 1: area interpolation is the mean of each cell; nothing is rescaled.
        if self.pool > 1:
            z = F.avg_pool2d(z, self.pool)
        # The strided convolution as one matrix product.
        p = self.patch.stride[0]
        b, c, h, w = z.shape
        cells = z.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(cells, self.patch.weight.flatten(1), self.patch.bias) + self.position(
            h // p, w // p
        )

    def position(self, h: int, w: int) -> Tensor:
        """Return position embeddings (h, w, d): the top left of the table.

        An axis of the table that is too short is stretched first (bilinear, corners not aligned).
        That is our choice; the released code stops at the table's edge.
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
        cond: Cond,
        time: Sequence[Tensor],
        checkpointing: Checkpointing,
    ) -> tuple[list[Tensor], Tensor]:
        """Return this branch's features, (b, h, w, d) each, and its prediction (b, c, h, w).

        Args:
            z: the noisy image at full resolution. features: of the coarser branch.
            label: (b,) rows of the class embedding.
            cond: its augmentation label is added to every cell (our choice; DiMR has none).
            time: this branch's time-dependent vectors, (b, d) each.
            checkpointing: of the blocks, see `run_block`.
        """
        maps = iter([v.to(z.dtype)[:, None, None] for v in time])
        x = self.embed(z)
        if self.augment is not None:
            x = x + self.augment(cond, x.shape[0])[:, None, None]
        if self.cascade is not None:
            x = x + self.cascade(features, list(islice(maps, 4)))
        _, h, w, _ = x.shape
        if self.classes is not None and label is not None:
            x = torch.cat([F.embedding(label, self.classes)[:, None], x.flatten(1, 2)], dim=1)
        # One dtype for the whole residual stream: under autocast the long skips return its dtype.
        x = x.to(compute_dtype(x))

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
        out = self.head(time_layer_norm(features[-1], *maps).permute(0, 3, 1, 2))
        return features, depth_to_space(out, self.pixels).contiguous()


class DiMR(Backbone):
    """The network: backbone(z, noise, cond) -> predictions of all branches, coarse to fine.

    `checkpointing` is that of the blocks; the cascade always computes its activations again.
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
        widths, initial = zip(*vectors, strict=True)
        class_dim = config.class_dim if config.num_classes else 0
        self.time = TimeVectors(widths, initial, config.rows, class_dim)
        self.apply(init_weights)

    def no_decay_parameters(self) -> set[str]:
        """Return w and b of the time-dependent vectors; all else decays (spec 4)."""
        return {"time.w_minus_1", "time.b"}

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """Return the predictions (b, c, H / ratio, W / ratio) of every branch, the finest last.

        Args:
            z: (b, c, H, W); H and W multiples of the coarsest patch. Up to the native size
                positions are the top left of the table, beyond it they are interpolated.
            noise: (b,) 8 n / 1000 - 4, which rises with the noise from -4 to 4.
            cond: label (b,), or None for the null label.

        Errors: ValueError for a size, channels or condition that the network does not accept.
        """
        label = self.class_rows(z, cond)
        time = iter(self.time(noise / 4, label))  # tau = noise / 4 (spec 2.1)
        features: list[Tensor] = []
        outputs = []
        for branch, count in zip(self.branches, self.counts, strict=True):
            features, out = branch(
                z, features, label, cond, list(islice(time, count)), self.checkpointing
            )
            outputs.append(out)
        return outputs

    def class_rows(self, z: Tensor, cond: Cond) -> Tensor | None:
        """Check the input and return the rows of the class embedding, (b,)."""
        c = self.config
        check_input(z, c.channels, c.patches[0])
        if cond.text is not None:
            raise ValueError("DiMR takes labels, not text")
        if "transformer" not in c.stages:
            if cond.label is not None:
                raise ValueError("this network takes no label: it has no transformer stage")
            return None
        return label_rows(cond.label, c.num_classes, len(z), z.device, c.null_label)


def init_weights(module: nn.Module) -> None:
    """Initialise one module (spec 2.8).

    Linear layers and embeddings from a normal of std 0.02 cut at 2, biases zero, convolutions as
    PyTorch initialises them. The classes' part of the norms starts at zero. A larger embedding
    makes Adam's first steps of that part too long: errors and distances are then worse.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, TimeVectors) and module.class_vectors is not None:
        nn.init.zeros_(module.class_vectors.weight)
    if isinstance(module, Branch):
        for table in (module.positions, module.classes):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)
    # `apply` visits the norm after its linear layer, so this overrides the draw above.
    if isinstance(module, ClassRMSNorm):
        nn.init.zeros_(module.linear.weight)


def parameterisation(config: DiMRConfig) -> Parameterisation:
    """The output is eps as published; `noise` is 8 n / 1000 - 4 of the step n (spec 2.10).

    n inverts the config's process; it is fractional between the table's entries and clamped at its
    ends. For pixel models this rising time is our choice: the released sde.py can also feed
    log-SNR / 4, clipped to -6.9 ... 3.45 and falling with the noise, and the authors do not state
    which of the two the published pixel models used.
    """
    kind = named(config.prediction)
    if config.time != "scaled_linear":
        return Parameterisation(
            kind=kind, noise=lambda logsnr: 8 * linear_vp_time(logsnr).clamp(0, 1) - 4
        )
    # The table needs values, also where the network is built on the meta device.
    with torch.device("cpu"):
        table = scaled_linear()
    assert isinstance(table, Table)
    return Parameterisation(
        kind=kind, noise=lambda logsnr: 8 * (table.index(logsnr) + 1) / 1000 - 4
    )


def schedule(config: DiMRConfig) -> Spec:
    """Return the schedule in training: Stable Diffusion's table; for pixels the VP SDE or cosine.

    Above the paper's 64 pixels the log-SNR of the latter two falls by 2 ln(size / 64).
    """
    if config.time == "cosine":
        return Spec("cosine", {"image_d": config.size, "noise_d": min(64, config.size)})
    # simple diffusion's shift (arXiv 2301.11093, section 2).
    if config.time == "linear_vp" and config.size > 64:
        return Spec("linear_vp", {"shift": 2 * math.log(64 / config.size)})
    return Spec(config.time)


def published_config(
    size: int, patches: tuple[int, ...], width: int, depths: tuple[int, ...], pixels: bool
) -> DiMRConfig:
    """Return a config of the paper (spec 3).

    The width halves from branch to branch, the GEGLU is twice as wide, and only the first branch is
    a transformer.
    """
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
GUIDED = (
    "FID-50K, ADM evaluator, 50 per class; DPM-Solver++ single-step order 3, 250 network times, "
    "guidance unstated"
)
UNGUIDED = (
    "FID-50K, ADM evaluator, no guidance; the sampler is not stated "
    "(U-ViT's 64 px recipe: 50 steps)"
)
FROM_COUNTS = (
    "Heads are not stated (16 as in the released sizes); "
    "widths and depths are those that give the counts. "
)

# A network that predicts eps copies its input where noise is strong, which DiMR's branches are slow
# to learn. After three minutes v on coarser patches has a sixth of the error, and at width 192 the
# cosine schedule a sixth less again (benchmarks/results/choices-eurosat.json).
_TINY = replace(
    published_config(32, (4, 2, 1), 128, (5, 3, 3), pixels=True),
    num_classes=10,
    heads=4,
    prediction="v",
    time="cosine",
)


def _larger(width: int, depths: tuple[int, ...], heads: int) -> DiMRConfig:
    """Return dimr-tiny's config at 64 pixels with other widths, depths and heads."""
    sizes = published_config(64, (4, 2, 1), width, depths, pixels=True)
    return replace(
        _TINY, size=64, dims=sizes.dims, hidden_dims=sizes.hidden_dims, depths=depths, heads=heads
    )


def _patches_at(size: int, cells: int = GRID) -> dict[str, object]:
    """Return the patches of three branches, the finest with at most `cells` on a side."""
    return {"patches": tuple(patch_at(size, cells) * p for p in (4, 2, 1))}


registry.add(
    "dimr",
    Family(
        config=DiMRConfig,
        module=DiMR,
        parameterisation=parameterisation,
        schedule=schedule,
        presets={
            "dimr-m-3r-64": Preset(
                config=published_config(64, (4, 2, 1), 768, (15, 9, 9), pixels=True),
                paper=f"{PAPER} 64x64 pixels",
                params="133 M",
                fid="3.65",
                protocol=UNGUIDED,
                note=FROM_COUNTS
                + "The paper's 132.7 and 132.9 M are those of other block norms (RMSN, LN).",
            ),
            "dimr-l-3r-64": Preset(
                config=published_config(64, (4, 2, 1), 768, (33, 17, 17), pixels=True),
                paper=f"{PAPER} 64x64 pixels",
                params="284 M",
                fid="2.21",
                protocol=UNGUIDED,
                note=FROM_COUNTS + "The paper's 284.0 M is that of the RMSN block norm.",
            ),
            "dimr-xl-2r-256": Preset(
                config=published_config(32, (2, 1), 960, (39, 21), pixels=False),
                paper=f"{PAPER} 256x256 latents",
                codec="sd-vae-ft-ema",
                params="505 M",
                gmac="160",
                fid="1.70",
                protocol=GUIDED,
            ),
            "dimr-g-2r-256": Preset(
                config=published_config(32, (2, 1), 1152, (57, 29), pixels=False),
                paper=f"{PAPER} 256x256 latents",
                codec="sd-vae-ft-ema",
                params="1.06 B",
                gmac="331",
                fid="1.63",
                protocol=GUIDED,
            ),
            "dimr-xl-3r-512": Preset(
                config=published_config(64, (4, 2, 1), 960, (39, 21, 21), pixels=False),
                paper=f"{PAPER} 512x512 latents",
                codec="sd-vae-ft-ema",
                params="525 M",
                gmac="206",
                fid="2.89",
                protocol=GUIDED,
                note=FROM_COUNTS + "The paper's 524.8 M is that of the RMSN block norm.",
            ),
            "dimr-tiny": Preset(
                config=_TINY,
                at_size=(lambda size: _patches_at(size, cells=32),),
                paper="none: DiMR that trains on a laptop; v and cosine",
            ),
            "dimr-small": Preset(
                config=_larger(384, (9, 5, 5), heads=6), at_size=(_patches_at,), paper=SMALL
            ),
            "dimr-base": Preset(
                config=_larger(768, (13, 5, 5), heads=12), at_size=(_patches_at,), paper=BASE
            ),
            "dimr-latent-tiny": Preset(
                config=replace(
                    published_config(16, (2, 1), 128, (5, 3), pixels=False), num_classes=10, heads=4
                ),
                paper="none: latent DiMR that trains on a laptop, on latents of 128x128 images",
                codec="sd-vae-ft-ema",
            ),
        },
    ),
)
