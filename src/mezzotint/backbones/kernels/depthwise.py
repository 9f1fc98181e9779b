"""x + depthwise convolution of x, channels last: on a CPU with a quick weight gradient, on a GPU by the faster kernel.

CPU: oneDNN takes 8 to 11 (float32) or 18 to 53 times (bf16) as long for the weight gradient of a 7x7 depthwise
convolution as for the convolution itself, though the arithmetic is the same. That gradient is a depthwise convolution
too, of the input by the output's gradient, and the kernel for those is quick (docs/performance.md).

CUDA: cuDNN or Triton, whichever is faster for the shape, see `choose`.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_TRITON = (
    importlib.util.find_spec("triton") is not None
)  # CUDA builds of torch for Linux bring it
Kernel = Literal["cudnn", "triton"]
Work = Callable[..., tuple[Tensor, ...]]


def residual_depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x plus each channel convolved with its own square kernel of odd side k, zeros around.

    Under autocast the convolution runs in its dtype; the sum is of x's dtype, or wider.

    Args:
        x: (b, h, w, c), contiguous for speed. weight: (c, 1, k, k). bias: (c,).

    Returns:
        (b, h, w, c).
    """
    compute = working_dtype(x)
    if x.device.type == "cuda" and x.dtype != torch.float64 and HAS_TRITON:
        return torch.ops.mezzotint.residual_depthwise(x, weight, bias, compute)
    if x.device.type == "cpu" and torch.is_grad_enabled() and weight.requires_grad:
        return x + DepthwiseCPU.apply(x.to(compute), weight.to(compute), bias.to(compute))
    return x + convolve(x.to(compute), weight.to(compute), bias.to(compute))


def working_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else x's own."""
    kind = x.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if mixed else x.dtype


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (b, h, w, c), weight (c, 1, k, k) -> (b, h, w, c)."""
    # The permuted view is a channels-last image and so is the convolution's result: no copy either way.
    image = F.conv2d(
        x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)
    )
    return image.permute(0, 2, 3, 1)


class DepthwiseCPU(torch.autograd.Function):
    """`convolve`, its gradients as convolutions of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution."""
        ctx.save_for_backward(x, weight)
        return convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of x, weight and bias."""
        (grad,), (x, weight) = grads, ctx.saved_tensors
        d_x = convolve(grad, weight.flip(2, 3)) if ctx.needs_input_grad[0] else None
        return d_x, cpu_weight_gradient(x, grad, weight.shape[-1]), grad.sum((0, 1, 2))


def cpu_weight_gradient(x: Tensor, grad: Tensor, k: int) -> Tensor:
    """(c, 1, k, k): over all pixels p, the sum of grad[p] x[p + offset], for each offset within k // 2.

    As one convolution: the channels of every image are its channels, and grad is its kernels.
    """
    b, h, w, c = x.shape

    def joined(t: Tensor) -> Tensor:
        return t.permute(1, 2, 0, 3).reshape(1, h, w, b * c).permute(0, 3, 1, 2)

    each = F.conv2d(joined(x), joined(grad).transpose(0, 1), padding=k // 2, groups=b * c)
    wide = torch.promote_types(x.dtype, torch.float32)
    return each.view(b, c, 1, k, k).sum(0, dtype=wide).to(x.dtype)


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def cudnn_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, ...]:
    """x + convolution, by cuDNN."""
    return (
        (
            x
            + convolve(
                x.to(compute), weight.to(compute), None if bias is None else bias.to(compute)
            )
        ).to(x.dtype),
    )


def triton_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """The same in one kernel, summed in float32."""
    from mezzotint.backbones.kernels import depthwise_triton

    return (depthwise_triton.forward(x, weight, bias, residual=True),)


def cudnn_weight_gradient(
    x: Tensor, grad: Tensor, weight: Tensor, compute: torch.dtype
) -> tuple[Tensor, ...]:
    """Gradients of weight and bias, by cuDNN."""
    c, _, k, _ = weight.shape
    grad_image, image = (t.to(compute).permute(0, 3, 1, 2) for t in (grad, x))
    _, d_weight, d_bias = torch.ops.aten.convolution_backward(
        grad_image,
        image,
        weight.to(compute),
        [c],
        [1, 1],
        [k // 2, k // 2],
        [1, 1],
        False,
        [0, 0],
        c,
        [False, True, True],
    )
    return d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def triton_weight_gradient(x: Tensor, grad: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The same by Triton, summed in float32."""
    from mezzotint.backbones.kernels import depthwise_triton

    return tuple(
        t.to(weight.dtype) for t in depthwise_triton.weight_gradient(x, grad, weight.shape[-1])
    )


# What the compiler and autograd see.


@torch.library.custom_op(
    "mezzotint::residual_depthwise",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, ScalarType compute) -> Tensor",
)
def residual_op(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    """`residual_depthwise`, the convolution in `compute`."""
    return fastest(cudnn_forward, triton_forward, x.contiguous(), weight, bias, compute=compute)[0]


@residual_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, compute: torch.dtype) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "mezzotint::depthwise_weight_gradient",
    mutates_args=(),
    schema="(Tensor x, Tensor grad, Tensor weight, ScalarType compute) -> (Tensor, Tensor)",
)
def weight_gradient_op(
    x: Tensor, grad: Tensor, weight: Tensor, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, in weight's dtype."""
    d_weight, d_bias = fastest(
        cudnn_weight_gradient,
        triton_weight_gradient,
        x.contiguous(),
        grad.contiguous(),
        weight,
        compute=compute,
    )
    return d_weight, d_bias


@weight_gradient_op.register_fake
def _(x: Tensor, grad: Tensor, weight: Tensor, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.compute = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    d_x = (
        residual_op(grad, weight.flip(2, 3), None, ctx.compute) if ctx.needs_input_grad[0] else None
    )
    d_weight, d_bias = weight_gradient_op(x, grad, weight, ctx.compute)
    return d_x, d_weight, d_bias if ctx.needs_input_grad[2] else None, None


residual_op.register_autograd(_backward, setup_context=_setup_context)

# The choice.


choices: dict[Any, Kernel] = {}  # by operation, device, shapes and dtypes


def fastest(
    by_cudnn: Work, by_triton: Work, *tensors: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, ...]:
    """The result of the kernel that was chosen for such tensors, or is now, at the first of their kind.

    Nothing can be timed while a CUDA graph is recorded; where torch is asked for deterministic algorithms, a timing,
    which may fall out differently the next time, must not choose; and Triton's kernels do not know empty batches. All
    that means cuDNN's kernel.
    """
    if torch.are_deterministic_algorithms_enabled() or not all(
        t is None or t.numel() for t in tensors
    ):
        return by_cudnn(*tensors, compute)
    kinds = [None if t is None else (t.device, t.shape, t.dtype) for t in tensors]
    key = (by_cudnn.__name__, compute, *kinds)
    if key not in choices:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return by_cudnn(*tensors, compute)
        choices[key] = choose(by_cudnn, by_triton, tensors, compute)
    return by_cudnn(*tensors, compute) if choices[key] == "cudnn" else by_triton(*tensors)


def choose(
    by_cudnn: Work, by_triton: Work, like: Sequence[Tensor | None], compute: torch.dtype
) -> Kernel:
    """The faster kernel on random tensors; cuDNN's, with a warning, where Triton's fails or disagrees with it."""

    def drawn(t: Tensor) -> Tensor:
        generator = torch.Generator(t.device).manual_seed(0)
        return torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)

    tensors = [None if t is None else drawn(t) for t in like]
    try:
        for ours, theirs in zip(by_triton(*tensors), by_cudnn(*tensors, compute), strict=True):
            error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
            if not error < (
                1e-2 if compute == torch.float32 else 3e-2
            ):  # float32 may be computed as TF32
                raise ValueError(f"its result differs from cuDNN's by {error:.1e} of its norm")
        faster = seconds(lambda: by_triton(*tensors)) < seconds(lambda: by_cudnn(*tensors, compute))
    except (
        Exception
    ) as error:  # whatever a compiler may throw: the slower kernel is right, and the run goes on
        warnings.warn(
            f"depthwise convolutions by cuDNN, since Triton's kernel failed: {error}", stacklevel=2
        )
        return "cudnn"
    return "triton" if faster else "cudnn"


def seconds(work: Callable[[], Sequence[Tensor]], runs: int = 5) -> float:
    """The quickest of a few runs, launch included, after one that does not count."""
    device = work()[0].device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    taken = []
    for _ in range(runs):
        began = now()
        work()
        taken.append(now() - began)
    return min(taken)
