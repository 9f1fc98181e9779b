"""What a repeated block keeps for the backward pass; shared by every backbone."""

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

import mezzotint.backbones.kernels.depthwise  # noqa: F401  (registers the operation named below)

Checkpointing = Literal["none", "selective", "full"]

_aten = torch.ops.aten
# What is dear to compute again: products, convolutions, fused attention. Norms, activations and gates are cheap, and
# batched products stay out: torch's attention that is not fused adds the bias to their result in place, which would
# spoil what is kept.
_DEAR = {
    _aten.mm.default, _aten.addmm.default, _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default, _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.mezzotint.residual_depthwise.default,
}  # fmt: skip


def _policy(context: Any, operation: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(
    block: nn.Module, checkpointing: Checkpointing, *inputs: Any, dropout: bool = True
) -> Tensor:
    """block(*inputs), keeping for the backward pass what `checkpointing` says.

    Args:
        checkpointing: "none" keeps all activations; "selective" the results of matrix products, convolutions and
            fused attention, and computes what lies between them again; "full" the inputs alone.
        dropout: whether the block may have some, whose random state must be repeated; keeping it waits for the device.

    Errors: ValueError for another word.
    """
    if checkpointing not in get_args(Checkpointing):
        raise ValueError(
            f"checkpointing {checkpointing!r}; allowed: {', '.join(get_args(Checkpointing))}"
        )
    if checkpointing == "none" or not torch.is_grad_enabled():
        return block(*inputs)
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    chosen = selective if checkpointing == "selective" else {}
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=dropout, **chosen)  # pyright: ignore
