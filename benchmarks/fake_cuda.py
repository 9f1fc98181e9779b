"""What fake CUDA tensors need beside torch's CUDA build to run a step without a GPU or a driver.

Autocast asks for a device, fused attention chooses its kernel by the device's properties, and the
engine of autograd asks the driver for its streams. Here autocast
finds one, attention follows the rules of torch's sdp_utils.cpp for compute capability 9.0, and the
engine is a walk over autograd's graph in Python.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.cuda.amp.common
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd.graph import get_gradient_edge
from torch.fx import traceback

aten = torch.ops.aten


@contextmanager
def gpu_pretended(chosen: Callable[[str], None]) -> Iterator[None]:
    """Let autocast and attention run on fake CUDA tensors within the block.

    chosen: gets the name of the kernel of each fused attention.
    """

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        return fused_attention(q, k, v, attn_mask, scale or q.shape[-1] ** -0.5, chosen)

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for owner, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (F, "scaled_dot_product_attention", attention),
            (torch.autograd, "grad", gradients),
            (torch._C, "_conv_determine_backend_memory_format", convolution_layout),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def convolution_layout(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """Return the layout of a convolution's results: channels-last where either input has it.

    As cudnn_conv_suggest_memory_format in aten/src/ATen/native/ConvUtils.h.
    """
    layouts = [suggest_memory_format(t) for t in (x, weight)]
    return torch.channels_last if torch.channels_last in layouts else torch.contiguous_format


def attention_kernel(d: int, dtype: torch.dtype, mask: bool, mask_trained: bool) -> str:
    """Return the kernel of `scaled_dot_product_attention` on compute capability 9.0.

    torch 2.11 with cuDNN 9.19 tries cuDNN, flash, efficient, math in this order
    (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).

    Args:
        d: width of a head. mask: whether there is one, mask_trained: whether it needs a gradient.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if half and d % 8 == 0 and d <= 128 and not mask_trained:
        return "cudnn"
    if half and d <= 256 and not mask:
        return "flash"
    return "efficient"


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    chosen: Callable[[str], None],
) -> Tensor:
    """Return the attention of (b, heads, n, d) by the kernel that `attention_kernel` names.

    As torch does it: flash pads d to a multiple of 8 by three copies; a mask for the efficient
    kernel is expanded to the batch, and its gradient has that size.
    """
    d = q.shape[-1]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    bias_trained = mask is not None and torch.is_grad_enabled() and mask.requires_grad
    kernel = attention_kernel(d, q.dtype, mask is not None, bias_trained)
    chosen(f"{kernel} d={d}")
    bias = None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, trained, scale=scale)[0]
    if kernel == "flash":
        q, k, v = (F.pad(t, (0, -d % 8)) if d % 8 else t for t in (q, k, v))
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0][..., :d]
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, trained, scale=scale)[0]


def backward(loss: Tensor, visit: Callable[[int | None], None]) -> None:
    """Add the gradients of `loss`, a scalar, to the `.grad` of its leaves.

    visit: gets the sequence number of each node before it runs, and None after it.
    """
    _walk({loss.grad_fn: [torch.ones_like(loss)]}, {}, visit)


def gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor], **_: Any
) -> tuple[Tensor | None, ...]:
    """Return what `torch.autograd.grad` returns, None for inputs that the outputs ignore."""
    edges = [get_gradient_edge(t) for t in inputs]
    captured = {(edge.node, edge.output_nr): None for edge in edges}
    roots: dict[Any, list[Tensor | None]] = {}
    with torch.no_grad():
        for out, grad in zip(outputs, grad_outputs, strict=True):
            edge = get_gradient_edge(out)
            _accumulate(roots, edge.node, edge.output_nr, grad)

    def visit(number: int | None) -> None:
        traceback.reset_grad_fn_seq_nr() if number is None else traceback.set_grad_fn_seq_nr(number)

    _walk(roots, captured, visit)
    return tuple(captured[edge.node, edge.output_nr] for edge in edges)


def _walk(
    inputs: dict[Any, list[Tensor | None]],
    captured: dict[tuple[Any, int], Tensor | None],
    visit: Callable[[int | None], None],
) -> None:
    """Run the graph behind the nodes in `inputs`, whose values are their gradients.

    Leaves get their gradients, unless any are `captured`: by node and index.
    """
    waiting = _count_consumers(inputs)
    useful = _ancestors(waiting, {node for node, _ in captured}) if captured else set(waiting)
    ready = [node for node in inputs if not waiting[node]]
    with torch.no_grad():
        while ready:
            # Autograd runs the node that was made last among those whose inputs are complete.
            node = max(ready, key=lambda n: n._sequence_nr())
            ready.remove(node)
            grads = inputs.pop(node, [None])
            for key in captured:
                if key[0] is node:
                    captured[key] = grads[key[1]]
            if hasattr(node, "variable"):  # a leaf
                if not captured and grads[0] is not None:
                    _add_to_leaf(node.variable, grads[0].detach())
                continue
            results: Sequence[Tensor | None] = [None] * len(node.next_functions)
            if node in useful:
                visit(node._sequence_nr())
                results = _call(node, grads)
                visit(None)
            for (following, index), grad in zip(node.next_functions, results, strict=True):
                if following is not None:
                    _accumulate(inputs, following, index, grad)
                    waiting[following] -= 1
                    if not waiting[following]:
                        ready.append(following)


def _count_consumers(roots: Iterable[Any]) -> dict[Any, int]:
    waiting: dict[Any, int] = dict.fromkeys(roots, 0)
    stack = list(waiting)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is None:
                continue
            if following not in waiting:
                waiting[following] = 0
                stack.append(following)
            waiting[following] += 1
    return waiting


def _ancestors(nodes: Iterable[Any], targets: set[Any]) -> set[Any]:
    """Return the nodes whose results a target needs."""
    consumers: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            consumers.setdefault(following, []).append(node)
    found: set[Any] = set()
    stack = list(targets)
    while stack:
        for node in consumers.get(stack.pop(), []):
            if node not in found:
                found.add(node)
                stack.append(node)
    return found


def _add_to_leaf(leaf: Tensor, grad: Tensor) -> None:
    leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def _call(node: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    if all(grad is None for grad in grads):
        return (None,) * len(node.next_functions)
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        grads = [
            torch.zeros(m.shape, dtype=m.dtype, device=m.device) if grad is None else grad
            for grad, m in zip(grads, node._input_metadata, strict=True)
        ]
        results = node.apply(*grads)
        return _tensor_results(node, results if isinstance(results, tuple) else (results,))
    results = node(*grads)
    return results if isinstance(results, tuple) else (results,)


def _tensor_results(node: Any, results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Leave out the results for arguments that are no tensors: a node has no edge for them."""
    edges = [following for following, _ in node.next_functions]
    kept: list[Tensor | None] = []
    for result, needed in zip(results, node.needs_input_grad, strict=False):
        surplus = len(kept) == len(edges) or edges[len(kept)] is not None
        if not (result is None and not needed and surplus):
            kept.append(result)
    return tuple(kept)


def _accumulate(
    inputs: dict[Any, list[Tensor | None]], node: Any, index: int, grad: Tensor | None
) -> None:
    buffer = inputs.setdefault(node, [None] * max(1, len(node._input_metadata)))
    if grad is not None:
        # Autograd sums broadcast axes and casts here, not in its formulas.
        expected = node._input_metadata[index]
        grad = grad.sum_to_size(expected.shape).to(expected.dtype)
        before = buffer[index]
        buffer[index] = grad if before is None else before + grad
