"""The wavelet against an independent implementation."""

import numpy as np
import pytest
import torch

from mezzotint.backbones.wavelet import dwt53, idwt53


@pytest.fixture
def golden(shared):
    with np.load(shared("golden/simple/dwt.npz")) as file:
        return {name: torch.from_numpy(file[name]).double() for name in file}


@pytest.mark.parametrize("levels", [1, 2])
def test_stack(golden, levels):
    x = golden["dwt_img"].permute(2, 0, 1)[None]
    y = golden[f"dwt_stack{levels}"].permute(2, 0, 1)[None]
    torch.testing.assert_close(dwt53(x, levels), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(idwt53(y, levels), x, rtol=0, atol=1e-12)


def test_constant_gain(golden):
    bands = dwt53(torch.ones(1, 1, 8, 8, dtype=torch.float64), 1)[0, :, 2, 2]
    torch.testing.assert_close(bands, golden["dwt_const_gain"], rtol=0, atol=1e-12)
