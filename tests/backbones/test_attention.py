"""The attention shared by the backbones."""

import pytest
import torch

from mezzotint.backbones.layers import attention, written_out_attention


def test_bf16_attention_is_near_float32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 33, 20, requires_grad=True) for _ in range(3))
    grad = torch.randn(2, 3, 33, 20)
    exact = attention(q, k, v)
    expected = torch.autograd.grad(exact, (q, k, v), grad)
    low = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - exact).norm() < 0.02 * exact.norm()
    for a, b in zip(torch.autograd.grad(low, (q, k, v), grad.bfloat16()), expected, strict=True):
        assert (a - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_written_out_attention_is_the_fused_one(masked, scale):
    torch.manual_seed(0)
    q = torch.randn(2, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]]) if masked else None
    mask = None if mask is None else mask[:, None, None]
    one, other = (form(q, k, v, mask, scale) for form in (written_out_attention, attention))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    grad = torch.randn_like(one)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), grad) for o in (one, other)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
