"""Consistency tuning as a run: recipes, start from a teacher, resume, ranks, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mezzotint as mz
from helpers import launch
from helpers.runs import assert_same_run, assert_same_tensors, records, small, weights
from mezzotint import config
from mezzotint.cli import run_command
from mezzotint.convert.adapt import initialise_from
from mezzotint.core.registry import Spec, build
from mezzotint.models import load_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.process.logsnr import alpha, append_dims
from mezzotint.recipes import recipe_for
from mezzotint.sampling.job import make_job
from mezzotint.train.loop import check, train
from mezzotint.train.setup import check_objective

TUNING = (
    "objective.name=consistency", "objective.options.stage_images=32", "optim.name=radam",
    "optim.lr=1e-3", "images=96", "samples.sampler=consistency", "samples.every_images=32",
    "save.every_images=32",
)  # fmt: skip
NAMES = [f"{family}-{size}" for family in ("diffit", "dimr", "sid2", "unet", "uvit")
         for size in ("tiny", "small")]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.set_num_threads(1)
    recipe = small("images=32", "samples.count=0", "save.every_images=0")
    return train(recipe, tmp_path_factory.mktemp("teacher") / "run", quiet=True)


def tune(teacher, folder, *overrides):
    start = initialise_from(str(teacher), say=lambda line: None)
    return train(small(*TUNING, *overrides), folder, quiet=True, init_weights=start)


@pytest.fixture(scope="module")
def tuned(teacher, tmp_path_factory):
    return tune(teacher, tmp_path_factory.mktemp("tuned") / "run")


def test_a_resumed_run_is_the_same_bit_for_bit(teacher, tuned, tmp_path):
    """It goes on in its third stage, where the pairs are closer than at its start."""
    tune(teacher, tmp_path / "run", "images=64")
    tune(teacher, tmp_path / "run")
    assert_same_run(tuned, tmp_path / "run")


def test_the_stage_of_a_run_is_that_of_its_images(teacher, tuned, tmp_path):
    """The log's first 32 images are of stage 0 in both runs; later ones only in the other."""
    short = ("images=64", "samples.count=0", "save.every_images=0")
    other = tune(teacher, tmp_path / "run", "objective.options.stage_images=null", *short)
    ours, theirs = records(tuned), records(other)
    assert ours[0] == theirs[0]
    assert ours[1]["loss"] != theirs[1]["loss"]


def test_the_tuned_model_samples_from_its_folder(tuned):
    job = make_job(tuned, {"sampler": Spec("consistency"), "steps": 2})
    assert job.network_calls == 2
    assert job.draw([0, 1]).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="50 steps of a consistency model"):
        make_job(tuned, {"sampler": Spec("consistency")}).network_calls  # noqa: B018


def test_both_passes_see_the_same_image_noise_and_condition(teacher):
    """Also where labels are dropped and images augmented: the pair differs in its level alone."""
    torch.manual_seed(0)
    model = load_model(teacher / "model").train()
    calls = []
    model.backbone.register_forward_hook(lambda module, args, out: calls.append(args))
    x, eps = torch.randn(2, 4, 1, 8, 8)
    logsnr = torch.tensor([-6.0, -2.0, 0.0, 2.0])
    cond = mz.Cond(label=torch.tensor([3, 10, 10, 0]))
    objective = build(objectives.registry, Spec("consistency", {"q": 16.0}))
    objective(model, x, eps, logsnr, cond)
    (upper, noise, first), (lower, other, second) = calls
    assert first is cond
    assert second is cond
    assert bool((other > noise).all())
    y_t, y_r = (z / append_dims(alpha(level), z) for z, level in ((upper, noise), (lower, other)))
    gap = torch.exp(-noise / 2) - torch.exp(-other / 2)
    torch.testing.assert_close(y_t - y_r, append_dims(gap, x) * eps, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_every_family(name):
    recipe, teacher = recipe_for(f"{name}-few-steps"), recipe_for(name)
    assert recipe.preset == name
    assert recipe.objective.name == "consistency"
    assert recipe.optim.name == "radam"
    assert recipe.schedule == Spec("lognormal", {"mean": -1.1, "std": 2.0})
    assert config.from_dict(config.to_dict(recipe)) == recipe
    assert recipe.images // recipe.objective.options["stage_images"] == 8
    assert recipe.data == teacher.data
    assert recipe.label_drop == teacher.label_drop
    info = preset_info(name, **recipe.model)
    assert info.config.prediction in ("v", "flow", "edm")
    assert set(recipe.model) <= {f.name for f in dataclasses.fields(info.config)}
    if name.endswith("small"):
        assert recipe.optim.lr == 1e-4
        assert recipe.batch == 128
        assert getattr(info.config, "dropout", 0.2) == 0.2


@pytest.mark.parametrize("name", ["unet-tiny", "diffit-tiny", "dimr-tiny"])
def test_a_recipe_fits_its_network(name):
    """The loss is finite at a low, a middle and a high level of noise, for v, edm and branches."""
    recipe = recipe_for(f"{name}-few-steps")
    model = mz.create_model(name, **recipe.model, size=16)
    objective = build(objectives.registry, recipe.objective)
    check_objective(recipe, model, objective, build(schedules.registry, recipe.schedule))


@pytest.mark.parametrize("name", ["jit-tiny", "uvit-text-tiny", "diffit-latent-tiny"])
def test_networks_that_predict_x_or_eps_are_refused(name):
    recipe = recipe_for(f"{name}-few-steps")
    model = mz.create_model(name, **recipe.model, size=16)
    objective = build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, recipe.schedule)
    with pytest.raises(ValueError, match="needs a network that predicts v, flow or edm"):
        check_objective(recipe, model, objective, schedule)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("model.prediction=x",), "objective consistency needs .* predicts x"),
        (("model.prediction=eps",), "objective consistency needs .* predicts eps"),
        (("samples.steps=50",), "50 steps of a consistency model"),
        (("objective.options.q=0.5",), "q 0.5 must be above 1"),
    ],
)
def test_a_run_that_cannot_work_leaves_no_folder(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        check(small(*TUNING, *fields), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_command_line_names_a_recipe_and_its_preset(teacher, tmp_path, capsys):
    network = [f"model.{k}={v}" for k, v in config.to_dict(small())["model"].items()]
    short = ["images=32", "samples.count=0", "data.flip=true", "label_drop=0.1"]
    words = ["unet-tiny-few-steps", *(w.replace(" ", "") for w in network), *short]
    run_command(
        "train", *words, "--data", "digits", "--init-from", str(teacher), "--out", f"{tmp_path}/run"
    )
    written = config.from_yaml(tmp_path / "run" / "recipe.yaml")
    assert written.preset == "unet-tiny"
    assert written.objective.name == "consistency"
    assert load_model(tmp_path / "run" / "model").info.schedule.name == "lognormal"
    assert "tensors copied" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["unet-tny-few-steps"], "did you mean unet-tiny"),
        (["unet-tiny-few-steps", "--hours", "1"], "images=N, not --hours"),
    ],
)
def test_a_bad_command_prints_one_sentence(words, message):
    with pytest.raises(ValueError, match=message):
        run_command("train", *words, "--data", "digits", "--dry-run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_tune_like_one(tmp_path, strategy):
    options = ["model.size=8", "model.width=16", "model.emb_dim=32", f"engine.strategy={strategy}"]
    alone, two = (
        launch.train(n, "unet-tiny", tmp_path / str(n), *TUNING, *options) for n in (1, 2)
    )
    ours, theirs = weights(alone), weights(two)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with pytest.raises(AssertionError):
        assert_same_tensors(ours, {k: torch.zeros_like(t) for k, t in ours.items()})
