"""The sizes for one's own images, `-tiny`, `-small` and `-base`, at 64 to 256 pixels."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import mezzotint as mz
from mezzotint.backbones import get_backbone, presets
from mezzotint.backbones.flops import GIGA, count_macs
from mezzotint.backbones.inputs import (
    convolution_at,
    depth_to_space,
    patch_at,
    space_to_depth,
    wavelet_at,
)
from mezzotint.core.registry import build
from mezzotint.models import meta_model, preset_info
from mezzotint.process import schedules
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for
from mezzotint.tools.summary import read_summary

FAMILIES = ("unet", "uvit", "sid2", "diffit", "dimr")
RANGES = {"tiny": (0.5e6, 2e6), "small": (15e6, 40e6), "base": (100e6, 150e6)}


def gmac(preset, size):
    return count_macs(get_backbone(meta_model(preset_info(preset, size=size)))).published / GIGA


def widest(config):
    return max(getattr(config, "dims", ()) or [config.width * m for m in config.multipliers])


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_in_the_stated_ranges(family):
    for size, (least, most) in RANGES.items():
        name = f"{family}-{size}"
        assert least <= read_summary(name)["params"] <= most, name
        assert presets()[name][1].config.size == (32 if size == "tiny" else 64)


def test_mini_lies_between_tiny_and_small():
    tiny, mini, small = (read_summary(f"unet-{size}") for size in ("tiny", "mini", "small"))
    assert tiny["params"] < 6e6 < 2 * mini["params"] < small["params"]
    assert gmac("unet-tiny", 64) < mini["gmac"] < 0.5 * small["gmac"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(f"{family}-{scale}", size, marks=() if quick else pytest.mark.slow)
        for family in FAMILIES
        for scale, size, quick in [
            ("tiny", 256, False), ("small", 128, False), ("small", 256, True),
            ("base", 128, False), ("base", 256, False),
        ]
    ],
)  # fmt: skip
def test_the_cost_at_128_and_256_pixels_is_that_at_64(name, size):
    """The patch grows with the image, so only the first and the last layer cost more."""
    at_64 = gmac(name, 64) if name.endswith("tiny") else read_summary(name)["gmac"]
    assert 0.99 * at_64 < gmac(name, size) < 1.4 * at_64


@pytest.mark.parametrize(
    ("size", "patch"),
    [(1, 1), (16, 1), (64, 1), (65, 2), (96, 2), (128, 2), (129, 4), (256, 4), (257, 8), (512, 8)],
)
def test_a_patch_leaves_at_most_64_cells(size, patch):
    assert patch_at(size) == patch
    assert size / patch <= 64 < size / (patch / 2) or patch == 1
    assert convolution_at(size) == {"transform": "conv" if patch > 1 else "none", "patch": patch}
    assert patch_at(size, cells=32) == patch_at(2 * size)
    kind = {1: "none", 2: "dwt", 4: "dwt", 8: "conv"}[patch]
    assert wavelet_at(size) == {"transform": kind, "patch": patch}


FOLLOWING = {
    "unet": {64: ("none", 1), 128: ("dwt", 2), 256: ("dwt", 4)},
    "uvit": {64: ("none", 1), 128: ("dwt", 2), 256: ("dwt", 4)},
    "sid2": {64: ("none", 1), 128: ("conv", 2), 256: ("conv", 4)},
    "diffit": {64: (8, 1), 128: (8, 2), 256: (8, 4)},
    "dimr": {64: (4, 2, 1), 128: (8, 4, 2), 256: (16, 8, 4)},
}
FIELDS = {"diffit": ("window", "patch"), "dimr": ("patches",)}


@pytest.mark.parametrize("scale", ["tiny", "small", "base"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_transform_follows_the_size(family, scale):
    for size, expected in FOLLOWING[family].items():
        config = preset_info(f"{family}-{scale}", size=size).config
        values = [getattr(config, f) for f in FIELDS.get(family, ("transform", "patch"))]
        if (family, scale) == ("diffit", "tiny"):
            expected = (4, expected[1])  # its stages keep their window
        if (family, scale) == ("dimr", "tiny"):
            expected = tuple(2 * patch for patch in expected)  # 32 cells on a side
        assert tuple(values[0] if family == "dimr" else values) == expected
        assert config.size == size


def test_a_window_is_an_eighth_of_the_grid():
    for size, window in {32: 4, 48: 6, 64: 8, 96: 6, 160: 5}.items():
        config = preset_info("diffit-small", size=size).config
        assert (config.window, config.tile) == (window, size)


def test_fields_that_are_given_do_not_follow():
    config = preset_info("unet-small", size=128, transform="conv", patch=4).config
    assert (config.transform, config.patch) == ("conv", 4)
    config = preset_info("unet-small", size=128, patch=1).config
    assert (config.transform, config.patch) == ("none", 1)
    assert preset_info("dimr-small", size=128, patches=(4, 2, 1)).config.patches == (4, 2, 1)


@pytest.mark.parametrize("given", [{}, {"patch": 16}, {"noise_scale": 3.0}])
def test_noise_and_patch_follow_the_size_each_by_itself(given):
    config = preset_info("jit-tiny", size=512, **given).config
    assert config.patch == given.get("patch", 32)
    assert config.noise_scale == given.get("noise_scale", 2.0)


def test_published_presets_do_not_follow():
    for name in ("unet-128", "uvit-256", "sid2-128", "diffit-ffhq64", "dimr-m-3r-64"):
        own = presets()[name][1].config
        changed = preset_info(name, size=2 * own.size).config
        fields = ("transform", "patch", "patches", "window")
        assert all(getattr(own, f, 0) == getattr(changed, f, 0) for f in fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_schedule_shifts_with_the_size(family):
    """Twice the side lowers the log-SNR by 2 ln 2; SiD2's does so at its noisy end."""
    u = torch.tensor(0.999 if family == "sid2" else 0.5, dtype=torch.float64)
    levels = [
        build(schedules.registry, preset_info(f"{family}-small", size=size).schedule)(u).item()
        for size in (64, 128, 256)
    ]
    steps = [a - b for a, b in pairwise(levels)]
    assert steps == pytest.approx([2 * math.log(2)] * 2, rel=2e-3)


def test_at_the_sizes_of_the_papers_nothing_shifts():
    """DiffiT states one schedule for 32 and 64 pixels; DiMR's cosine has 64 as its reference."""
    for size in (16, 32, 64):
        spec = preset_info("diffit-tiny", size=size).schedule
        assert (spec.name, spec.options) == ("lognormal", {"mean": -1.2, "std": 1.2})
        assert preset_info("dimr-m-3r-64", size=size).schedule.options == {}
        spec = preset_info("dimr-tiny", size=size).schedule
        assert (spec.name, spec.options) == ("cosine", {"image_d": size, "noise_d": size})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_network_learns_a_step(family):
    """At 16 pixels, which costs little: outputs of the right shape, a gradient everywhere."""
    torch.manual_seed(0)
    model = mz.create_model(f"{family}-small", size=16)
    z = torch.randn(2, 3, 16, 16)
    outputs = model.raw(z, torch.tensor([-1.0, 2.0]), Cond(label=torch.tensor([3, 10])))
    assert outputs[-1].shape == z.shape
    sum((out - 1).square().mean() for out in outputs).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert any(g.any() for n, g in gradients.items() if "head" in n)


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("family", ["diffit", "dimr"])
def test_blocks_of_pixels_are_put_back(family, size):
    """Outputs have the shape of the image, those of DiMR's first branches a quarter and a half."""
    model = mz.create_model(f"{family}-tiny", size=size).eval()
    with torch.no_grad():
        outputs = model.raw(torch.randn(1, 3, size, size), torch.zeros(1), Cond())
    sides = [size // 4, size // 2, size] if family == "dimr" else [size]
    assert [tuple(out.shape) for out in outputs] == [(1, 3, s, s) for s in sides]


@pytest.mark.parametrize("patch", [1, 2, 3, 4])
def test_space_to_depth_keeps_channels_fastest_and_inverts(patch):
    z = torch.arange(2 * 3 * 12 * 24.0).view(2, 3, 12, 24)
    cells = space_to_depth(z, patch)
    assert cells.shape == (2, 3 * patch**2, 12 // patch, 24 // patch)
    row, column = patch - 1, 0
    first = (row * patch + column) * 3
    assert torch.equal(cells[:, first : first + 3], z[:, :, row::patch, column::patch])
    assert torch.equal(depth_to_space(cells, patch), z)


@pytest.mark.parametrize("family", FAMILIES)
def test_larger_recipes_are_the_tiny_one_with_another_rate_and_length(family):
    tiny = recipe_for(f"{family}-tiny")
    for scale, least in (("small", 1_000_000), ("base", 20_000_000)):
        recipe, config = (
            f(f"{family}-{scale}") for f in (recipe_for, lambda n: presets()[n][1].config)
        )
        ratio = widest(config) / widest(presets()[f"{family}-tiny"][1].config)
        assert recipe.optim.lr == pytest.approx(tiny.optim.lr / ratio)
        assert recipe.images >= least
        assert recipe.optim.warmup_images / recipe.images == pytest.approx(0.015)
        for field in ("model", "objective", "schedule", "time", "data", "ema", "label_drop"):
            assert getattr(recipe, field) == getattr(tiny, field)
        for field in ("name", "betas", "eps", "weight_decay", "decay", "clip"):
            assert getattr(recipe.optim, field) == getattr(tiny.optim, field)
        assert recipe.samples.sampler == tiny.samples.sampler
