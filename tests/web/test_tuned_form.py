"""The form: settings of a tuned model are there, what a visitor changes is used; one time limit."""

from __future__ import annotations

import dataclasses

import pytest

import mezzotint as mz
from helpers.tiny_models import tiny
from mezzotint.core.registry import Spec
from mezzotint.sampling.settings import Guidance
from mezzotint.sampling.tuned import Measured, TunedSettings, add_tuned
from mezzotint.web import handlers
from mezzotint.web.html import Figure
from mezzotint.web.request import Request, form_defaults, make_job, parse_prompts
from mezzotint.web.studio import Limits, open_studio

GUIDANCE = Guidance(scale=1.85, low=-2.3, high=20.0)


@pytest.fixture
def studio(tmp_path):
    """A studio of a plain model, a tuned one, and one with damaged tuned settings."""
    measured = Measured(
        metric="KID (random)", value=1.0, default=2.0, images=100, first_seed=7, calls=9000,
        reference="ref.npz", reference_hash="0123456789abcdef",
    )  # fmt: skip
    sampler = Spec("ddim", {"eta": 0.5})
    tuned = TunedSettings(sampler=sampler, steps=4, guidance=GUIDANCE, measured=measured)
    model = tiny(num_classes=10)
    mz.save_model(model, tmp_path / "plain")
    model.info = add_tuned(model.info, tuned)
    mz.save_model(model, tmp_path / "tuned")
    model.info = dataclasses.replace(model.info, extra={"sampling": {"steps": "many"}})
    mz.save_model(model, tmp_path / "damaged")
    return open_studio([str(tmp_path / name) for name in ("plain", "tuned", "damaged")])


def test_the_form_begins_with_the_tuned_settings(studio):
    start = form_defaults(studio, "tuned")
    job = make_job(studio, Request(model="tuned", **start))
    assert job.settings.guidance == GUIDANCE
    assert (job.settings.sampler, job.settings.steps) == (Spec("ddim", {"eta": 0.5}), 4)


@pytest.mark.parametrize("name", ["plain", "damaged", "unknown", None, 3])
def test_all_others_begin_with_ours(studio, name):
    start = form_defaults(studio, name)
    assert (start["sampler"], start["steps"], start["guidance"]) == ("ddim", 30, 1.0)
    assert not start["limited"]


def test_what_a_visitor_changes_is_used(studio):
    start = form_defaults(studio, "tuned") | {"sampler": "heun", "steps": 2, "guidance": 1}
    settings = make_job(studio, Request(model="tuned", **start)).settings
    assert (settings.sampler, settings.steps, settings.guidance) == (Spec("heun"), 2, None)


def test_a_model_tuned_while_the_studio_runs_is_read_again(studio, tmp_path):
    model = mz.load_model(tmp_path / "tuned")
    mz.save_model(model, tmp_path / "plain")
    assert form_defaults(studio, "plain")["steps"] == 4


@pytest.mark.parametrize("prompts", ["", " \n\n", None])
@pytest.mark.parametrize("guided", [False, True])
def test_a_negative_text_needs_prompts(prompts, guided):
    with pytest.raises(ValueError, match="a negative text needs prompts; write one"):
        parse_prompts(tiny(), prompts, "blue", guided, Limits())
    assert parse_prompts(tiny(), prompts, " ", guided, Limits()) == ()


@pytest.fixture
def seconds(monkeypatch):
    """The time limit of each sampling; nothing is computed."""
    given = []

    def sample_figures(job, seeds, limits, heading=""):
        given.append(limits.seconds)
        yield [Figure(b"", "seed 0")] * len(seeds), "", True

    monkeypatch.setattr(handlers, "sample_figures", sample_figures)
    return given


@pytest.mark.parametrize(
    ("setting", "values", "count"),
    [("guidance", "2", 1), ("guidance", "1, 1.5, 2, 4", 4), ("steps", "1 2 3", 3)],
)
def test_variations_share_the_time_of_one_request(studio, seconds, setting, values, count):
    list(handlers.variations(studio, Request(model="plain"), setting, values, 0))
    assert seconds == [studio.limits.seconds / count] * count


def test_a_comparison_shares_the_time_of_one_request(studio, seconds):
    requests = (Request(model=name, seeds="0-2") for name in ("plain", "tuned"))
    list(handlers.comparison(studio, *requests))
    assert seconds == [150.0, 150.0]


def test_only_the_time_is_divided():
    limits = Limits(seconds=30.0, images=5)
    assert limits.divide(4) == Limits(seconds=7.5, images=5)
