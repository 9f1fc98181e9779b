"""Hyper-parameters of DiMR, and their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mezzotint.backbones.dimr_blocks import NORMS
from mezzotint.backbones.sizes import (
    Channels,
    CheckedConfig,
    Classes,
    Depth,
    Heads,
    Patch,
    Size,
    Width,
)
from mezzotint.core.fields import Range


@dataclass(frozen=True, kw_only=True)
class DiMRConfig(CheckedConfig):
    """Hyper-parameters of DiMR; tuples hold one entry per branch, coarse to fine.

    size, channels: of the input. num_classes: real classes.
    null_label: whether the class embedding has one more row for "no class".
    patches: side of the image under one cell of the branch, each a multiple of the next. The last
        is 1 in the paper; a larger one is the side of the block of pixels that a cell predicts.
    image_input_ratio: how much of each patch is averaged before it is embedded, a divisor of it;
        empty is 1 for every branch, as in the released configs (specs/dimr.md 2.3).
    dims: widths. hidden_dims: widths of the GEGLU.
    depths: blocks built, odd (a published config's 20 builds 21).
    stages: "transformer" or "convnext".
    heads: of every attention. kernel_size: of every depthwise convolution, odd.
    norm: of the blocks: TDRMSN (released models), LN (the paper's text), RMSN, ADARMSN.
    time: the process whose step n = 1 ... 1000 is the network's noise level: "scaled_linear"
        (latent models: Stable Diffusion's table) or "linear_vp" (pixel models, after U-ViT: the
        variance-preserving SDE). "cosine" has the steps of "linear_vp" and is trained by the
        cosine schedule; no published model has it.
    class_dim: width of a class embedding that adds to the time-dependent vectors of every norm,
        through a linear map; 0 is none, as published. A network without classes has none either.
        Ours: a class token in the coarsest branch alone hardly reaches the textures of the finest.
    augment_label: whether the network reads EDM's augmentation label; set by data.augment.
    """

    size: Size = 64
    channels: Channels = 3
    num_classes: Classes = 1000
    null_label: bool = True
    patches: tuple[Patch, ...] = (4, 2, 1)
    image_input_ratio: tuple[Patch, ...] = ()
    dims: tuple[Width, ...] = (768, 384, 192)
    hidden_dims: tuple[Width, ...] = (1536, 768, 384)
    depths: tuple[Depth, ...] = (15, 9, 9)
    stages: tuple[str, ...] = ("transformer", "convnext", "convnext")
    heads: Heads = 16
    kernel_size: Annotated[int, Range(1, 255)] = 7
    norm: str = "TDRMSN"
    time: str = "linear_vp"
    prediction: str = "eps"
    class_dim: Annotated[int, Range(0, 65_536, "0 for none")] = 0
    augment_label: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        per_branch = {
            name: getattr(self, name)
            for name in ("patches", "dims", "hidden_dims", "depths", "stages")
        }
        if len({len(values) for values in per_branch.values()}) != 1 or not self.patches:
            raise ValueError(
                f"one entry per branch in each of {', '.join(per_branch)}; given {per_branch}"
            )
        if any(depth % 2 == 0 for depth in self.depths):
            raise ValueError(
                f"depths {self.depths} must be odd: pairs joined by long skips and a middle block"
            )
        if any(a % b for a, b in zip(self.patches, self.patches[1:], strict=False)):
            raise ValueError(
                f"patches {self.patches}: each must be a multiple of the next, as in (4, 2, 1)"
            )
        if self.image_input_ratio and (
            len(self.image_input_ratio) != len(self.patches)
            or any(p % r for p, r in zip(self.patches, self.image_input_ratio, strict=True))
        ):
            raise ValueError(
                f"image_input_ratio {self.image_input_ratio} must have one divisor of each of the "
                f"patches {self.patches}, or be empty"
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
                "convnext stages read no class: without a transformer stage num_classes must be 0"
            )
        if "transformer" in self.stages and not self.rows:
            raise ValueError(
                "num_classes 0 needs null_label=True: the class token needs an embedding"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} must be odd")
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        if self.time not in ("scaled_linear", "linear_vp", "cosine"):
            raise ValueError(f"time {self.time!r} must be scaled_linear, linear_vp or cosine")

    @property
    def needs_label(self) -> bool:
        """Whether the network has classes but no null label."""
        return bool(self.num_classes) and not self.null_label and "transformer" in self.stages

    @property
    def rows(self) -> int:
        """Rows of the class embedding."""
        return self.num_classes + self.null_label
