"""x + depthwise convolution of x, for maps with the channels last.

CPU: oneDNN takes 8 to 11 (float32) or 18 to 53 times (bf16) as long for the weight gradient of a
7x7 depthwise convolution as for the convolution, though both do the same arithmetic. That gradient
is itself a depthwise convolution of the input by the output's gradient, for which oneDNN has a
quick kernel; `DepthwiseCPU` computes it so (docs/performance.md).

CUDA: cuDNN, or the Triton kernels of `depthwise_triton`; the recipe's `engine.depthwise` chooses.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DepthwiseKernel = Literal["cudnn", "triton"]  # of CUDA; a CPU has its own


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise convolution of x, for maps with the channels last."""

    kernel: DepthwiseKernel = "cudnn"

    def __init__(self, dim: int, kernel_size: int):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, input: Tensor) -> Tensor:
        """(b, h, w, d) -> (b, h, w, d)."""
        return residual_depthwise(input, self.weight, self.get_parameter("bias"), self.kernel)


def check_depthwise_kernel(kernel: DepthwiseKernel) -> None:
    """Check that this machine can run `kernel`.

    Errors: ValueError for another name, and for "triton" where triton or CUDA is missing.
    """
    if kernel not in (known := get_args(DepthwiseKernel)):
        raise ValueError(f"there is no depthwise kernel {kernel!r}; known: {', '.join(known)}")
    if kernel != "triton":
        return
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "engine.depthwise is triton, but triton is not installed; "
            "pip install triton, or choose cudnn"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "engine.depthwise is triton, but its kernels need an NVIDIA GPU and this machine has "
            "none; choose cudnn"
        )


def residual_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, kernel: DepthwiseKernel = "cudnn"
) -> Tensor:
    """Return x plus each channel convolved with its own square kernel of odd side k, zeros around.

    Under autocast the convolution runs in its dtype; Triton's kernel sums in float32. The result
    has x's dtype, or a wider one.

    Args:
        x: (b, h, w, c), contiguous for speed; float32, bfloat16 or float16 for Triton.
        weight: (c, 1, k, k). bias: (c,).
        kernel: what computes it on CUDA, see `check_depthwise_kernel`.

    Returns:
        (b, h, w, c).
    """
    if kernel == "triton":
        return torch.ops.mezzotint.residual_depthwise(x, weight, bias)
    compute = compute_dtype(x)
    inputs = x.to(compute), weight.to(compute), bias.to(compute)
    trained = torch.is_grad_enabled() and weight.requires_grad
    if x.device.type == "cpu" and trained:
        return x + DepthwiseCPU.apply(*inputs)
    return x + convolve(*inputs)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on, else x's own."""
    return autocast_dtype(x.device.type) or x.dtype


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Return autocast's dtype where it is on for tensors of a device, else None."""
    # torch.amp.is_autocast_available would know about meta, but before torch 2.13 the compiler
    # cannot trace it and breaks the graph of each block.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve x (b, h, w, c) with weight (c, 1, k, k), to (b, h, w, c)."""
    # The permuted view is a channels-last image, and so is the result: no copy either way.
    image = F.conv2d(
        x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)
    )
    return image.permute(0, 2, 3, 1)


# --- CPU: gradients as convolutions --------------------------------------------------------------


class DepthwiseCPU(torch.autograd.Function):
    """`convolve`, with both gradients computed as convolutions of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the convolution."""
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the gradients of x, weight and bias."""
        (grad,), (x, weight) = grads, ctx.saved_tensors
        d_x = convolve(grad, weight.flip(2, 3)) if ctx.needs_input_grad[0] else None
        return d_x, cpu_weight_gradient(x, grad, weight.shape[-1]), grad.sum((0, 1, 2))


def cpu_weight_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """Return (c, 1, k, k): for each offset within k // 2, the sum of grad[p] x[p + offset].

    The sum runs over all pixels p. It is one convolution: its channels are the channels of every
    image, its kernels are `grad`.
    """
    b, h, w, c = x.shape

    def joined(t: Tensor) -> Tensor:
        return t.permute(1, 2, 0, 3).reshape(1, h, w, b * c).permute(0, 3, 1, 2)

    each = F.conv2d(joined(x), joined(grad).transpose(0, 1), padding=k // 2, groups=b * c)
    wide = torch.promote_types(x.dtype, torch.float32)
    return each.view(b, c, 1, k, k).sum(0, dtype=wide).to(x.dtype)


# --- CUDA: Triton's kernels as operations that the compiler and autograd know --------------------


@torch.library.custom_op(
    "mezzotint::residual_depthwise",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
)
def residual_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`residual_depthwise` by Triton."""
    from mezzotint.backbones.kernels import depthwise_triton

    return depthwise_triton.forward(x.contiguous(), weight, bias, residual=True)


@residual_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "mezzotint::depthwise_weight_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor weight) -> (Tensor, Tensor)",
)
def weight_gradient_op(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias by Triton, in weight's dtype."""
    from mezzotint.backbones.kernels import depthwise_triton

    d_weight, d_bias = depthwise_triton.weight_gradient(
        x.contiguous(), grad.contiguous(), weight.shape[-1]
    )
    return d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@weight_gradient_op.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    # The gradient of x + convolution(x) is the same operation, with the kernels turned around.
    d_x = residual_op(grad, weight.flip(2, 3), None) if ctx.needs_input_grad[0] else None
    d_weight, d_bias = weight_gradient_op(x, grad, weight)
    return d_x, d_weight, d_bias if ctx.needs_input_grad[2] else None


residual_op.register_autograd(_backward, setup_context=_setup_context)
