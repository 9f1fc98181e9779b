"""The depthwise convolution against torch's own, outputs and gradients, in float64 and mixed precision."""

import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.backbones.kernels import depthwise
from mezzotint.backbones.kernels.depthwise import residual_depthwise, residual_op


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


# ---- what CUDA runs, here on the CPU: torch's own kernel against itself or against another in Triton's place ---------


def through_op(x, weight, bias):
    return residual_op(
        x, weight, bias, torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    )


@pytest.fixture
def no_choice_made(monkeypatch):
    monkeypatch.setattr(depthwise, "choices", {})


def example(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs():
    return example(2, 9, 8, 6), example(6, 1, 7, 7, seed=1), example(6, seed=2)


@pytest.mark.parametrize("mixed", [False, True])
def test_op_and_its_gradients(no_choice_made, monkeypatch, inputs, mixed):
    monkeypatch.setattr(depthwise, "choose", lambda *_: "cudnn")
    exact = gradients(reference, *(t.double() for t in inputs), 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        ours = gradients(through_op, *inputs, 1)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < (1e-2 if mixed else 1e-5) * b.norm()


def test_op_is_sound(no_choice_made, monkeypatch, inputs):
    monkeypatch.setattr(depthwise, "choose", lambda *_: "cudnn")
    x, weight, bias = (t.requires_grad_() for t in inputs)
    torch.library.opcheck(residual_op, (x, weight, bias, torch.float32))
    torch.library.opcheck(
        residual_op, (x.detach().transpose(1, 2).requires_grad_(), weight, None, torch.float32)
    )
    torch.library.opcheck(
        depthwise.weight_gradient_op, (x.detach(), x.detach(), weight.detach(), torch.float32)
    )


def pair(factor=1.0, wait=0.0):
    """Two kernels for the same thing; the second is off by a factor, or slow."""
    calls = []

    def theirs(x, compute=None):
        return (x * 2,)

    def ours(x, compute=None):
        calls.append(x)
        time.sleep(wait)
        return (x * 2 * factor,)

    return theirs, ours, calls


def test_a_kernel_that_is_wrong_is_not_used(no_choice_made):
    theirs, ours, calls = pair(factor=1.05)
    x = torch.zeros(4, 3)  # the check draws its own numbers: with these both would agree
    with pytest.warns(UserWarning, match=r"differs from cuDNN's by 5\.0e-02"):
        out = depthwise.fastest(theirs, ours, x, compute=torch.float32)[0]
    assert torch.equal(out, x)
    checked = len(calls)
    depthwise.fastest(theirs, ours, x + 1, compute=torch.float32)
    assert len(calls) == checked


def test_a_kernel_that_fails_is_not_used(no_choice_made):
    def broken(x):
        raise RuntimeError("no ptxas")

    with pytest.warns(UserWarning, match="no ptxas"):
        assert depthwise.fastest(pair()[0], broken, torch.ones(3), compute=torch.float32)[
            0
        ].tolist() == [2, 2, 2]


def test_the_faster_kernel_is_chosen_once_for_each_kind(no_choice_made):
    theirs, ours, _ = pair()
    slow = pair(wait=0.005)[1]
    assert depthwise.choose(theirs, slow, [torch.ones(3)], torch.float32) == "cudnn"
    assert depthwise.choose(slow, theirs, [torch.ones(3)], torch.float32) == "triton"
    for n in (3, 3, 4):
        depthwise.fastest(theirs, ours, torch.ones(n), compute=torch.float32)
    assert len(depthwise.choices) == 2


def test_deterministic_algorithms_are_cudnns(no_choice_made):
    theirs, ours, calls = pair()
    torch.use_deterministic_algorithms(True)
    try:
        depthwise.fastest(theirs, ours, torch.ones(3), compute=torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not calls
    assert not depthwise.choices
