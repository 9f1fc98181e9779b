"""Evaluation during training: it changes nothing in the run, resumes, and survives failures."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from helpers.evaluators import (
    digits_reference,
    evaluated_recipe,
    random_evaluator,
    random_features,
)
from helpers.runs import (
    assert_same_run,
    assert_same_tensors,
    events,
    last_state,
    records,
    small,
    weights,
)
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate import during_training
from mezzotint.evaluate.during_training import make_evaluator
from mezzotint.evaluate.evaluate import evaluate
from mezzotint.evaluate.features import from_module
from mezzotint.evaluate.image_source import GREY_NOTE, from_dataset, from_job
from mezzotint.evaluate.references import make_reference, read_reference
from mezzotint.evaluate.results import load_evaluation
from mezzotint.models import load_model
from mezzotint.sampling.job import make_job
from mezzotint.train import log, loop
from mezzotint.train.loop import train


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return digits_reference(tmp_path_factory.mktemp("reference") / "digits.npz")


@pytest.fixture(scope="module")
def evaluated_run(reference, tmp_path_factory):
    """A finished run of 160 images, evaluated at 64, 128 and 160; read-only."""
    recipe, folder = evaluated_recipe(reference), tmp_path_factory.mktemp("evaluated") / "run"
    return train(recipe, folder, quiet=True, evaluator=random_evaluator(recipe))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """The same run without evaluations; read-only."""
    return train(small(), tmp_path_factory.mktemp("plain") / "run", quiet=True)


def logged(folder):
    """Return the metrics in the log, by images seen."""
    return {r["images"]: r["evaluation"] for r in records(folder) if "evaluation" in r}


def saved(folder):
    """Return the files in evaluations/, by name."""
    return {p.name: p.read_bytes() for p in (folder / "evaluations").iterdir()}


def test_every_evaluation_is_logged_and_saved(evaluated_run):
    metrics_by_images = logged(evaluated_run)
    assert list(metrics_by_images) == [64, 128, 160]
    assert sorted(saved(evaluated_run)) == ["128.json", "160.json", "64.json"]
    for images, metrics in metrics_by_images.items():
        evaluation = load_evaluation(evaluated_run / "evaluations" / f"{images}.json")
        protocol = evaluation.protocol
        assert metrics == {n.metric: n.value for n in evaluation.numbers}
        assert {"FD-random", "precision (random)", "KID (random)"} <= metrics.keys()
        assert (protocol.num_images, protocol.steps, protocol.seeds) == (50, 2, "0...49")
        assert (protocol.ema, protocol.training_images) == ("the saved average", images)
    assert len({m["FD-random"] for m in metrics_by_images.values()}) == 3


def test_the_saved_model_has_the_logged_distance(evaluated_run, reference):
    settings = evaluated_recipe(reference).evaluate
    model = load_model(evaluated_run / "model").eval()
    source = during_training._sample_source(settings, model)
    evaluation = evaluate(source, read_reference(reference), [random_features()])
    expected = pytest.approx(evaluation["FD-random"].value, rel=1e-12)
    assert logged(evaluated_run)[160]["FD-random"] == expected


@pytest.mark.parametrize(
    ("name", "average"), [("model", "the saved average"), ("model-raw", "none, the raw weights")]
)
def test_the_protocol_says_which_weights(evaluated_run, name, average):
    metadata = from_job(make_job(evaluated_run / name), 4).metadata
    assert (metadata["ema"], metadata["training_images"]) == (average, 160)


def test_evaluation_does_not_change_the_run(evaluated_run, plain_run):
    assert_same_tensors(weights(plain_run), weights(evaluated_run))
    assert_same_tensors(last_state(plain_run), last_state(evaluated_run))
    assert records(plain_run) == [r for r in records(evaluated_run) if "evaluation" not in r]


def test_the_evaluated_model_is_a_frozen_copy_in_eval_mode(reference, tmp_path, monkeypatch):
    evaluated, trained, update_averages = [], [], loop.update_averages

    def record_evaluated(model, folder, stopping):
        requires_grad = any(p.requires_grad for p in model.parameters())
        evaluated.append((model.training, requires_grad, torch.is_grad_enabled()))
        return {"number": 1.0}

    def record_trained(run):
        update_averages(run)
        trained.append(run.model.training)

    monkeypatch.setattr(loop, "update_averages", record_trained)
    train(evaluated_recipe(reference), tmp_path, quiet=True, evaluator=record_evaluated)
    assert evaluated == [(False, False, True)] * 3
    assert trained == [True] * 10
    assert list(logged(tmp_path).values()) == [{"number": 1.0}] * 3


def test_speed_in_the_log_excludes_evaluation_and_grids(reference, tmp_path, monkeypatch):
    """The clock advances 10 ms per reading, and one hour per evaluation or grid."""
    clock = [0.0]

    def read_clock():
        clock[0] += 0.01
        return clock[0]

    def evaluate_for_an_hour(model, folder, stopping):
        clock[0] += 3600
        return {"number": 0.0}

    grids, draw_grid = [], loop.draw_grid

    def draw_for_an_hour(run, progress):
        clock[0] += 3600
        grids.append(run.state.images)
        draw_grid(run, progress)

    changes = ("log_every_images=48", "samples.every_images=32", "samples.count=2")
    recipe = evaluated_recipe(reference, *changes)
    with monkeypatch.context() as patch:
        patch.setattr(loop.time, "monotonic", read_clock)
        patch.setattr(loop, "draw_grid", draw_for_an_hour)
        train(recipe, tmp_path, quiet=True, evaluator=evaluate_for_an_hour)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "evaluation" not in line]
    assert len(speeds) == 4
    assert len(grids) > 2
    assert min(speeds) > 1


@pytest.fixture
def count_samples(monkeypatch):
    """Return a function that trains, and returns the number of samples drawn for evaluation.

    It also returns whether training was stopped, which `stop_at` requests at that many samples.
    """

    def run(recipe, folder, stop_at=None):
        counts, stop = [], loop.StopSignal()

        def counting_job(job, num_images):
            source = from_job(job, num_images)

            def batches(start, end):
                for batch in source.batches(start, end):
                    counts.append(len(batch))
                    stop.requested |= stop_at is not None and sum(counts) >= stop_at
                    yield batch

            return dataclasses.replace(source, batches=batches)

        with monkeypatch.context() as patch:
            patch.setattr(during_training, "from_job", counting_job)
            patch.setattr(loop, "StopSignal", lambda: stop)
            try:
                train(recipe, folder, quiet=True, evaluator=random_evaluator(recipe))
            except SystemExit:
                return sum(counts), True
        return sum(counts), False

    return run


def test_a_stop_during_an_evaluation_keeps_its_pieces(
    evaluated_run, reference, tmp_path, count_samples
):
    """50 samples are pieces of 32 and 18; the stop comes in the first evaluation's second piece."""
    recipe, folder = evaluated_recipe(reference), tmp_path / "run"
    assert count_samples(recipe, folder, stop_at=33) == (48, True)
    assert not logged(folder)
    assert not (folder / "events.jsonl").exists()
    assert [p.name for p in (folder / "evaluations").iterdir()] == ["64.pieces"]
    assert max(int(p.name) for p in (folder / "checkpoints").iterdir()) == 64
    assert count_samples(recipe, folder) == (18 + 50 + 50, False)
    assert_same_run(evaluated_run, folder)
    assert saved(evaluated_run) == saved(folder)


def test_a_saved_evaluation_of_the_same_weights_is_reused(
    evaluated_run, reference, tmp_path, count_samples
):
    recipe, folder = evaluated_recipe(reference), tmp_path / "run"
    shutil.copytree(evaluated_run, folder)
    for images in (64, 96, 128, 144, 160):
        shutil.rmtree(folder / "checkpoints" / str(images))
    assert count_samples(recipe, folder) == (0, False)
    assert_same_run(evaluated_run, folder)
    # With another protocol it is not.
    shutil.rmtree(folder / "checkpoints" / "160")
    (folder / "log.jsonl").unlink()
    assert count_samples(evaluated_recipe(reference, "evaluate.steps=3"), folder) == (50, False)
    assert list(logged(folder)) == [160]


def test_a_finished_run_can_be_evaluated_later(plain_run, evaluated_run, reference, tmp_path):
    recipe, folder = evaluated_recipe(reference), tmp_path / "run"
    shutil.copytree(plain_run, folder)
    train(recipe, folder, quiet=True, evaluator=random_evaluator(recipe))
    assert logged(folder) == {160: logged(evaluated_run)[160]}
    before = (folder / "log.jsonl").read_bytes()
    train(recipe, folder, quiet=True, evaluator=random_evaluator(recipe))
    assert (folder / "log.jsonl").read_bytes() == before


def test_training_goes_on_after_a_failed_evaluation(
    plain_run, evaluated_run, reference, tmp_path, capsys
):
    """The second evaluation fails in its second piece."""
    recipe, broken = evaluated_recipe(reference), random_features()
    batches = []

    class FailsAtTheFourthBatch(type(broken.network)):
        def forward(self, x, taps):
            batches.append(len(x))
            if len(batches) == 4:
                raise ValueError("out of order")
            return super().forward(x, taps)

    broken.network.__class__ = FailsAtTheFourthBatch
    folder = train(recipe, tmp_path / "run", evaluator=make_evaluator(recipe, [broken]))
    (event,) = events(folder)
    assert event["images"] == 128
    assert event["event"] == "evaluation failed"
    assert event["why"] == "ValueError: out of order"
    assert "ValueError: out of order" in capsys.readouterr().err
    expected = logged(evaluated_run)
    assert logged(folder) == {64: expected[64], 160: expected[160]}
    assert sorted(saved(folder)) == ["160.json", "64.json"]
    assert_same_tensors(weights(plain_run), weights(folder))


def test_pieces_of_a_killed_evaluation_are_removed(evaluated_run, reference, tmp_path):
    recipe, folder = evaluated_recipe(reference), tmp_path / "run"
    shutil.copytree(evaluated_run, folder)
    shutil.rmtree(folder / "checkpoints" / "160")
    (folder / "evaluations" / "128.pieces" / "0123").mkdir(parents=True)
    (folder / "evaluations" / "160.json").write_text("damaged")
    train(recipe, folder, quiet=True, evaluator=random_evaluator(recipe))
    assert saved(evaluated_run) == saved(folder)
    assert_same_run(evaluated_run, folder)


def test_log_readers_separate_training_and_evaluations(evaluated_run):
    path = evaluated_run / "log.jsonl"
    assert [r["images"] for r in log.read(path)] == [32, 64, 96, 128, 160]
    evaluations = {r["images"]: r["evaluation"] for r in log.read_evaluations(path)}
    assert evaluations == logged(evaluated_run)
    lines = [json.loads(line)["images"] for line in path.read_text().splitlines()]
    assert lines == [32, 64, 64, 96, 128, 128, 160, 160]


def test_the_report_plots_every_metric(evaluated_run):
    from mezzotint.train.report import render_page

    text = render_page(evaluated_run, "")
    for metric in logged(evaluated_run)[160]:
        assert f'aria-label="{metric} ' in text


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluate.reference=''", "mezzotint reference"),
        ("evaluate.reference=nowhere.npz", r"nowhere\.npz"),
        ("evaluate.num_images=1", "evaluate.num_images 1"),
        ("evaluate.sampler=dimm", "dimm.*ddim"),
        ("evaluate.steps=0", "steps"),
        ("evaluate.prompts=prompts.txt", r"prompts\.txt"),
        ("model.size=16", "16 x 16"),
        ("model.channels=3", "channels"),
        ("evaluate.features=[digits]", "'digits'"),
    ],
)
def test_bad_settings_are_refused_before_training(reference, override, named):
    def make():
        sets = None if "features" in override else [random_features()]
        make_evaluator(evaluated_recipe(reference, override), sets)

    with pytest.raises(ValueError, match=named):
        make()


class _ColourNet(torch.nn.Module):
    def forward(self, x):
        return x.flatten(2).std(2) + x.flatten(2)[:, :, ::7].mean(2)


def test_a_grey_run_is_judged_by_features_of_colour(tmp_path):
    sets = [from_module(_ColourNet(), name="colour", dims=3, size=8)]
    images = from_dataset(open_images("digits", size=8, channels=1), "digits", 40)
    make_reference(images, tmp_path / "r.npz", sets, keep=20)
    recipe = evaluated_recipe(str(tmp_path / "r.npz"), "images=64")
    folder = train(recipe, tmp_path / "run", quiet=True, evaluator=make_evaluator(recipe, sets))
    protocol = load_evaluation(folder / "evaluations" / "64.json").protocol
    assert protocol.preprocessing == GREY_NOTE
    assert "FD-colour" in logged(folder)[64]


def test_the_recipe_and_the_evaluator_must_agree(reference, tmp_path):
    assert make_evaluator(small()) is None
    with pytest.raises(ValueError, match=r"every_images=64.*make_evaluator"):
        train(evaluated_recipe(reference), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="every_images=0"):
        train(small(), tmp_path / "run", quiet=True, evaluator=lambda model, folder, stopping: {})
    assert not (tmp_path / "run").exists()
