"""Activation checkpointing of repeated blocks."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# Registers the operation named in _EXPENSIVE.
import mezzotint.backbones.kernels.depthwise  # noqa: F401

Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# What "selective" keeps: matrix products, convolutions, fused attention. Norms, activations and
# gates are cheap to compute again. Batched products are left out: torch's attention that is not
# fused adds its bias to their result in place, which would overwrite what is kept.
_EXPENSIVE = {
    _aten.mm.default, _aten.addmm.default, _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.mezzotint.residual_depthwise.default,
}  # fmt: skip


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operation in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE
    )


def run_block(
    block: nn.Module, checkpointing: Checkpointing, *inputs: Any, dropout: bool = True
) -> Tensor:
    """Return block(*inputs), keeping for the backward pass what `checkpointing` says.

    Args:
        checkpointing: "none" keeps all activations; "selective" keeps the results of matrix
            products, convolutions and fused attention, and computes the rest again; "full" keeps
            the inputs alone.
        dropout: whether the block may contain dropout, whose random state must be repeated.
            Keeping that state makes the host wait for the device.

    Errors: ValueError for another value of `checkpointing`.
    """
    if checkpointing not in get_args(Checkpointing):
        raise ValueError(
            f"checkpointing {checkpointing!r}; allowed: {', '.join(get_args(Checkpointing))}"
        )
    if checkpointing == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    chosen = selective if checkpointing == "selective" else {}
    options: Any = {"use_reentrant": False, "preserve_rng_state": dropout, **chosen}
    return checkpoint(block, *inputs, **options)  # pyright: ignore
