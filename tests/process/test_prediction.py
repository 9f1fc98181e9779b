"""Identities of the plane spanned by image and noise, in float64."""

import pytest
import torch

from mezzotint.process import logsnr as ls
from mezzotint.process import prediction

ROWS = {
    "eps": prediction.eps,
    "x": prediction.x,
    "v": prediction.v,
    "flow": prediction.flow,
    "edm": prediction.edm(0.5),
}


@pytest.mark.parametrize("name", ROWS)
def test_solve_inverts_target(name):
    logsnr = torch.linspace(-8, 8, 9, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 9, 3, 4, 4, dtype=torch.float64, generator=g)
    z = ls.diffuse(x, eps, logsnr)
    x2, eps2 = prediction.solve(
        ROWS[name], z, prediction.target(ROWS[name], x, eps, logsnr), logsnr
    )
    torch.testing.assert_close(x2, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(eps2, eps, rtol=0, atol=1e-11)


def test_edm_row_at_unit_std_is_minus_v():
    logsnr = torch.linspace(-20, 20, 81, dtype=torch.float64)
    for edm, v in zip(prediction.edm(1.0)(logsnr), prediction.v(logsnr), strict=True):
        torch.testing.assert_close(edm, -v, rtol=0, atol=1e-15)


def test_edm_row_matches_edm_table_1():
    s = torch.logspace(-2, 2, 50, dtype=torch.float64)
    d = 0.5
    c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
    a, b = prediction.edm(d)(-2 * s.log())
    torch.testing.assert_close(a, (1 - c_skip) / c_out)
    torch.testing.assert_close(b, -c_skip * s / c_out)
