"""The step model without CUDA: bytes and FLOP of operations, fusion, the backward walk.

Expected bytes and FLOP are counted by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

import mezzotint as mz
from mezzotint.process.denoiser import Cond

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def model():
    """The modules of the step model, which lie beside each other."""
    if not Path(BENCHMARKS).exists():
        pytest.skip("benchmarks are not part of the source distribution")
    sys.path.insert(0, BENCHMARKS)
    try:
        import fake_cuda
        import fusion_model
        import kernel_counts
    finally:
        sys.path.remove(BENCHMARKS)
    return fake_cuda, fusion_model, kernel_counts


def counted(kernel_counts, function):
    counts = kernel_counts.Counts()
    with kernel_counts.CountingMode(counts):
        function()
    return {
        name: (kernel.count, kernel.bytes, kernel.flop)
        for (name, _, _), kernel in counts.kernels.items()
    }


def test_operations_move_their_arguments_and_results(model):
    counts = model[2]
    x, w, row = torch.randn(8, 16), torch.randn(4, 16), torch.randn(16)
    assert counted(counts, lambda: x @ w.t()) == {"mm": (1, 4 * (128 + 64 + 32), 2 * 8 * 16 * 4)}
    assert counted(counts, lambda: x.view(4, 32)[1:].t()) == {}
    assert counted(counts, lambda: x + row.expand(8, 16)) == {"add": (1, 4 * (128 + 16 + 128), 0)}
    assert counted(counts, lambda: x.clone().mul_(2)) == {
        "clone": (1, 1024, 0),
        "mul_": (1, 1024, 0),
    }
    assert counted(counts, lambda: torch.empty(8, 16).copy_(x)) == {"copy_": (1, 1024, 0)}


def test_a_kernel_takes_the_time_of_its_bytes_or_of_its_flop(model):
    kernel = model[2].Kernel()
    kernel.add(3.9e9, 680e9, 680e12)  # a millisecond each
    kernel.add(3.9e9)
    assert (kernel.milliseconds, kernel.arithmetic) == pytest.approx((2, 1))


def fused(model, function, *inputs):
    graph = make_fx(function, tracing_mode="fake")(*inputs)
    return sorted((row[0], row[3]) for row in model[1].fused_kernels(graph, backward=False))


def test_elementwise_chains_and_row_reductions_are_one_kernel(model):
    x, y, w = torch.randn(8, 16), torch.randn(8, 16), torch.randn(16, 4)
    size = 4 * 8 * 16
    assert fused(model, lambda x, y: (x + y).exp() * 2, x, y) == [("fused elementwise", 3 * size)]

    def normed(x):
        return x * (x.square().sum(-1, keepdim=True) + 1e-5).rsqrt()

    assert fused(model, normed, x) == [("fused reduction", 2 * size)]
    # The product needs its input in memory, and what follows it is a kernel of its own.
    rows = fused(model, lambda x, w: (normed(x) @ w).exp(), x, w)
    small, weight = 4 * 8 * 4, 4 * 16 * 4
    assert rows == [
        ("fused elementwise", 2 * small),
        ("fused reduction", 2 * size),
        ("mm", size + weight + small),
    ]


def test_reductions_along_other_axes_read_again(model):
    x = torch.randn(8, 16)
    size = 4 * 8 * 16
    rows = fused(model, lambda x: (x.exp().sum(-1), x.exp().sum(0)), x)
    assert rows == [("fused reduction", size + 4 * 8), ("fused reduction", size + 4 * 16)]


def test_of_several_results_a_kernel_reads_only_those_it_uses(model):
    x, w, grad = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3), torch.randn(2, 5, 8, 8)

    def weight_gradient(mask):
        def function(x, w, grad):
            results = torch.ops.aten.convolution_backward(
                grad, x, w, [5], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
            )
            return results[1].exp()

        return function

    moved = 2 * 4 * 5 * 3 * 3 * 3
    assert ("fused elementwise", moved) in fused(model, weight_gradient([True] * 3), x, w, grad)
    assert ("fused elementwise", moved) in fused(
        model, weight_gradient([False, True, False]), x, w, grad
    )


def test_of_a_stored_result_a_kernel_reads_only_its_view(model):
    x, w = torch.randn(8, 16), torch.randn(16, 12)
    product = 4 * (8 * 16 + 16 * 12 + 8 * 12)
    third, whole = 4 * 8 * 4, 4 * 8 * 12
    first = fused(model, lambda x, w: (x @ w)[:, :4].exp(), x, w)
    assert first == [("fused elementwise", 2 * third), ("mm", product)]
    gated = fused(model, lambda x, w: (lambda y: y[:, :4].exp() * y[:, 8:])(x @ w), x, w)
    assert gated == [("fused elementwise", 3 * third), ("mm", product)]
    both = fused(model, lambda x, w: (lambda y: y.exp() * y[:, :1])(x @ w), x, w)
    assert both == [("fused elementwise", 2 * whole), ("mm", product)]
    row = torch.randn(16)
    assert fused(model, lambda x, row: x + row.expand(8, 16).exp(), x, row) == [
        ("fused elementwise", 4 * (8 * 16 + 16 + 8 * 16))
    ]


def test_a_norm_and_its_statistics_are_one_kernel(model):
    def normed(x):
        variance, mean = torch.var_mean(x, -1, keepdim=True)
        return (x - mean) * (variance + 1e-6).rsqrt()

    size = 4 * 8 * 16
    assert fused(model, normed, torch.randn(8, 16)) == [("fused reduction", 2 * size)]
    # The mean alone is a result of its own.
    rows = fused(model, lambda x: torch.var_mean(x, -1)[1].exp(), torch.randn(8, 16))
    assert rows == [("fused reduction", size + 4 * 8)]


def test_the_walk_gives_the_gradients_of_autograd(model):
    fake_cuda = model[0]
    torch.manual_seed(0)
    net = mz.create_model("dimr-tiny", size=8, dims=(32, 16, 16), hidden_dims=(32, 16, 16)).backbone
    z, noise, cond = torch.randn(2, 3, 8, 8), torch.tensor([-1.0, 2.0]), Cond()

    def loss():
        net.zero_grad()
        return sum(out.square().mean() for out in net(z, noise, cond))

    visited = []
    fake_cuda.backward(loss(), visited.append)
    found = [p.grad for p in net.parameters()]
    assert len(visited) > 100
    loss().backward()
    for own, p in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(own, p.grad, rtol=1e-5, atol=1e-7)
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    unused = torch.randn(2, requires_grad=True)
    out, grad = F.linear(x, w).relu(), torch.randn(3, 5)
    expected = torch.autograd.grad(out, [x, w, unused], grad, allow_unused=True, retain_graph=True)
    found = fake_cuda.gradients([out], [x, w, unused], [grad])
    assert found[2] is expected[2] is None
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_attention_kernels_of_compute_capability_9(model):
    choose = model[0].attention_kernel
    half = torch.bfloat16
    assert choose(64, half, False, False) == "cudnn"
    assert choose(60, half, False, False) == "flash"  # no multiple of 8
    assert choose(72, half, True, False) == "cudnn"
    assert choose(72, half, True, True) == "efficient"  # a mask that is trained
    assert choose(512, half, False, False) == "efficient"
    assert choose(64, torch.float32, False, False) == "efficient"
