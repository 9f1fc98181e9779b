"""Every preset has a recipe that fits its network: it is printed, priced, and takes its first steps."""

from __future__ import annotations

import math

import pytest
import torch

import mezzotint as mz
from mezzotint.cli import training as cli
from mezzotint.config import from_dict, to_dict
from mezzotint.core.registry import build
from mezzotint.models import build_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.process.objectives import sigmoid_weight
from mezzotint.recipes import recipe_for, registry


def test_presets_and_recipes_have_the_same_names():
    assert sorted(registry) == sorted(mz.presets())


LAPTOP = [p for p in mz.presets() if p.endswith("tiny")]
PUBLISHED = [
    pytest.param(p, marks=pytest.mark.slow) for p in mz.presets() if p not in LAPTOP
]  # counting takes seconds


@pytest.mark.parametrize("preset", [*LAPTOP, *PUBLISHED])
def test_the_dry_run_prints_recipe_difference_and_plan(preset, capsys):
    cli.train(preset, data="digits", dry_run=True)
    printed = capsys.readouterr().out
    assert f"preset: {preset}" in printed
    assert "data.source:  -> digits" in printed
    assert "images per forward pass" in printed


@pytest.mark.parametrize("preset", mz.presets())
def test_the_recipe_is_whole_and_its_loss_is_built(preset):
    recipe = recipe_for(preset)
    assert recipe.preset == preset
    assert from_dict(to_dict(recipe)) == recipe
    card = preset_info(preset, **recipe.model)
    with torch.device("meta"):
        build_model(card)
    build(objectives.registry, recipe.objective)
    logsnr = build(schedules.registry, recipe.schedule or card.schedule)(
        torch.tensor([0.1, 0.9], dtype=torch.float64)
    )
    assert logsnr[0] > logsnr[1]


@pytest.mark.parametrize("preset", LAPTOP)
def test_the_laptop_recipes_take_a_step(preset, tmp_path):
    """A loss and a gradient that are finite, of the recipe's own objective, schedule and measure."""
    from mezzotint.process.denoiser import Cond
    from mezzotint.train.setup import check_objective

    recipe = recipe_for(preset)
    torch.manual_seed(0)
    model = mz.create_model(preset, **recipe.model)
    objective = build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, recipe.schedule or model.info.schedule)
    check_objective(recipe, model, objective, schedule)
    c = model.info.config
    x, eps = torch.randn(2, 2, c.channels, c.size, c.size)
    cond = Cond(label=torch.tensor([0, 1])) if c.num_classes else Cond()
    loss = objective(
        model, x, eps, schedule(torch.tensor([0.2, 0.8], dtype=torch.float64)).float(), cond
    ).mean()
    loss.backward()
    assert math.isfinite(loss.item())
    norm = (
        sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    )
    assert 0 < norm < math.inf


def test_sid2_tiny_has_the_papers_weight():
    """specs, section 9: eps-MSE times -1/2 dlogsnr/dt sigmoid(b - logsnr); at zero output, of the network's v."""
    recipe = recipe_for("sid2-tiny")
    model = mz.create_model("sid2-tiny")
    objective = build(objectives.registry, recipe.objective)
    logsnr = torch.linspace(-6, 6, 5)
    x, eps = torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    from mezzotint.process.denoiser import Cond
    from mezzotint.process.logsnr import diffuse

    cond = Cond(label=torch.zeros(5, dtype=torch.int64))
    with torch.no_grad():
        guess = model(diffuse(x, eps, logsnr), logsnr, cond).eps
        weight = torch.sigmoid(0.0 - logsnr)
        expected = weight * (guess - eps).square().flatten(1).mean(1)
        torch.testing.assert_close(
            objective(model, x, eps, logsnr, cond), expected, rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(sigmoid_weight(logsnr, 0.0), weight)
    assert recipe.time.loss_measure == "logsnr"
