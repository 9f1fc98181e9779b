"""Official checkpoints: one file per release, which registers a `CheckpointFormat`.

A key map names, for each official tensor, the rows of our tensors that hold it. One table serves
both directions, bit for bit. `load` checks that it is total: it uses every official key and fills
every one of our tensors, each exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mezzotint.core.registry import Registry


@dataclass(frozen=True)
class TensorSlice:
    """Rows start:stop (None: to the end) of the tensor `name` of the backbone's state dict."""

    name: str
    start: int = 0
    stop: int | None = None


def get_shape(shapes: Mapping[str, tuple[int, ...]], key: str, count: int) -> tuple[int, ...]:
    """Return a tensor's shape; ValueError unless it has `count` dimensions, none empty."""
    shape = shapes[key]
    if len(shape) != count or 0 in shape:
        raise ValueError(f"{key} has shape {shape}; expected {count} dimensions, none empty")
    return shape


def _no_constants(config: Any) -> dict[str, Tensor]:
    return {}


def _pixels(config: Any) -> str:
    return "pixels"


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """One family's official checkpoints.

    backbone: registered name.
    pattern: regular expression that every official key of the family matches in full.
    config: (shapes: dict official key -> shape, *, hints...) -> the backbone's config. The
        keyword-only parameters are the user's hints, all with defaults. Reading an absent key of
        `shapes` raises the ValueError.
    keys: config -> {official key: the rows of ours that it holds, stacked along its first axis}.
    constants: config -> {official key: tensor} for official tensors that follow from the config
        (index tables). They are checked on loading and written on export; we do not store them.
    codec: config -> the space of the network's input, see `mezzotint.backbones.Preset`.
    licence: of the weights, printed on loading. where: how to get them, for docs and errors.
    """

    backbone: str
    pattern: str
    config: Callable[..., Any]
    keys: Callable[[Any], dict[str, tuple[TensorSlice, ...]]]
    constants: Callable[[Any], dict[str, Tensor]] = _no_constants
    codec: Callable[[Any], str] = _pixels
    licence: str
    where: str


registry: Registry[CheckpointFormat] = Registry("official family", __name__)
