"""Multiply-accumulates of a network, counted on the meta device by PyTorch's own counter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.backbones import Backbone, dummy_condition, native_size

GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class MacCount:
    """Multiply-accumulates of one forward pass of one image; each is two floating-point operations.

    computed: what the forward pass computes.
    attention: the part of `computed` in the two matrix products of attention.
    skipped: work of the published network that has no effect and that the forward pass leaves out.
    """

    computed: int
    attention: int
    skipped: int

    @property
    def published(self) -> int:
        """The count of the published network, as papers report it: computed and skipped."""
        return self.computed + self.skipped


_COUNTED: dict[tuple[type[Backbone], str, int], MacCount] = {}


def count_macs(backbone: Backbone, text_tokens: int = 0) -> MacCount:
    """Count one forward pass of one image of the native size, without text by default.

    Nothing is allocated: a backbone that holds weights is built again on the meta device. Counts
    are cached by config.

    Args:
        text_tokens: of a caption, for a network that reads text.
    """
    key = type(backbone), repr(backbone.config), text_tokens  # a config need not be hashable
    if key not in _COUNTED:
        _COUNTED[key] = _count(backbone, text_tokens)
    return _COUNTED[key]


def _count(backbone: Backbone, text_tokens: int) -> MacCount:
    config = backbone.config
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        on_meta = all(p.is_meta for p in backbone.parameters())
        net = backbone if on_meta else type(backbone)(config)
        z = torch.empty(1, config.channels, *native_size(config))
        net(z, torch.empty(1), dummy_condition(config, z, text_tokens))
    macs = {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    return MacCount(
        computed=sum(macs.values()),
        attention=sum(n for op, n in macs.items() if "bmm" in op or "attention" in op),
        skipped=net.skipped_macs,
    )
