"""DiMR's `image_input_ratio`: what is averaged before it is embedded."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

import mezzotint as mz
from mezzotint.backbones.dimr import DiMR, DiMRConfig
from mezzotint.convert.official.load import to_official
from mezzotint.process.denoiser import Cond

POOLED = DiMRConfig(
    size=16, num_classes=3, patches=(8, 2, 1), dims=(16, 8, 8), hidden_dims=(32, 16, 16),
    depths=(3, 1, 1), heads=2, image_input_ratio=(4, 1, 1),
)  # fmt: skip


@pytest.mark.parametrize("ratios", [(4, 1, 1), (8, 2, 1), (1, 2, 1)])
def test_an_averaged_input_is_a_larger_patch_of_equal_weights(ratios):
    """spec 2.3: the mean over r x r pixels, then a patch of side p / r, without rescaling."""
    torch.manual_seed(0)
    pooled = DiMR(replace(POOLED, image_input_ratio=ratios)).eval()
    whole = DiMR(replace(POOLED, image_input_ratio=())).eval()
    state = pooled.state_dict()
    for i, ratio in enumerate(ratios):
        name = f"branches.{i}.patch.weight"
        assert state[name].shape[-1] == POOLED.patches[i] // ratio
        spread = state[name].repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
        state[name] = spread / ratio**2
    whole.load_state_dict(state)
    z, label = torch.randn(2, 3, 16, 16), Cond(label=torch.tensor([0, 2]))
    noise = torch.tensor([-1.0, 2.0])
    with torch.no_grad():
        for a, b in zip(pooled(z, noise, label), whole(z, noise, label), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_ratio_of_an_averaged_input_is_a_hint():
    state = to_official(mz.create_model("dimr-tiny", **dataclasses.asdict(POOLED)))
    loaded = mz.load_official(state, heads=2, image_input_ratio=[4, 1, 1])
    assert loaded.info.config == POOLED
    with pytest.raises(ValueError, match="square input"):
        mz.load_official(state, heads=2)
    with pytest.raises(ValueError, match="3 whole numbers"):
        mz.load_official(state, heads=2, image_input_ratio=[4, 1])


@pytest.mark.parametrize("ratios", [(2, 1), (3, 1, 1), (16, 2, 1)])
def test_a_ratio_must_divide_its_patch(ratios):
    with pytest.raises(ValueError, match="divisor of each"):
        replace(POOLED, image_input_ratio=ratios)
