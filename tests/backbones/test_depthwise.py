"""The depthwise convolution and its gradients against torch's, in float64 and mixed precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint import backbones
from mezzotint.backbones.kernels import depthwise
from mezzotint.backbones.kernels.depthwise import ResidualDepthwise, residual_depthwise
from mezzotint.models import create_model
from mezzotint.process.denoiser import Cond


def reference(x, weight, bias):
    """x and torch's convolution of an image laid out as it likes."""
    image = x.permute(0, 3, 1, 2).contiguous()
    return x + F.conv2d(
        image, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight)
    ).permute(0, 2, 3, 1)


def gradients(work, x, weight, bias, seed):
    """The output, and the gradients of a random sum of it."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = work(*inputs)
    toward = torch.randn(
        out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return [out.detach(), *torch.autograd.grad((out * toward.to(out.dtype)).sum(), inputs)]


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 19),
    w=st.integers(1, 19),
    c=st.integers(1, 20),
    k=st.sampled_from((1, 3, 7)),
)
def test_gradients(b, h, w, c, k):
    torch.manual_seed(h)
    x, weight, bias = (
        torch.randn(b, h, w, c).double(),
        torch.randn(c, 1, k, k).double(),
        torch.randn(c).double(),
    )
    for ours, theirs in zip(
        gradients(residual_depthwise, x, weight, bias, w),
        gradients(reference, x, weight, bias, w),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_input_without_gradient():
    x, weight = torch.randn(2, 5, 6, 4), torch.randn(4, 1, 3, 3, requires_grad=True)
    residual_depthwise(x, weight, torch.zeros(4)).sum().backward()
    expected = torch.autograd.grad(reference(x, weight, None).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("channels", [5, 32])
def test_autocast(channels):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(3, 16, 12, channels),
        torch.randn(channels, 1, 7, 7),
        torch.randn(channels),
    )
    exact = gradients(reference, x.double(), weight.double(), bias.double(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(residual_depthwise, x, weight, bias, 1)
    assert [t.dtype for t in mixed] == 4 * [torch.float32]
    for ours, wanted in zip(mixed, exact, strict=True):
        assert (ours - wanted).norm() < 0.01 * wanted.norm()


def test_triton_needs_triton_and_a_gpu(monkeypatch):
    backbone = create_model("dimr-tiny").backbone
    if not torch.cuda.is_available():
        monkeypatch.setattr(depthwise.importlib.util, "find_spec", lambda name: object())
        with pytest.raises(ValueError, match="GPU"):
            backbone.set_depthwise_kernel("triton")
    monkeypatch.setattr(depthwise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install triton"):
        backbone.set_depthwise_kernel("triton")


def test_every_convolution_gets_the_chosen_kernel(monkeypatch):
    """The networks hand the kernel on; Triton's operation is replaced by one that doubles."""
    backbone = create_model("dimr-tiny").backbone
    monkeypatch.setattr(backbones, "check_depthwise_kernel", lambda kernel: None)
    backbone.set_depthwise_kernel("triton")
    kernels = [m.kernel for m in backbone.modules() if isinstance(m, ResidualDepthwise)]
    assert kernels == len(kernels) * ["triton"]
    assert kernels
    calls = []
    monkeypatch.setattr(
        torch.ops.mezzotint,
        "residual_depthwise",
        lambda x, weight, bias: calls.append(x.shape) or x,
    )
    z = torch.randn(1, 3, 32, 32)
    backbone(z, torch.zeros(1), Cond(label=torch.zeros(1, dtype=torch.long)))
    assert len(calls) == len(kernels)
