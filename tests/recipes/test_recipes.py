"""Every preset has a recipe that fits its network, and `train --dry-run` prints it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import mezzotint as mz
from mezzotint import config
from mezzotint.cli import training as cli
from mezzotint.core.registry import build
from mezzotint.models import build_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Cond
from mezzotint.process.logsnr import diffuse
from mezzotint.recipes import describe_changes, recipe_for, registry
from mezzotint.train.setup import check_objective

LAPTOP = [p for p in mz.presets() if p.endswith("tiny")]
PUBLISHED = [  # their plans take seconds
    pytest.param(p, marks=pytest.mark.slow) for p in mz.presets() if p not in LAPTOP
]


def test_presets_and_recipes_have_the_same_names():
    assert sorted(registry) == sorted(mz.presets())


def test_a_recipe_is_found_without_importing_training():
    """Recipes hold values only: what trains, samples or evaluates is not needed to read one."""
    code = (
        "import sys; from mezzotint.recipes import recipe_for; recipe_for('unet-tiny');"
        "print(*(m for m in sys.modules if m.startswith('mezzotint.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {module.split(".")[1] for module in done.stdout.split()}
    assert "recipes" in packages
    assert not packages & {"train", "evaluate", "sampling", "data", "backbones", "web", "tools"}


@pytest.mark.parametrize(
    "preset",
    [p for p in LAPTOP if "latent" not in p and "text" not in p],  # they need encoders
)
def test_a_dry_run_prints_recipe_changes_and_plan(preset, capsys):
    cli.train(preset, data="digits", dry_run=True)
    printed = capsys.readouterr().out
    assert f"preset: {preset}" in printed
    assert "data.source:  -> digits" in printed
    assert "images per forward pass" in printed


@pytest.mark.parametrize("preset", [*LAPTOP, *PUBLISHED])
def test_every_recipe_has_a_plan(preset, capsys):
    cli.print_plan(recipe_for(preset))
    assert "images per forward pass" in capsys.readouterr().out


def test_changes_are_listed_by_field():
    recipe = recipe_for("unet-tiny")
    assert describe_changes(recipe).splitlines()[1:] == ["  none"]
    changed = config.override(recipe, ["optim.lr=0.5", "model.size=16"])
    assert describe_changes(changed).splitlines()[1:] == [
        "  model.size: None -> 16",
        "  optim.lr: 0.002 -> 0.5",
    ]


@pytest.mark.parametrize("preset", mz.presets())
def test_a_recipe_fits_its_network_and_names_known_functions(preset):
    recipe = recipe_for(preset)
    assert recipe.preset == preset
    assert config.from_dict(config.to_dict(recipe)) == recipe
    info = preset_info(preset, **recipe.model)
    with torch.device("meta"):
        build_model(info)
    build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, recipe.schedule or info.schedule)
    noisy, clean = schedule(torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert noisy < clean


@pytest.mark.parametrize("preset", LAPTOP)
def test_a_laptop_recipe_learns(preset):
    """Twenty steps lower the recipe's own loss on two uniform images, a dark and a light one."""
    recipe = recipe_for(preset)
    torch.manual_seed(0)
    model = mz.create_model(preset, **recipe.model)
    objective = build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, recipe.schedule or model.info.schedule)
    check_objective(recipe, model, objective, schedule)
    c = model.info.config
    x = torch.tensor([-0.8, 0.8]).reshape(2, 1, 1, 1).expand(2, c.channels, c.size, c.size)
    eps = torch.randn(x.shape)
    logsnr = schedule(torch.tensor([0.2, 0.8], dtype=torch.float64)).float()
    cond = Cond(label=torch.tensor([0, 1])) if c.num_classes else Cond()
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.optim.lr)
    losses = []
    for _ in range(20):
        loss = objective(model, x, eps, logsnr, cond).mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0], losses


def test_sid2_tiny_has_the_papers_weight():
    """SiD2: the eps-MSE times sigmoid(bias - logsnr), measured over log-SNR; ours at 32 pixels."""
    recipe = recipe_for("sid2-tiny")
    model = mz.create_model("sid2-tiny")
    objective = build(objectives.registry, recipe.objective)
    logsnr = torch.linspace(-6, 6, 5)
    x, eps = torch.randn(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    cond = Cond(label=torch.zeros(5, dtype=torch.int64))
    with torch.no_grad():
        guess = model(diffuse(x, eps, logsnr), logsnr, cond).eps
        mse = (guess - eps).square().flatten(1).mean(1)
        loss = objective(model, x, eps, logsnr, cond)
    weight = torch.sigmoid(2 * math.log(128 / 32) - logsnr)
    torch.testing.assert_close(loss, weight * mse, rtol=1e-4, atol=1e-5)
    assert recipe.time.loss_measure == "logsnr"
