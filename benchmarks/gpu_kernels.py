"""Single kernels on a GPU: the depthwise convolution, attention in every form, DiMR's cascade."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import plain.forms as forms_of
from depthwise import torch_weight_gradient
from gpu_checks import difference
from gpu_rows import Clock, Row, in_time
from mezzotint.backbones.dimr_cascade import Cascade
from mezzotint.backbones.kernels import depthwise
from mezzotint.tools.benchmark import measure_matmul_flops, time_interleaved


def machine(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """The rates that bound everything: a copy and a bf16 product."""
    n = 2**20 if small else 2**30
    source = torch.empty(n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = time_interleaved({"copy": lambda: target.copy_(source)}, device)["copy"]
    yield {"copy_bytes_per_second": 2 * n / seconds}
    for precision in ("bf16", "float32"):
        rate = measure_matmul_flops(device, precision, 256 if small else None)
        yield {"product": precision, "flops": rate}


def drawn(device: str, count: int, *shape: int) -> list[Tensor]:
    """Random bf16 tensors that want gradients."""
    return [
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(count)
    ]


def often(work: Callable[[], object], times: int = 20) -> Callable[[], None]:
    """`work` many times, so that what a launch costs is hidden as it is within a network."""

    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated


def depthwise_kernels(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """Time the 7x7 depthwise convolution with its residual, and its weight gradient.

    By cuDNN in two layouts and, where triton is installed, by Triton, whose results are checked.
    """
    triton = device == "cuda" and importlib.util.find_spec("triton") is not None
    float32, bf16 = torch.float32, torch.bfloat16
    for b, c, side in [(2, 16, 8)] if small else [(64, 480, 32)]:
        for kept, low in ((bf16, bf16), (float32, float32)):
            if clock.left < 4:
                return
            x, grad = (torch.randn(b, side, side, c, device=device, dtype=kept) for _ in range(2))
            weight, bias = torch.randn(c, 1, 7, 7, device=device), torch.randn(c, device=device)
            low_x, low_grad, low_weight = x.to(low), grad.to(low), weight.to(low)
            image = low_x.permute(0, 3, 1, 2).contiguous()
            works: dict[str, Callable[[], object]] = {
                "forward": lambda low_x=low_x, low_weight=low_weight, x=x, bias=bias: (
                    x + depthwise.convolve(low_x, low_weight, bias.to(low_x.dtype))
                ),
                "weight gradient": partial(torch_weight_gradient, low_x, low_grad, low_weight),
                "forward, NCHW, without the residual": partial(
                    F.conv2d, image, low_weight, bias.to(low), padding=3, groups=c
                ),
            }
            row: Row = {
                "kernel": "depthwise 7x7",
                "shape": [b, side, side, c],
                "kept": str(kept),
                "low": str(low),
            }
            if triton:
                ours = partial(depthwise.residual_op, x, weight, bias)
                our_gradient = partial(depthwise.weight_gradient_op, x, grad, weight)
                works |= {"forward, Triton": ours, "weight gradient, Triton": our_gradient}
                exact_x, exact_weight = x.double(), weight.double()
                row["differences"] = [
                    difference(
                        ours(), exact_x + depthwise.convolve(exact_x, exact_weight, bias.double())
                    ),
                    difference(
                        our_gradient()[0],
                        torch_weight_gradient(exact_x, grad.double(), exact_weight),
                    ),
                ]
                row["ok"] = max(row["differences"]) < (1e-5 if kept == float32 else 1e-2)
            seconds = time_interleaved({name: often(work) for name, work in works.items()}, device)
            row["seconds"] = {name: taken / 20 for name, taken in seconds.items()}
            row["least seconds at 4.3 TB/s"] = 2 * x.numel() * x.element_size() / 4.3e12
            yield row


def attention(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """Time attention with its gradients: DiMR's heads, U-ViT's wide ones, DiffiT's biased ones."""
    n = 17 if small else 257
    tasks: list[tuple[Row, float, Callable[[], Row]]] = []
    for heads, d in ((2, 12),) if small else ((16, 60), (16, 64), (16, 72)):
        row = {"kernel": "attention", "heads": heads, "width": d, "tokens": n}
        tasks.append((row, 2.0, partial(_attention, device, 4 if small else 64, heads, n, d)))
    wide = (2, 2, 16, 48) if small else (32, 4, 256, 512)
    row = dict(zip(("kernel", "batch", "heads", "tokens", "width"), ("wide", *wide), strict=True))
    tasks.append((row, 2.0, partial(_wide_attention, device, *wide)))
    batch, tokens = (2, 16) if small else (64, 256)
    # FlexAttention is last in its part: should it break the device, every other row is written.
    # It has no backward pass on the CPU.
    forms = ["fused, bias as mask", "written out"]
    forms += ["FlexAttention"] if device != "cpu" else []
    for form in forms:
        row = {"kernel": "biased attention", "form": form, "batch": batch, "tokens": tokens}
        tasks.append((row, 10.0, partial(_biased_attention, device, batch, tokens, form)))
    yield from in_time(clock, tasks, device)


def _attention(device: str, batch: int, heads: int, n: int, d: int) -> Row:
    q, k, v = drawn(device, 3, batch, heads, n, d)
    grad = torch.randn_like(q)

    def plain() -> None:
        F.scaled_dot_product_attention(q, k, v).backward(grad)

    def padded() -> None:
        wide = (F.pad(t, (0, -d % 64)) for t in (q, k, v))
        F.scaled_dot_product_attention(*wide, scale=d**-0.5)[..., :d].backward(grad)

    return {"seconds": time_interleaved({"as it is": plain, "padded": padded}, device)}


def _wide_attention(device: str, batch: int, heads: int, n: int, d: int) -> Row:
    """Time heads of 512, which only one of torch's fused kernels takes."""
    q, k, v = drawn(device, 3, batch, heads, n, d)
    grad = torch.randn_like(q)

    def written() -> None:
        scores = (q * d**-0.5) @ k.transpose(-2, -1)
        (scores.softmax(-1).to(v.dtype) @ v).backward(grad)

    def fused() -> None:
        F.scaled_dot_product_attention(q, k, v).backward(grad)

    return {"seconds": time_interleaved({"fused": fused, "written out": written}, device)}


def _biased_attention(device: str, batch: int, n: int, form: str) -> Row:
    """Time DiffiT's attention with the gradient of its bias, in one form, compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    heads, d = 16, 72
    q, k, v = drawn(device, 3, batch, heads, n, d)
    bias = torch.randn(1, heads, n, n, device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(q)

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, h, i, j]

    forms: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "fused, bias as mask": lambda q, k, v, bias: F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias
        ),
        "written out": forms_of.written_biased,
        "FlexAttention": lambda q, k, v, bias: flex_attention(q, k, v, score_mod=biased),
    }
    chosen: Callable[..., Tensor] = forms[form]
    if device == "cuda":
        chosen = torch.compile(chosen, dynamic=False)
    exact = forms_of.written_biased(q, k, v, bias).detach()
    work = lambda: chosen(q, k, v, bias).backward(grad)  # noqa: E731
    return {
        "difference": difference(chosen(q, k, v, bias).detach(), exact),
        "seconds": time_interleaved({form: work}, device)[form],
    }


def cascade(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """Time DiMR-XL's cascade from its first branch to its second, forward and backward, in bf16."""
    batch, side, width, count, out = (2, 4, 32, 3, 16) if small else (64, 16, 960, 40, 480)
    tasks = [
        (
            {"kernel": "cascade", "batch": batch, "features": count, "form": form},
            seconds,
            partial(_cascade, device, batch, side, width, count, out, form),
        )
        for form, seconds in (("eager", 3.0), ("compiled", 15.0))
    ]
    yield from in_time(clock, tasks, device)


def _cascade(
    device: str, batch: int, side: int, width: int, count: int, out: int, form: str
) -> Row:
    module = Cascade(width, count, out, 2).to(device)
    if form == "compiled":
        backend = "inductor" if device == "cuda" else "aot_eager"
        module.compile_parts(partial(torch.compile, dynamic=False, backend=backend))
    features = drawn(device, count, batch, side, side, width)
    time = [torch.randn(batch, 1, 1, n, device=device) for n, _ in module.vectors]

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            result = module(features, time)
        result.float().square().mean().backward()

    return {"seconds": time_interleaved({"step": step}, device, 3)["step"]}
