"""Bits per dimension during training: logged, saved, in the report, and measured once."""

from __future__ import annotations

import dataclasses

import pytest

from helpers.evaluators import digits_reference, random_evaluator
from helpers.runs import records, small
from mezzotint.convert.model_card import _find_evaluations
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate import during_training
from mezzotint.evaluate.during_training import _test_split, make_evaluator
from mezzotint.evaluate.likelihood import BOUND, LikelihoodSettings, bits_per_dim, is_of
from mezzotint.evaluate.results import load_evaluation
from mezzotint.models import load_model
from mezzotint.train.loop import train
from mezzotint.train.report import render_page

MEASURED = [
    "images=32", "samples.every_images=0", "evaluate.every_images=16",
    "evaluate.bits_per_dim=true", "evaluate.num_images=9", "evaluate.batch=4", "evaluate.steps=1",
]  # fmt: skip
ASKED = LikelihoodSettings(num_images=9, batch=4)


def logged(folder):
    return {r["images"]: r["evaluation"] for r in records(folder) if "evaluation" in r}


@pytest.fixture(scope="module")
def measured_run(tmp_path_factory):
    """A run of 32 images, measured at 16 and 32 with nothing else; read-only."""
    recipe = small(*MEASURED)
    folder = tmp_path_factory.mktemp("measured") / "run"
    return train(recipe, folder, quiet=True, evaluator=make_evaluator(recipe))


def test_the_log_has_the_bound_of_the_averaged_weights(measured_run):
    found = logged(measured_run)
    assert list(found) == [16, 32]
    model = load_model(measured_run / "model").eval()
    images = open_images("digits:test", size=8, channels=1)
    expected = bits_per_dim(model, images, ASKED, name="digits:test")
    path = measured_run / "evaluations" / "32-bits-per-dim.json"
    assert load_evaluation(path) == expected
    assert found[32] == {n.metric: n.value for n in expected.numbers}
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "16-bits-per-dim.json", "32-bits-per-dim.json",
    ]  # fmt: skip
    assert path in _find_evaluations(measured_run, load_model(measured_run / "model").info)
    # What a later start would use again, and what it would not.
    assert is_of(expected, model, images, ASKED)
    assert not is_of(expected, model, images, dataclasses.replace(ASKED, num_images=8))
    model.info = dataclasses.replace(model.info, images=16)
    assert not is_of(expected, model, images, ASKED)


def test_the_report_shows_the_bound(measured_run):
    page = render_page(measured_run, "")
    assert "bits per dimension of the averaged weights on the test split of the data" in page
    assert f'aria-label="{BOUND} ' in page
    assert "against" not in page.partition("Evaluations")[2].partition("<h2>")[0]


def test_a_saved_bound_is_not_measured_again(measured_run, monkeypatch):
    (measured_run / "log.jsonl").unlink()
    monkeypatch.setattr(during_training, "bits_per_dim", None)
    recipe = small(*MEASURED)
    train(recipe, measured_run, quiet=True, evaluator=make_evaluator(recipe))
    assert list(logged(measured_run)) == [32]


def test_samples_and_likelihood_are_evaluated_together(tmp_path):
    reference = digits_reference(tmp_path / "digits.npz")
    recipe = small(*MEASURED, f"evaluate.reference={reference}", "evaluate.every_images=32")
    folder = train(recipe, tmp_path / "run", quiet=True, evaluator=random_evaluator(recipe))
    assert {"FD-random", BOUND} <= logged(folder)[32].keys()
    names = sorted(p.name for p in (folder / "evaluations").iterdir())
    assert names == ["32-bits-per-dim.json", "32.json"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("digits", "digits:test"),
        ("shapes:64,count=50", "shapes:test,64,count=50"),
        ("set.npz:train", "set.npz:test"),
    ],
)
def test_the_images_are_the_test_split(source, expected):
    assert _test_split(source) == expected


@pytest.mark.parametrize("source", ["folder", "digits:all", "folder:seg_train"])
def test_images_that_may_be_trained_on_are_not_chosen(source):
    with pytest.raises(ValueError, match=r"evaluate\.data=SET"):
        _test_split(source)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluate.every_images=0", r"needs an interval; set evaluate\.every_images"),
        ("evaluate.data=nowhere", "nowhere"),
        ("data.source=digits:all", r"evaluate\.data"),
        ("data.codec=taesd", "works in latents of taesd"),
    ],
)
def test_bad_settings_are_refused_before_training(override, named):
    with pytest.raises(ValueError, match=named):
        make_evaluator(small(*MEASURED, override))
