"""Every network and the wavelet against numbers recorded by tests/helpers/golden.py, in float64.

The tolerance leaves room for float32 sines and cosines, which DiffiT's time embedding has.
"""

import json

import pytest
import torch

from helpers import golden

RECORDED = json.loads(golden.FILE.read_text())


def assert_as_recorded(out, name):
    expected = RECORDED[name]
    assert list(out.shape) == expected["shape"]
    found = golden.summarise(out)
    values = torch.tensor(expected["values"], dtype=torch.float64)
    assert expected["rms"] > 1e-3
    torch.testing.assert_close(
        torch.tensor(found["values"], dtype=torch.float64),
        values,
        rtol=0,
        atol=1e-6 * expected["rms"],
    )
    assert found["rms"] == pytest.approx(expected["rms"], rel=1e-6)


@pytest.mark.parametrize("preset", golden.PRESETS)
def test_network_gives_the_recorded_output(preset):
    assert_as_recorded(golden.run_model(preset), preset)


def test_wavelet_gives_the_recorded_bands():
    assert_as_recorded(golden.run_wavelet(), "wavelet")


def test_a_small_change_is_noticed():
    preset = golden.PRESETS[0]
    with pytest.raises(AssertionError):
        assert_as_recorded(golden.run_model(preset) * (1 + 1e-4), preset)


def test_every_tiny_preset_is_recorded():
    assert sorted(RECORDED) == sorted([*golden.PRESETS, "wavelet"])
