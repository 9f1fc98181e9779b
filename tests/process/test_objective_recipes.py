"""Recipes with every schedule, prediction, objective and way to draw times."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from helpers.runs import records, small
from mezzotint import config
from mezzotint.core import distributed
from mezzotint.core.registry import build
from mezzotint.core.rng import Draws
from mezzotint.data.loader import load_batches
from mezzotint.process import objectives, schedules
from mezzotint.recipes import recipe_for
from mezzotint.train.loop import train
from mezzotint.train.setup import check_objective, setup
from mezzotint.train.step import draw_times, gradient, gradient_norms, make_batch, reduce_step

PREDICTIONS = ("eps", "x", "v", "flow", "edm")
OPTIONS = {  # of builders that have no default for something
    "cosine_interpolated": {
        "image_d": 8, "noise_d_low": 4, "noise_d_high": 8, "logsnr_min": -10.0, "logsnr_max": 10.0,
    },
    "ddpm": {"betas": [0.01 * i for i in range(1, 20)]},
}  # fmt: skip
LATENT = [
    "data.source=digits", "data.codec=pixels", "model.size=8", "model.channels=1",
    "model.width=16", "model.depth=2", "model.heads=2", "batch=4", "engine.precision=float32",
]  # fmt: skip


def fits(objective: str, schedule: str, learned_variance: bool, prediction: str = "eps") -> bool:
    """Return whether a combination is valid.

    The variational term needs DDPM's steps and a learned variance, the pyramids none. A consistency
    map is bound at both ends of the noise.
    """
    if objective == "consistency":
        return prediction in ("v", "flow", "edm")
    if objective == "hybrid":
        return learned_variance and schedule == "linear_ddpm"
    return not (objective in ("pyramid", "sigmoid_pyramid") and learned_variance)


def named(recipe, schedule, objective, measure="u"):
    """Return the recipe with choices given as on a command line."""
    words = [
        f"objective.name={objective}",
        f"schedule.name={schedule}",
        f"time.loss_measure={measure}",
    ]
    words += [f"schedule.options.{key}={value}" for key, value in OPTIONS.get(schedule, {}).items()]
    return config.override(recipe, words)


def one_step(run, recipe):
    """Return loss and gradient norm of one step of `recipe` with the network of `run`."""
    card = dataclasses.replace(run.info, schedule=recipe.schedule)
    run.model.info = card
    schedule, objective = (
        build(schedules.registry, recipe.schedule),
        build(objectives.registry, recipe.objective),
    )
    check_objective(recipe, run.model, objective, schedule)
    now = dataclasses.replace(run, recipe=recipe, info=card, schedule=schedule, objective=objective)
    loaded = next(load_batches(run.dataset, seed=0, start_image=0, batch=recipe.batch))
    losses = gradient(
        now, make_batch(recipe, run.dataset, card.config.num_classes, loaded, torch.device("cpu"))
    )
    verdict = reduce_step(losses, gradient_norms(now)[0], False, False, run.world)
    run.model.zero_grad(set_to_none=True)
    return verdict


@pytest.mark.parametrize(
    "prediction", [pytest.param(p, marks=[] if p == "v" else pytest.mark.slow) for p in PREDICTIONS]
)
def test_every_schedule_and_objective_with_a_network_that_predicts(prediction, tmp_path):
    recipe = small(f"model.prediction={prediction}", "batch=4", "model.dropout=0")
    run = setup(recipe, tmp_path, distributed.init_distributed())
    tried = 0
    for schedule in schedules.registry:
        for objective in objectives.registry:
            chosen = named(recipe, schedule, objective)
            if not fits(objective, schedule, False, prediction):
                with pytest.raises(ValueError, match=r"hybrid|v, flow or edm"):
                    one_step(run, chosen)
                continue
            verdict = one_step(run, chosen)
            assert verdict.finite, (schedule, objective, verdict)
            assert verdict.loss > 0
            tried += 1
    refused = 1 + (prediction in ("eps", "x"))
    assert tried == len(schedules.registry) * (len(objectives.registry) - refused)


def test_every_schedule_and_objective_with_a_learned_variance(tmp_path):
    recipe = config.override(recipe_for("diffit-latent-tiny"), LATENT)
    run = setup(recipe, tmp_path, distributed.init_distributed())
    assert run.model.parameterisation.learned_variance
    for schedule in schedules.registry:
        for objective in objectives.registry:
            chosen = named(recipe, schedule, objective)
            if fits(objective, schedule, True):
                assert one_step(run, chosen).finite, (schedule, objective)
            else:
                with pytest.raises(ValueError, match=r"hybrid|linear table|v, flow or edm"):
                    one_step(run, chosen)


@pytest.mark.parametrize("measure", ["u", "logsnr"])
@pytest.mark.parametrize("sampling", ["uniform", "stratified"])
def test_every_way_to_draw_times(sampling, measure, tmp_path):
    """EDM's log-normal draw is a schedule. Each way trains with either loss measure."""
    recipe = named(small(f"time.sampling={sampling}", "images=32"), "lognormal", "sigmoid", measure)
    train(recipe, tmp_path, quiet=True)
    assert math.isfinite(records(tmp_path)[-1]["loss"])


def test_the_measure_is_the_integral_over_logsnr(tmp_path):
    """With loss_measure=logsnr the expected sigmoid loss is one integral for any schedule."""
    run = setup(
        small("model.dropout=0", "batch=512", "time.sampling=stratified"),
        tmp_path,
        distributed.init_distributed(),
    )
    wide = {"logsnr_min": -12.0, "logsnr_max": 12.0}

    def loss(image_d, measure):
        options = {"image_d": image_d, **wide}
        words = [
            "objective.name=sigmoid",
            f"time.loss_measure={measure}",
            "schedule.name=cosine",
            *(f"schedule.options.{k}={v}" for k, v in options.items()),
        ]
        return one_step(run, config.override(run.recipe, words)).loss

    assert loss(64, "logsnr") == pytest.approx(loss(48, "logsnr"), rel=0.05)
    assert abs(loss(64, "u") / loss(48, "u") - 1) > 0.05


@pytest.mark.parametrize("stream", ["philox4x64", "philox4x32"])
def test_stratified_times_are_spread_evenly_over_every_batch(stream):
    time = config.Time(sampling="stratified")
    for batch in (4, 16):
        u = torch.cat(
            [
                draw_times(time, Draws(3, stream), list(range(i, i + batch // 2)), batch)
                for i in range(0, 4 * batch, batch // 2)
            ]
        )
        for row in u.view(4, batch):
            assert sorted((row * batch).floor().int().tolist()) == list(range(batch))
    uniform = draw_times(config.Time(), Draws(3, stream), list(range(64)), 16)
    assert any(len(set((row * 16).floor().int().tolist())) < 16 for row in uniform.view(4, 16))


def test_an_invalid_combination_fails_at_setup(tmp_path):
    with pytest.raises(ValueError, match="hybrid"):
        train(named(small(), "linear_ddpm", "hybrid"), tmp_path / "a", quiet=True)
    with pytest.raises(ValueError, match="2 coefficients"):
        train(
            config.override(
                named(small(), "cosine", "pyramid"), ["objective.options.coefficients=[1,2]"]
            ),
            tmp_path / "b",
            quiet=True,
        )
    assert not list(tmp_path.glob("*/checkpoints"))
    with pytest.raises(ValueError, match="did you mean gamma"):
        train(
            config.override(named(small(), "cosine", "min_snr"), ["objective.options.gama=2"]),
            tmp_path / "c",
            True,
        )


def test_a_loss_that_cannot_be_finite_is_refused_at_setup(tmp_path):
    """At such log-SNRs an x-prediction converted to noise overflows float32."""
    recipe = config.override(
        named(small("model.prediction=x"), "lognormal", "eps_mse"), ["schedule.options.std=60"]
    )
    with pytest.raises(ValueError, match=r"x is \[inf"):
        train(recipe, tmp_path, quiet=True)
