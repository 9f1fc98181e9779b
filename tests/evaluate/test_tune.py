"""Tuning the sampling: the search, what it measures and writes, resuming, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

import mezzotint as mz
from helpers.evaluators import digits_reference, random_features
from helpers.runs import small
from helpers.tiny_models import tiny
from mezzotint import cli
from mezzotint.convert.model_card import write_card
from mezzotint.core.distributed import World
from mezzotint.evaluate import features, search, tuner
from mezzotint.evaluate.kid import KernelDistance, squared_mmd
from mezzotint.evaluate.metrics import Gaussian, Moments, distance_of_rows
from mezzotint.evaluate.references import read_reference
from mezzotint.evaluate.search import Candidate, Space, compass_search
from mezzotint.evaluate.tune import tune
from mezzotint.evaluate.tune_record import Trial, TuneRecord
from mezzotint.evaluate.tuner import TuneSettings
from mezzotint.models import find_tuned, load_model, open_model
from mezzotint.sampling.job import make_job
from mezzotint.sampling.tuned import read_tuned
from mezzotint.train.loop import train

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
SETTINGS = TuneSettings(calls=400, steps=2, resamples=20, metric="fd")
IMAGES = 4  # of a candidate


# --- the search, a function of a distance ---------------------------------------------------------


def bowl(candidate):
    """A distance whose smallest value, 0, is known."""
    width = candidate.width or 0.02
    return (
        math.log(candidate.scale / 2.25) ** 2
        + (candidate.first - 0.25) ** 2
        + (candidate.last - 0.75) ** 2
        + math.log2(width / 0.08) ** 2 / 4
    )


def test_the_search_finds_a_known_optimum():
    found = compass_search(bowl, Space(guided=True, widths=(0.05, 0.1), steps=16))
    best = min(found, key=lambda c: found[c])
    assert next(iter(found)) == Candidate()
    assert best.scale == pytest.approx(2.25, rel=0.06)  # the last step is a factor 1.5^(1/4)
    assert (best.first, best.last) == (0.25, 0.75)
    assert best.width == pytest.approx(0.08, rel=0.1)
    assert found[best] < 0.02 < found[Candidate()]


def test_no_guidance_and_no_width_is_found_where_they_harm():
    found = compass_search(lambda c: c.scale + (c.width or 0), Space(guided=True, widths=(0.1,)))
    assert min(found, key=lambda c: found[c]) == Candidate()


def test_the_search_ends_with_its_budget_and_asks_once():
    asked = []

    def measure(candidate):
        asked.append(candidate)
        return bowl(candidate) if len(asked) <= 7 else None

    found = compass_search(measure, Space(guided=True, steps=16))
    assert list(found) == asked[:7]
    assert len(asked) == len(set(asked))


def test_an_interval_without_steps_and_a_scale_of_one_are_no_guidance():
    space = Space(guided=True, steps=8)
    near = Candidate(scale=1.1, first=0.5, last=0.625)
    neighbours = list(space.neighbours(near, 1.0))
    assert Candidate() in neighbours
    assert all(0 <= c.first < c.last <= 1 and c.scale >= 1 for c in neighbours)
    assert list(Space(guided=False, widths=(0.05,)).neighbours(Candidate(), 1.0)) == [
        Candidate(width=0.05)
    ]


def test_a_scale_that_wins_only_in_the_middle_is_found():
    """Everywhere, every scale is worse than none (arXiv 2404.07724's case)."""

    def distance(c):
        harm = 4 * max(0.0, 0.2 - c.first) * (c.scale - 1)
        return harm + abs(c.scale - 1.8) * (c.first >= 0.2) + (c.scale == 1)

    found = compass_search(distance, Space(guided=True, steps=20))
    best = min(found, key=lambda c: found[c])
    assert best.first >= 0.2
    assert best.scale == pytest.approx(1.8, rel=0.06)


# --- distances of rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [4, 30])
def test_distances_of_rows_are_those_of_evaluate(n):
    rng = np.random.default_rng(0)
    real, rows = torch.tensor(rng.normal(size=(40, 8))), torch.tensor(rng.normal(1, 2, (n, 8)))
    gaussian = Gaussian.of(Moments.of(real))
    moments = Moments.of(rows)
    wanted = Gaussian(moments.mean, moments.cov).distance(gaussian)
    assert distance_of_rows(rows, gaussian) == pytest.approx(wanted, rel=1e-6)
    distance = KernelDistance(real).statistic(rows)
    assert distance(torch.arange(n)) == pytest.approx(squared_mmd(real, rows), rel=1e-9)
    some = torch.tensor([0, 2, 3])
    assert distance(some) == pytest.approx(squared_mmd(real, rows[some]), rel=1e-9)


# --- a model folder -------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _few_images():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "FEWEST_IMAGES", IMAGES)
        yield


@pytest.fixture
def synthetic(monkeypatch):
    """Replace sampling by random features that a candidate's scale and seeds decide."""

    def rows(self, candidate, first_seed, images, folder):
        rng = np.random.default_rng([first_seed, round(100 * candidate.scale)])
        return torch.tensor(rng.normal(candidate.scale, 1, (images, 4)))

    monkeypatch.setattr(tuner.Tuner, "rows", rows)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = digits_reference(tmp_path_factory.mktemp("reference") / "digits.npz")
    return read_reference(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model of ten classes, not tuned; read-only."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    mz.save_model(tiny(channels=1, num_classes=10), folder)
    return folder


def run_tune(folder, reference, settings=SETTINGS, say=lambda line: None):
    return tune(folder, reference, random_features(), settings, ALONE, say)


@pytest.fixture(scope="module")
def tuned(plain, reference, tmp_path_factory):
    """A tuned copy of it and its record; read-only."""
    folder = tmp_path_factory.mktemp("tuned") / "model"
    shutil.copytree(plain, folder)
    lines = []
    written, record = run_tune(folder, reference, say=lines.append)
    assert written == folder
    return folder, record, lines


def test_the_calls_are_spent_and_never_exceeded(tuned):
    _, record, lines = tuned
    assert 0.9 * SETTINGS.calls < record.calls <= SETTINGS.calls
    assert {t.images for t in record.search} == {IMAGES}
    assert record.search[0].candidate == record.comparison[0].candidate == Candidate()
    assert len(record.comparison) == 3
    assert "FD-random" in lines[0]


def test_the_last_comparison_is_on_fresh_seeds(tuned):
    _, record, _ = tuned
    last = record.search[0].first_seed + record.search[0].images
    assert {t.first_seed for t in record.comparison} == {last}
    assert all(t.low <= t.value - record.comparison[0].value <= t.high
               for t in record.comparison[1:])  # fmt: skip


def test_the_winner_becomes_the_models_default(tuned, plain):
    folder, record, _ = tuned
    model = load_model(folder)
    settings, winner = read_tuned(model.info), record.winner
    assert settings is not None
    assert (settings.guidance, settings.steps) == (winner.guidance, 2)
    assert settings.measured.value == winner.value <= record.comparison[0].value
    assert settings.measured.default == record.comparison[0].value
    assert settings.measured.reference == "digits.npz"
    job = make_job(folder)
    assert (job.settings.steps, job.settings.guidance) == (2, winner.guidance)
    for name in ("model.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes()


def test_it_is_a_function_of_its_arguments(tuned, plain, reference, tmp_path):
    shutil.copytree(plain, tmp_path / "m")
    _, again = run_tune(tmp_path / "m", reference)
    assert (again.search, again.comparison) == (tuned[1].search, tuned[1].comparison)
    assert len({t.value for t in again.search}) > 2


class Killed(BaseException):
    """A process that ends."""


@pytest.mark.parametrize(
    ("values", "highs", "wins"),
    [
        ((5, 3, 4), (None, -1, -0.5), 1),
        ((5, 3, 4), (None, 0.5, -0.5), 2),
        ((5, 3, 4), (None, 0.5, 0), 0),
        ((5, 6, 7), (None, 2, 3), 0),
        ((5, 4, 3), (None, None, None), 2),
    ],
)
def test_luck_does_not_win(values, highs, wins, tmp_path):
    trials = [
        Trial(candidate=Candidate(), images=9, first_seed=0, calls=1, value=v, low=-9, high=h)
        for v, h in zip(values, highs, strict=True)
    ]
    record = TuneRecord(path=tmp_path, arguments={}, comparison=trials)
    assert record.winner is trials[wins]


@pytest.mark.parametrize("at", [1, 4])
def test_a_killed_search_goes_on_after_the_last_candidate(
    at, synthetic, plain, reference, tmp_path, monkeypatch
):
    folder, whole = tmp_path / "m", tmp_path / "whole"
    for copy in (folder, whole):
        shutil.copytree(plain, copy)
    _, uninterrupted = run_tune(whole, reference)
    measured, rows = [], tuner.Tuner.rows

    def counting(self, candidate, *args):
        if len(measured) == at:
            raise Killed
        measured.append(candidate)
        return rows(self, candidate, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tuner.Tuner, "rows", counting)
        with pytest.raises(Killed):
            run_tune(folder, reference)
        at = 10**6
        lines = []
        _, record = run_tune(folder, reference, say=lines.append)
    searched = measured[: -len(record.comparison)]
    assert len(searched) == len(set(searched)), "a finished candidate was measured again"
    assert "measured already" in lines[0]
    assert record == dataclasses.replace(uninterrupted, path=record.path)


def test_the_same_command_again_measures_nothing(tuned, reference, tmp_path, monkeypatch):
    shutil.copytree(tuned[0], tmp_path / "m")
    monkeypatch.setattr(tuner.Tuner, "rows", lambda *_: pytest.fail("measured"))
    _, record = run_tune(tmp_path / "m", reference)
    assert record.comparison == tuned[1].comparison


def test_other_arguments_begin_anew_and_say_so(synthetic, tuned, reference, tmp_path):
    shutil.copytree(tuned[0], tmp_path / "m")
    lines = []
    other = dataclasses.replace(SETTINGS, seed=5, metric="kid")
    _, record = run_tune(tmp_path / "m", reference, other, lines.append)
    assert "another metric, seed; the search starts from the beginning" in lines[0]
    assert record.search[0].first_seed == 5
    tuned_settings = read_tuned(load_model(tmp_path / "m").info)
    assert tuned_settings is not None
    assert tuned_settings.measured.metric == "KID (random)"


def test_a_file_of_others_and_a_damaged_one_are_not_replaced(plain, reference, tmp_path):
    shutil.copytree(plain, tmp_path / "m")
    record = tmp_path / "m" / "tune.json"
    record.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"tune\.json exists and is not a search"):
        run_tune(tmp_path / "m", reference)
    assert record.read_text() == '{"mine": 1}'
    opened = tuner.open_tuner(tmp_path / "m", reference, random_features(), SETTINGS)
    values = {"mezzotint_tuning": 1, "arguments": opened.arguments(), "search": [{"images": "x"}]}
    record.write_text(json.dumps(values | {"comparison": []}))
    with pytest.raises(ValueError, match=r"tune\.json is damaged"):
        TuneRecord.open(record, opened.arguments())


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with snapshots; read-only."""
    recipe = small("ema.power_stds=[0.05,0.1]", "samples.every_images=1000", "images=96")
    return train(recipe, tmp_path_factory.mktemp("trained") / "run", quiet=True)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def prefer_width(monkeypatch, width):
    """Make the distance the EMA width's distance to `width`."""

    def compare(self, candidate, first_seed, images, folder):
        return torch.full((images, 1), abs((candidate.width or 1.0) - width))

    monkeypatch.setattr(tuner.Tuner, "rows", compare)
    monkeypatch.setattr(
        tuner.Tuner,
        "statistic",
        lambda self, rows: lambda chosen: float(rows[chosen].double().mean()),
    )


def test_a_runs_winner_has_the_weights_of_its_width(run, reference, monkeypatch):
    before = (run / "model" / "config.json").read_bytes()
    prefer_width(monkeypatch, 0.1)
    folder, record = run_tune(run, reference, dataclasses.replace(SETTINGS, calls=5000))
    assert folder == run / "tuned" == find_tuned(run)
    assert record.winner.candidate.width == 0.1
    assert (run / "model" / "config.json").read_bytes() == before
    tuned, own = open_model(run, tuned=True), open_model(run)
    assert tuned.info.extra["ema_width"] == 0.1
    assert "sampling" not in own.info.extra
    name = next(iter(own.state_dict()))
    assert not torch.equal(tuned.state_dict()[name], own.state_dict()[name])
    job = make_job(run)
    assert "EMA width" in job.tuned_fields
    assert job.card(2, 0)["model"]["ema_width"] == 0.1
    # A published protocol is sampled from the model as it was trained.
    assert make_job(run, protocol="adm").model.info.extra == own.info.extra
    assert "## Sampling" in (folder / "README.md").read_text()
    assert write_card(run) == folder
    text = (folder / "README.md").read_text()
    assert "EMA width 0.1" in text
    assert "instead of" in text


def test_a_resumed_run_does_not_keep_stale_settings(run, reference, monkeypatch, capsys):
    prefer_width(monkeypatch, 0.1)
    run_tune(run, reference, dataclasses.replace(SETTINGS, calls=5000))
    monkeypatch.undo()
    longer = small("ema.power_stds=[0.05,0.1]", "samples.every_images=1000", "images=128")
    train(longer, run, quiet=True)
    assert find_tuned(run) is None
    assert make_job(run).tuned is None
    monkeypatch.setattr(sys, "argv", ["mezzotint", "sample", str(run), "--steps", "1", "-n", "1",
                                      "--out", str(run.parent / "a.png")])  # fmt: skip
    cli.main()
    assert "is of earlier weights and not used" in capsys.readouterr().out
    assert write_card(run) == run / "model"


# --- what is refused, before anything is written --------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calls": 119}, r"--calls 119 is too few.*need 120 with 2 steps"),
        ({"calls": 0}, "calls 0 must be at least 1"),
        ({"calls": -5}, "calls -5 must be at least 1"),
        ({"metric": "fdd"}, "unknown metric 'fdd'; choose fd or kid"),
        ({"sampler": "ddin"}, "unknown sampler 'ddin'.*ddim"),
        ({"resamples": 5}, "resamples 5: give at least 20, or 0"),
        ({"prompts": ("a",)}, "text"),
    ],
)
def test_wrong_settings_are_refused(changes, message, plain, reference):
    before = sorted(plain.iterdir())
    with pytest.raises(ValueError, match=message):
        run_tune(plain, reference, TuneSettings(**{"calls": 400, "steps": 2, **changes}))
    assert sorted(plain.iterdir()) == before


def test_a_model_in_the_box_is_not_changed(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"eurosat-64 is a model in the box.*copy .* the copy"):
        run_tune("eurosat-64", reference)
    assert not list(tmp_path.iterdir())


def test_references_that_do_not_fit_are_refused(plain, reference, tmp_path):
    other = dataclasses.replace(reference, metadata=reference.metadata | {"resolution": [16, 16]})
    with pytest.raises(ValueError, match="16 x 16 px images, these are 8 x 8"):
        run_tune(plain, other)
    named = dataclasses.replace(reference, statistics={}, features={})
    with pytest.raises(ValueError, match="no statistics of 'random'"):
        run_tune(plain, named, dataclasses.replace(SETTINGS, metric=None))
    rowless = dataclasses.replace(reference, features={})
    with pytest.raises(ValueError, match="--metric kid needs"):
        run_tune(plain, rowless, dataclasses.replace(SETTINGS, metric="kid"))
    assert not (plain / "tune.json").exists()


def test_nothing_to_tune_is_one_sentence(reference, tmp_path):
    mz.save_model(tiny(channels=1, num_classes=0), tmp_path / "free")
    with pytest.raises(ValueError, match=r"nothing to tune: it is uncond.*and there is no run"):
        run_tune(tmp_path / "free", reference)
    with pytest.raises(ValueError, match="is no run folder and no model folder"):
        run_tune(tmp_path / "missing", reference)
    assert not (tmp_path / "free" / "tune.json").exists()


# --- the command ----------------------------------------------------------------------------------


def test_the_command(synthetic, plain, reference, tmp_path, monkeypatch, capsys):
    shutil.copytree(plain, tmp_path / "m")
    monkeypatch.setattr(features, "open_features", lambda names, weights: [random_features()])
    arguments = ["tune", tmp_path / "m", "--reference", reference.name, "--calls", 400,
                 "--steps", 2, "--resamples", 20, "--metric", "fd"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["mezzotint", *map(str, arguments)])
    cli.main()
    printed = capsys.readouterr().out
    for part in ("search: 4 images", "last comparison, on fresh seeds", "(the default)",
                 "chosen: ", "next: mezzotint sample"):  # fmt: skip
        assert part in printed, part
    monkeypatch.setattr(sys, "argv", ["mezzotint", "sample", str(tmp_path / "m"), "-n", "2",
                                      "--out", str(tmp_path / "a.npz")])  # fmt: skip
    cli.main()
    assert "tuned settings: ddim, 2 steps" in capsys.readouterr().out


def test_a_part_of_a_run_is_not_tuned(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mezzotint", "tune", str(run / "model"), "--reference", "x",
                                      "--calls", "9"])  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main()
    assert "belongs to the run" in capsys.readouterr().err


def test_the_widths_stay_within_edm2s_range():
    space = Space(guided=False, widths=(0.02, 0.2))
    for width in (0.02, 0.2):
        widths = [c.width for c in space.neighbours(Candidate(width=width), 1.0)]
        assert all(search.NARROWEST <= w <= search.WIDEST for w in widths if w is not None)
