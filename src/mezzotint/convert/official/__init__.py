"""Official checkpoints: one file per release, each registering an `Official`; found by scanning this folder.

A key map says of every official tensor which rows of which of our tensors it is, so one table serves both ways, bit
for bit, and can be checked to be total: every official key used, every tensor of ours filled, each exactly once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mezzotint.core.registry import Registry


@dataclass(frozen=True)
class Rows:
    """Rows start:stop (None: to the end) of the backbone's tensor `name`, a key of its state dict."""

    name: str
    start: int = 0
    stop: int | None = None


def _no_constants(config: Any) -> dict[str, Tensor]:
    return {}


def _pixels(config: Any) -> str:
    return "pixels"


@dataclass(frozen=True, kw_only=True)
class Official:
    """One family's official checkpoints.

    backbone: registered name.
    pattern: regular expression that every official key of the family matches in full; tells families apart.
    config: (shapes: dict official key -> shape, *, hints...) -> the backbone's config. Keyword-only parameters are the
        hints a user may give, all with defaults. Reading a key that is absent raises a ValueError by itself.
    keys: config -> {official key: the rows of ours that it holds, stacked along its first axis}.
    constants: config -> {official key: tensor} for official tensors that are functions of the config (index tables):
        checked on the way in, written on the way back, not stored by us.
    codec: config -> the space the network works in, see `mezzotint.backbones.Preset`.
    licence: of the weights, printed on load. where: how to get them, for docs and errors.
    """

    backbone: str
    pattern: str
    config: Callable[..., Any]
    keys: Callable[[Any], dict[str, tuple[Rows, ...]]]
    constants: Callable[[Any], dict[str, Tensor]] = _no_constants
    codec: Callable[[Any], str] = _pixels
    licence: str
    where: str


registry: Registry[Official] = Registry("official family", __name__)
