"""The attention shared by the backbones."""

import torch

from mezzotint.backbones.layers import attention


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
