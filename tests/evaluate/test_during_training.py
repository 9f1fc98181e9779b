"""Evaluation along the way: curves in the log, no effect on the run, and no evaluation lost or made twice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.evaluators import judge, judged, reference, seen
from helpers.runs import (
    assert_same_run,
    assert_same_tensors,
    events,
    last_state,
    records,
    small,
    weights,
)
from mezzotint.evaluate import during_training as judging
from mezzotint.evaluate.results import load_evaluation
from mezzotint.models import load_model
from mezzotint.train import loop
from mezzotint.train.loop import train


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Statistics of the real digits on the features of a small random network."""
    return reference(tmp_path_factory.mktemp("real") / "digits.npz")


@pytest.fixture(scope="module")
def evaluated(real, tmp_path_factory):
    """A run of 160 images, judged at 64, 128 and 160."""
    recipe = judged(real)
    return train(recipe, tmp_path_factory.mktemp("judged") / "run", quiet=True, judge=judge(recipe))


def values(folder):
    return {r["images"]: r["evaluation"] for r in records(folder) if "evaluation" in r}


def cards(folder):
    return {p.name: p.read_bytes() for p in (folder / "evaluations").iterdir()}


def test_the_log_has_a_value_for_each_metric_and_the_folder_a_card(evaluated):
    found = values(evaluated)
    assert list(found) == [64, 128, 160]
    assert sorted(cards(evaluated)) == ["128.json", "160.json", "64.json"]
    for images, metrics in found.items():
        card = load_evaluation(evaluated / "evaluations" / f"{images}.json")
        assert metrics == {n.metric: n.value for n in card.numbers}
        assert {"FD-seen", "precision (seen)", "KID (seen)"} <= metrics.keys()
        assert (card.protocol.n, card.protocol.steps, card.protocol.seeds) == (50, 2, "0...49")
        assert f"{images:,} images" in str(card.protocol.ema)
    assert len({m["FD-seen"] for m in found.values()}) == 3


def test_the_number_is_the_one_that_the_saved_model_gets(evaluated, real):
    """The averaged weights of the end, loaded from model/ and judged apart from any run."""
    from mezzotint.evaluate.evaluate import evaluate
    from mezzotint.evaluate.references import read_reference

    model = load_model(evaluated / "model").eval()
    source = judging.source_of(judged(real).evaluate, model)
    found = evaluate(source, read_reference(real), [seen()])
    assert values(evaluated)[160]["FD-seen"] == pytest.approx(found["FD-seen"].value, rel=1e-12)


def test_being_judged_changes_nothing_else(evaluated, whole):
    assert_same_tensors(weights(whole), weights(evaluated))
    assert_same_tensors(last_state(whole), last_state(evaluated))
    assert records(whole) == [r for r in records(evaluated) if "evaluation" not in r]


def test_the_network_that_trains_stays_in_train_mode_and_is_not_the_one_judged(real, tmp_path):
    shown = []

    def look(model, folder, stopping):
        shown.append(
            (
                model.training,
                any(p.requires_grad for p in model.parameters()),
                torch.is_grad_enabled(),
            )
        )
        return {"number": 1.0}

    modes, averages = [], loop.update_averages
    with pytest.MonkeyPatch.context() as patch:

        def update(run):
            averages(run)
            modes.append(run.model.training)

        patch.setattr(loop, "update_averages", update)
        train(judged(real), tmp_path, quiet=True, judge=look)
    assert shown == [(False, False, True)] * 3
    assert modes == [True] * 10
    assert [r["evaluation"] for r in records(tmp_path) if "evaluation" in r] == [
        {"number": 1.0}
    ] * 3


def test_the_time_it_takes_is_not_training_time(real, tmp_path, monkeypatch):
    """A clock that shows 10 ms later at each look, and an hour later after an evaluation."""
    clock = [0.0]

    def look():
        clock[0] += 0.01
        return clock[0]

    def slow(model, folder, stopping):
        clock[0] += 3600
        return {"number": 0.0}

    monkeypatch.setattr(loop.time, "monotonic", look)
    train(judged(real, "log_every_images=48"), tmp_path, quiet=True, judge=slow)
    monkeypatch.undo()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    speeds = [line["images_per_second"] for line in lines if "evaluation" not in line]
    assert len(speeds) == 4
    assert min(speeds) > 1


def interrupted(recipe, folder, made_by, monkeypatch, at):
    """Train until asked to stop after `at` images have been drawn for judging; returns how many were drawn."""
    drawn, asked = [], loop.StopSignal()
    draw = judging.samples_of

    def samples(job, n, first=0):
        source = draw(job, n, first)

        def batches(start, stop):
            for batch in source.batches(start, stop):
                drawn.append(len(batch))
                asked.asked = asked.asked or (at is not None and sum(drawn) >= at)
                yield batch

        return judging.dataclasses.replace(source, batches=batches)

    with monkeypatch.context() as patch:
        patch.setattr(judging, "samples_of", samples)
        patch.setattr(loop, "Stop", lambda: asked)
        try:
            train(recipe, folder, quiet=True, judge=made_by)
        except SystemExit:
            return sum(drawn), True
    return sum(drawn), False


def test_stopped_while_judging_saves_and_takes_up_the_pieces(
    evaluated, real, tmp_path, monkeypatch
):
    """Fifty samples are two pieces, of 32 and 18; the stop comes in the second piece of the first evaluation."""
    recipe, folder = judged(real), tmp_path / "run"
    assert interrupted(recipe, folder, judge(recipe), monkeypatch, at=33) == (48, True)
    assert not values(folder)
    assert not (folder / "events.jsonl").exists()
    assert [p.name for p in (folder / "evaluations").iterdir()] == ["64.pieces"]
    assert max(int(p.name) for p in (folder / "checkpoints").iterdir()) == 64
    drawn, again = interrupted(recipe, folder, judge(recipe), monkeypatch, at=None)
    assert (drawn, again) == (18 + 50 + 50, False)
    assert_same_run(evaluated, folder)
    assert cards(evaluated) == cards(folder)


def test_what_was_judged_is_not_judged_again(evaluated, real, tmp_path, monkeypatch):
    """Back to the checkpoint at 48: the cards of 64, 128 and 160 are of the same weights and serve."""
    recipe, folder = judged(real), tmp_path / "run"
    shutil.copytree(evaluated, folder)
    for images in (64, 96, 128, 144, 160):
        shutil.rmtree(folder / "checkpoints" / str(images))
    assert interrupted(recipe, folder, judge(recipe), monkeypatch, at=None) == (0, False)
    assert_same_run(evaluated, folder)
    # another protocol is another evaluation
    more = judged(real, "evaluate.steps=3")
    shutil.rmtree(folder / "checkpoints" / "160")
    (folder / "log.jsonl").unlink()
    assert interrupted(more, folder, judge(more), monkeypatch, at=None) == (50, False)
    assert list(values(folder)) == [160]


def test_a_finished_run_can_be_judged_afterwards(whole, evaluated, real, tmp_path):
    recipe, folder = judged(real), tmp_path / "run"
    shutil.copytree(whole, folder)
    train(recipe, folder, quiet=True, judge=judge(recipe))
    assert values(folder) == {160: values(evaluated)[160]}
    before = (folder / "log.jsonl").read_bytes()
    train(recipe, folder, quiet=True, judge=judge(recipe))
    assert (folder / "log.jsonl").read_bytes() == before


def test_a_failure_is_told_and_training_goes_on(whole, evaluated, real, tmp_path, capsys):
    """The second evaluation fails in its second piece; the others are as ever, and no piece stays."""
    recipe = judged(real)
    calls = []

    class Fails(type(seen().network)):
        def forward(self, x, taps):
            calls.append(len(x))
            if len(calls) == 4:
                raise ValueError("the feature network has had enough")
            return super().forward(x, taps)

    bad = seen()
    bad.network.__class__ = Fails
    folder = train(recipe, tmp_path / "run", judge=judging.make_evaluator(recipe, [bad]))
    (event,) = events(folder)
    assert event == {
        "images": 128, "event": "evaluation failed", "why": "ValueError: the feature network has had enough",
    }  # fmt: skip
    assert "evaluation failed at 128 images: why ValueError" in capsys.readouterr().err
    expected = values(evaluated)
    assert values(folder) == {64: expected[64], 160: expected[160]}
    assert sorted(cards(folder)) == ["160.json", "64.json"]
    assert_same_tensors(weights(whole), weights(folder))


def test_pieces_of_a_killed_evaluation_go_with_the_next(evaluated, real, tmp_path):
    recipe, folder = judged(real), tmp_path / "run"
    shutil.copytree(evaluated, folder)
    shutil.rmtree(folder / "checkpoints" / "160")
    (folder / "evaluations" / "128.pieces" / "0123").mkdir(parents=True)
    (folder / "evaluations" / "160.json").write_text("torn")
    train(recipe, folder, quiet=True, judge=judge(recipe))
    assert cards(evaluated) == cards(folder)
    assert_same_run(evaluated, folder)


def test_a_reader_of_the_log_sees_training_and_evaluations_apart(evaluated):
    from mezzotint.train import log

    path = evaluated / "log.jsonl"
    assert [r["images"] for r in log.read(path)] == [32, 64, 96, 128, 160]
    assert {r["images"]: r["evaluation"] for r in log.read_evaluations(path)} == values(evaluated)
    lines = [json.loads(line)["images"] for line in path.read_text().splitlines()]
    assert lines == [32, 64, 64, 96, 128, 128, 160, 160]


def test_the_report_draws_them(evaluated):
    from mezzotint.train.report import page

    text = page(evaluated, "")
    assert 'aria-label="FD-seen"' in text
    assert 'aria-label="KID (seen)"' in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["evaluate.reference=''"],
            "asks for a reference; make one with mezzotint evaluate --make-reference",
        ),
        (["evaluate.reference=nowhere.npz"], "nowhere.npz cannot be read"),
        (["evaluate.num_images=1"], "evaluate.num_images 1 must be at least 2"),
        (["evaluate.sampler=dimm"], "dimm.*ddim"),
        (["evaluate.steps=0"], "steps"),
        (["model.size=16"], "is of 8 x 8 px images, these are 16 x 16"),
        (["model.channels=3"], "features 'seen' are of images of 1 channels, unet-tiny makes 3"),
    ],
)
def test_what_cannot_be_judged_is_told_before_training(real, overrides, words):
    with pytest.raises(ValueError, match=words):
        judge(judged(real, *overrides))


def test_features_that_the_reference_has_not(real):
    with pytest.raises(ValueError, match=r"digits\.npz has no statistics of 'digits'; it has seen"):
        judging.make_evaluator(judged(real, "evaluate.features=[digits]"))


def test_a_recipe_and_its_judge_go_together(real, tmp_path):
    assert judging.make_evaluator(small()) is None
    with pytest.raises(ValueError, match=r"evaluate\.every_images=64 and no judge.*judge_for"):
        train(judged(real), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"evaluate\.every_images=0 and a judge"):
        train(small(), tmp_path / "run", quiet=True, judge=lambda model, folder, stopping: {})
    assert not (tmp_path / "run").exists()
