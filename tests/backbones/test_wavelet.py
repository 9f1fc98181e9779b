"""The 5/3 wavelet: exact inverse, constants, the definition's filters, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.backbones.wavelet import dwt53, idwt53


@settings(deadline=None, max_examples=30)
@given(
    levels=st.integers(0, 3),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    c=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_inverse_both_ways(levels, h, w, c, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, c, h * 2**levels, w * 2**levels, dtype=torch.float64, generator=g)
    y = dwt53(x, levels)
    assert y.shape == (2, c * 4**levels, h, w)
    torch.testing.assert_close(idwt53(y, levels), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(dwt53(idwt53(x, 0), levels), y, rtol=0, atol=0)
    free = torch.randn(y.shape, dtype=torch.float64, generator=g)
    torch.testing.assert_close(dwt53(idwt53(free, levels), levels), free, rtol=0, atol=1e-12)


def test_constants_stay_in_the_low_band():
    y = dwt53(torch.full((1, 3, 16, 8), 0.7, dtype=torch.float64), 2)
    torch.testing.assert_close(y[:, :3], torch.full((1, 3, 4, 2), 0.7, dtype=torch.float64))
    assert not y[:, 3:].any()


def test_interior_impulse_response_is_the_53_filter_pair():
    x = torch.eye(16, dtype=torch.float64)[:, None, None, :].expand(
        16, 1, 2, 16
    )  # one impulse per batch row, along w
    low, high, *_ = dwt53(x, 1)[:, :, 0, 4].unbind(
        1
    )  # output column 4 sees columns 6...10 of the input
    expected_low = torch.zeros(16, dtype=torch.float64)
    expected_low[6:11] = torch.tensor([-1 / 8, 1 / 4, 3 / 4, 1 / 4, -1 / 8], dtype=torch.float64)
    expected_high = torch.zeros(16, dtype=torch.float64)
    expected_high[8:11] = torch.tensor([-1 / 2, 1, -1 / 2], dtype=torch.float64)
    torch.testing.assert_close(low, expected_low)
    torch.testing.assert_close(high, expected_high)


def test_axes_may_be_exchanged():
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    ll, lh, hl, hh = dwt53(x, 1).chunk(4, 1)
    ll2, lh2, hl2, hh2 = dwt53(x.mT, 1).mT.chunk(4, 1)
    for a, b in ((ll, ll2), (lh, hl2), (hl, lh2), (hh, hh2)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_gradient():
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dwt53(x, 2), x)
    assert torch.autograd.gradcheck(
        lambda x: idwt53(x, 1), x.detach().reshape(1, 8, 2, 2).requires_grad_()
    )


@pytest.mark.parametrize(
    ("shape", "levels"), [((1, 3, 6, 8), 2), ((1, 3, 8, 7), 1), ((1, 3, 8, 8), -1)]
)
def test_bad_sizes(shape, levels):
    with pytest.raises(ValueError, match=r"divisible|negative"):
        dwt53(torch.zeros(shape), levels)


def test_bad_channels():
    with pytest.raises(ValueError, match="multiple of 16"):
        idwt53(torch.zeros(1, 12, 4, 4), 2)
