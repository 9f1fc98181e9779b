"""Networks, independent of the diffusion process. One file per family; it registers a `Family`.

A family's config is a frozen, keyword-only dataclass of JSON values with at least the fields of
`Config`. Its network is built from that config alone and is called as backbone(z, noise, cond); it
returns a list of outputs, coarse to fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mezzotint.backbones.checkpointing import Checkpointing
from mezzotint.backbones.kernels.depthwise import (
    DepthwiseKernel,
    ResidualDepthwise,
    check_depthwise_kernel,
)
from mezzotint.core.registry import Registry, Spec
from mezzotint.process.denoiser import Cond, Model, Parameterisation


class Config(Protocol):
    """The fields that every backbone's config has.

    size: native height and width of the network's input, in pixels or latent cells. Where a family
        allows it, a pair (height, width); `native_size` reads both forms.
    channels: channels of that input.
    num_classes: number of class labels, 0 for an unconditional network; index num_classes is the
        null label.
    prediction: name of what the output predicts; only the family's Parameterisation reads it.
    """

    size: Any
    channels: int
    num_classes: int
    prediction: str


class Backbone(nn.Module):
    """Base class of every network: built from its config alone, called as backbone(z, noise, cond).

    Attributes:
        config: the config it was built from.
        checkpointing: what each repeated block keeps for the backward pass, see `run_block`.
        skipped_macs: multiply-accumulates per image that the published network does without effect
            and this one leaves out.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = "none"
        self.skipped_macs = 0

    def set_depthwise_kernel(self, kernel: DepthwiseKernel) -> None:
        """Choose what computes the depthwise convolutions on a GPU; the default is cuDNN.

        Errors: ValueError for "triton" where triton or CUDA is missing.
        """
        check_depthwise_kernel(kernel)
        for module in self.modules():
            if isinstance(module, ResidualDepthwise):
                module.kernel = kernel

    def no_decay_parameters(self) -> set[str]:
        """Return the names of the parameters that weight decay leaves alone."""
        return set()

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """Return the outputs, coarse to fine; the last has the height and width of z (b, c, h, w).

        `noise` (b,) is the noise level in the network's own coordinate, see `Parameterisation`.
        """
        raise NotImplementedError


def get_backbone(model: Model) -> Backbone:
    """Return the network of a model that one of the registered families built."""
    assert isinstance(model.backbone, Backbone), type(model.backbone)
    return model.backbone


def native_size(config: Any) -> tuple[int, int]:
    """Return the height and width of the input that a config's network is made for."""
    return config.size if isinstance(config.size, tuple) else (config.size, config.size)


def native_side(config: Any) -> int:
    """Return the side of the square with the area of the network's own input, rounded."""
    return round(math.sqrt(math.prod(native_size(config))))


def text_width(config: Any) -> int:
    """Return the width of the text embeddings a network reads, 0 for a network without text."""
    return getattr(config, "text_dim", 0)


def needs_label(config: Any) -> bool:
    """Return whether the network has classes but no null label (some DiMR networks)."""
    return getattr(config, "needs_label", False)


def dummy_condition(config: Any, z: Tensor, text_tokens: int = 0) -> Cond:
    """Return a condition that the network accepts for a batch z: none, or label 0 where needed.

    Args:
        text_tokens: of the text, for a network that reads one.
    """
    if needs_label(config):
        return Cond(label=torch.zeros(len(z), dtype=torch.long, device=z.device))
    if not (text_tokens and text_width(config)):
        return Cond()
    text = torch.zeros(len(z), text_tokens, text_width(config), dtype=z.dtype, device=z.device)
    return Cond(text=text, text_mask=torch.ones_like(text[..., 0], dtype=torch.bool))


# `Preset.paper` of the sizes for one's own images.
SMALL = "none: for one consumer GPU, or a CPU over a weekend; 64 to 256 pixels"
BASE = "none: for one or several GPUs over days; 64 to 256 pixels"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published size, or one that trains on a laptop.

    config: the backbone's config.
    paper: where the size is published, or its purpose.
    codec: the space of the network's input: "pixels" or the name of an autoencoder.
    params, gmac: as the paper prints them, None where it does not.
    fid: the FID the paper claims. protocol: how the paper measured it.
    note: why counted and claimed figures differ.
    at_size: functions that return fields of the config that follow from a size in pixels, e.g. the
        patch; those of one function belong together.
    """

    config: Any
    paper: str
    codec: str = "pixels"
    params: str | None = None
    gmac: str | None = None
    fid: str | None = None
    protocol: str | None = None
    note: str = ""
    at_size: tuple[Callable[[int], dict[str, Any]], ...] = ()

    def change(self, fields: dict[str, Any]) -> Any:
        """Return the config with some fields replaced.

        A given size sets the fields of each function of `at_size` too, unless one of them is given.
        """
        changes = dict(fields)
        if "size" in fields:
            size = fields["size"]
            side = max(size) if isinstance(size, tuple) else size
            for follow in self.at_size:
                following = follow(side)
                if not following.keys() & fields.keys():
                    changes |= following
        return replace(self.config, **changes)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the file of a backbone registers in its last lines.

    config: the config's dataclass. module: builds the network from a config.
    parameterisation: what the output means, as a function of the config.
    schedule: the noise schedule that the paper trains a config with, by name.
    presets: name -> Preset.
    """

    config: type
    module: Callable[[Any], Backbone]
    parameterisation: Callable[[Any], Parameterisation]
    schedule: Callable[[Any], Spec]
    presets: dict[str, Preset]


registry: Registry[Family] = Registry("backbone", __name__)


def presets() -> dict[str, tuple[str, Preset]]:
    """Return every preset as name -> (backbone, Preset), in the order of the backbones' names."""
    return {name: (b, preset) for b in registry for name, preset in registry[b].presets.items()}
