"""DiMR's forms for GPUs equal those for CPUs: the cascade, and padded heads."""

import pytest
import torch

from mezzotint.backbones import dimr_blocks, dimr_cascade


def close(ours, theirs, tolerance):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_sums_give_the_statistics_of_the_concatenation():
    generator = torch.Generator().manual_seed(0)
    features = [3 + torch.randn(2, 4, 4, 24, generator=generator) * (i + 1) for i in range(5)]
    joined = torch.cat(features, dim=-1).double()
    mean = joined.mean(-1, keepdim=True)
    rstd = (joined.var(-1, keepdim=True, correction=0) + 1e-5).rsqrt()
    for statistics in (dimr_cascade.statistics, dimr_cascade.joint_statistics):
        for found, expected in zip(statistics(features), (mean, rstd), strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    flat = [torch.ones(1, 1, 1, 8)] * 2  # the difference of equal moments may be negative
    assert torch.allclose(dimr_cascade.statistics(flat)[1], torch.tensor(1e-5).rsqrt(), rtol=0.02)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_cascade_of_gpus_equals_that_of_cpus(low):
    torch.manual_seed(0)
    count = 11  # the CPU takes 8 at once
    cascade = dimr_cascade.Cascade(6, count, 4, 2)
    stream = [torch.float32] + [low] * (count - 1)
    features = [torch.randn(2, 3, 5, 6).to(dtype).requires_grad_() for dtype in stream]
    gain, shift = (torch.randn(2, 1, 1, 6 * count, requires_grad=True) for _ in range(2))
    weights = [gain, shift, cascade.project.weight, cascade.project.bias]
    cotangent = torch.randn(2, 3, 5, 16)
    out = dimr_cascade.NormedProjectionCPU.apply(*weights, low, *features)
    expected = torch.autograd.grad(out, [*weights, *features], cotangent)
    fast = dimr_cascade.NormedProjection.apply(*weights, low, cascade.parts, *features)
    found = torch.autograd.grad(fast, [*weights, *features], cotangent)
    tolerance = 1e-5 if low == torch.float32 else 0.02
    close(fast, out, tolerance)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        close(a, b, tolerance)


def test_padded_heads_change_nothing(monkeypatch):
    torch.manual_seed(0)
    layer = dimr_blocks.Attention(20, 2, "RMSN").double()
    x = torch.randn(2, 5, 20, dtype=torch.float64, requires_grad=True)
    assert [layer.padding(kind) for kind in ("cpu", "meta", "cuda")] == [0, 0, 6]
    out = layer(x)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(out, [x, *layer.parameters()], cotangent)
    monkeypatch.setattr(layer, "padding", lambda device_type: 6)
    padded = layer(x)
    close(padded, out, 1e-14)
    found = torch.autograd.grad(padded, [x, *layer.parameters()], cotangent)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-13)
