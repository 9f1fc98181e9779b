"""Complete evaluations: the same numbers however they are computed, and their protocol."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mezzotint.evaluate import extract
from mezzotint.evaluate.evaluate import (
    MetricSettings,
    evaluate,
    print_evaluation,
)
from mezzotint.evaluate.extract import extract_features
from mezzotint.evaluate.features import from_module, open_features
from mezzotint.evaluate.image_source import from_dataset, from_samples
from mezzotint.evaluate.inception import INCEPTION_FILE
from mezzotint.evaluate.kid import kid
from mezzotint.evaluate.metrics import frechet_distance, inception_score
from mezzotint.evaluate.precision_recall import density_coverage, precision_recall
from mezzotint.evaluate.references import make_reference
from mezzotint.evaluate.results import Protocol, load_evaluation, make_protocol

SETTINGS = MetricSettings(subset_size=20, subsets=10)


def random_images(n, seed=0, size=12):
    generator = torch.Generator().manual_seed(seed)
    high = 200 + 20 * seed
    return torch.randint(0, high, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def random_source(n=150, seed=0, batch=10, **metadata):
    x = random_images(n, seed)
    metadata = {"seeds": f"0...{n - 1}", "sampler": "ddim", "steps": 50} | metadata
    return source_of(x, f"random {seed}", metadata, identity=f"{seed}", batch=batch)


def source_of(images, name="images", metadata=None, **options):
    def draw(indices):
        return images[list(indices)]

    return from_samples(draw, len(images), name, metadata or {}, **options)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


def feature_set():
    return from_module(Net(), name="own", dims=5, size=12)


@pytest.fixture
def reference(tmp_path):
    images = random_source(200, seed=1)
    return make_reference(images, tmp_path / "reference.npz", [feature_set()], keep=90)


# --- features in pieces ---------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(extract, "piece_images", lambda num_images: 40)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_features_do_not_depend_on_batches_or_pieces(batch, small_pieces, tmp_path):
    expected = feature_set()(random_images(150))
    source = random_source(batch=batch)
    assert extract_features(source, [feature_set()])["own"].equal(expected)
    assert extract_features(source, [feature_set()], tmp_path)["own"].equal(expected)


def test_an_interrupted_extraction_resumes_with_the_missing_pieces(small_pieces, tmp_path):
    x, drawn, interrupt = random_images(150), [], [True]

    def draw(indices):
        if interrupt[0] and indices.start >= 80:
            raise KeyboardInterrupt
        drawn.extend(indices)
        return x[list(indices)]

    source = from_samples(draw, 150, "model", {}, identity="model at 7")
    with pytest.raises(KeyboardInterrupt):
        extract_features(source, [feature_set()], tmp_path)
    assert drawn == list(range(80))
    interrupt[0] = False
    assert extract_features(source, [feature_set()], tmp_path)["own"].equal(feature_set()(x))
    assert drawn == list(range(150))
    # Pieces of another model are not reused.
    drawn.clear()
    other = dataclasses.replace(source, identity="model at 8")
    extract_features(other, [feature_set()], tmp_path)
    assert drawn == list(range(150))
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".npz"}


def test_a_damaged_piece_is_named(small_pieces, tmp_path):
    extract_features(random_source(), [feature_set()], tmp_path)
    piece = next(tmp_path.rglob("00000040-00000080.npz"))
    piece.write_bytes(piece.read_bytes()[:-50])
    with pytest.raises(ValueError, match="00000040-00000080"):
        extract_features(random_source(), [feature_set()], tmp_path)


def test_bad_sources_are_refused(tmp_path):
    x = random_images(30)
    short = from_samples(lambda indices: x[:20], 30, "short", {})
    with pytest.raises(ValueError, match="20 images"):
        extract_features(short, [feature_set()])
    with pytest.raises(ValueError, match="1 images"):
        extract_features(random_source(1), [feature_set()])
    with pytest.raises(ValueError, match="identity"):
        extract_features(source_of(x), [feature_set()], tmp_path)


RANK = """
import os, sys, torch, torch.distributed as dist
from evaluate import test_evaluate as t
from mezzotint.evaluate import extract
from mezzotint.core.distributed import get_rank
from mezzotint.evaluate.references import read_reference
extract.piece_images = lambda num_images: 40
dist.init_process_group("gloo", init_method="file://{store}", rank=int(sys.argv[1]), world_size=2)
reference, sets = read_reference({reference!r}), [t.feature_set()]
evaluation = t.evaluate(t.random_source(), reference, sets, t.SETTINGS)
evaluation.save({out!r} + f"/{{get_rank()}}.json")
assert t.evaluate(t.random_source(), reference, sets, t.SETTINGS, folder={out!r}) == evaluation
x = t.random_images(150)
def draw(indices):
    if 40 in indices:  # the second piece, which is the second rank's
        raise OSError("no memory")
    return x[list(indices)]
try:
    t.evaluate(t.from_samples(draw, 150, "model", {{}}), reference, sets, t.SETTINGS)
except OSError as error:
    print(type(error).__name__, error)
total = torch.ones(1)
dist.all_reduce(total)  # the process group still works
print("sum", total.item(), flush=True)
dist.barrier()
os._exit(0)  # gloo's teardown may abort if the other rank has left
"""


def test_two_ranks_give_the_numbers_of_one_and_fail_together(reference, tmp_path):
    script, out = tmp_path / "rank.py", tmp_path / "out"
    out.mkdir()
    script.write_text(RANK.format(store=tmp_path / "store", reference=reference.name, out=str(out)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(r)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    assert outputs[0].splitlines() == ["RankFailed rank 1 failed: OSError: no memory", "sum 2.0"]
    assert outputs[1].splitlines() == ["OSError no memory", "sum 2.0"]
    alone = evaluate(random_source(), reference, [feature_set()], SETTINGS)
    for r in range(2):
        assert load_evaluation(out / f"{r}.json") == alone  # to the last bit


# --- numbers --------------------------------------------------------------------------------------


def test_every_number_is_the_metric_of_the_features(reference):
    evaluation = evaluate(random_source(), reference, [feature_set()], SETTINGS)
    ours, kept = feature_set()(random_images(150)).double().numpy(), reference.features["own"]
    real = feature_set()(random_images(200, seed=1)).double().numpy()
    expected = {
        "FD-own": frechet_distance(ours.mean(0), np.cov(ours.T), real.mean(0), np.cov(real.T)),
        "KID (own)": kid(kept, ours, 20, 10).value,
    }
    for values in (precision_recall(kept, ours), density_coverage(kept, ours)):
        expected |= {f"{k} (own)": v for k, v in values._asdict().items()}
    assert {n.metric: n.value for n in evaluation.numbers} == pytest.approx(expected, rel=1e-9)
    assert evaluation["KID (own)"].error == kid(kept, ours, 20, 10).standard_error
    assert 0 < evaluation["precision (own)"].value < 1
    for number in evaluation.numbers:
        assert number.features == {**feature_set().metadata(), "hash": feature_set().hash}
        assert number.reference["hash"] == reference.hash
        assert number.reference["num_images"] == 200
        assert "FID" not in number.metric
    assert evaluation.protocol == Protocol(
        source="random 0",
        num_images=150,
        code_version=evaluation.protocol.code_version,
        resolution=(12, 12),
        seeds="0...149",
        sampler="ddim",
        steps=50,
    )


def test_fdr_and_intervals(reference, tmp_path):
    images = random_source(100, seed=1, batch=7)
    heldout = make_reference(images, tmp_path / "heldout.npz", [feature_set()])
    settings = dataclasses.replace(SETTINGS, resamples=30)
    evaluation = evaluate(random_source(), reference, [feature_set()], settings, heldout=heldout)
    distance, base = evaluation["FD-own"], evaluation["FD-own of held-out images"]
    assert evaluation["FDr (FD-own)"].value == distance.value / base.value > 1
    assert base.reference["heldout_hash"] == heldout.hash
    assert distance.low < distance.value < distance.high
    assert distance.settings == {"resamples": 30, "level": 0.95, "seed": 0}


def test_the_inception_score_needs_no_reference(reference):
    logits = dataclasses.replace(feature_set(), name="inception-logits")
    settings = dataclasses.replace(SETTINGS, split_size=50)
    evaluation = evaluate(random_source(), reference, [logits], settings)
    expected = inception_score(feature_set()(random_images(150)), 50)
    (score,) = evaluation.numbers
    assert score.metric == f"IS (weights {logits.weights[:8]})"
    assert score.value == expected.mean
    assert score.settings == {"split_size": 50, "std_over_splits": expected.std}
    assert score.reference is None
    published = dataclasses.replace(logits, weights=INCEPTION_FILE.sha256)
    assert evaluate(random_source(), reference, [published], settings)["IS"].value == expected.mean


def test_the_reference_is_no_held_out_set(reference):
    with pytest.raises(ValueError, match="is of the same images as"):
        evaluate(random_source(), reference, [feature_set()], SETTINGS, heldout=reference)


@pytest.mark.parametrize("count", [2, 5])
def test_more_images_than_neighbours_are_needed_before_any_is_drawn(count, reference):
    def batches(start, stop):
        raise AssertionError("images were drawn")

    source = dataclasses.replace(random_source(), num_images=count, batches=batches)
    with pytest.raises(ValueError, match=f"{count} images to evaluate: .* need 6 or more"):
        evaluate(source, reference, [feature_set()], SETTINGS)


def test_every_metric_prefers_real_digits_to_noise(tmp_path):
    pytest.importorskip("sklearn")
    from mezzotint.data.image_dataset import open_images

    sets = open_features(["digits"])
    train, test = (
        from_dataset(open_images(f"digits:{split}", size=16, channels=1), split)
        for split in ("train", "test")
    )
    reference = make_reference(train, tmp_path / "digits.npz", sets)
    assert reference.metadata["preprocessing"] == "crop adm to 16 px"
    real = evaluate(test, reference, sets, SETTINGS)
    noise = evaluate(source_of(random_images(90, size=16)[:, :1]), reference, sets, SETTINGS)
    assert real["FD-digits"].value * 10 < noise["FD-digits"].value
    assert real["precision (digits)"].value > 0.7
    assert noise["precision (digits)"].value < 0.2
    assert real["KID (digits)"].value < noise["KID (digits)"].value


def test_few_images_give_a_warning(reference):
    statistics_only = dataclasses.replace(reference, features={})
    with pytest.warns(UserWarning, match="4 images in 5 dimensions"):
        evaluation = evaluate(random_source(4), statistics_only, [feature_set()], SETTINGS)
    assert [n.metric for n in evaluation.numbers] == ["FD-own"]


def test_a_reference_of_another_resolution_is_refused_after_two_images(reference):
    drawn = []

    def draw(indices):
        drawn.extend(indices)
        return random_images(len(indices), size=16)

    small = dataclasses.replace(reference, metadata={**reference.metadata, "resolution": [12, 12]})
    with pytest.raises(ValueError, match=r"12 x 12.*16 x 16"):
        evaluate(from_samples(draw, 50_000, "model", {}), small, [feature_set()])
    assert len(drawn) <= 2


def test_unknown_metadata_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"'step'.*steps"):
        make_protocol(random_source(step=3), None)


def test_the_printed_table_has_numbers_claims_and_protocol(reference, capsys):
    evaluation = evaluate(random_source(), reference, [feature_set()], SETTINGS)
    print_evaluation(evaluation, {"FD-own": "1.73 (paper)"})
    printed = capsys.readouterr().out
    assert "1.73 (paper)" in printed
    for number in evaluation.numbers:
        assert number.metric in printed
        assert f"{number.value:.6g}" in printed
    assert "sampler: ddim" in printed
    assert "guidance: unknown" in printed


def test_grey_images_are_repeated_and_it_is_said(tmp_path, capsys):
    sets = [from_module(Net(), name="net", size=12, dims=5)]
    grey, real = random_images(60)[:, :1], random_images(80, seed=1)[:, :1]
    reference = make_reference(source_of(real, channels=1), tmp_path / "g.npz", sets)
    colour = make_reference(source_of(real.expand(-1, 3, -1, -1)), tmp_path / "c.npz", sets)
    assert np.array_equal(reference.statistics["net"].mu, colour.statistics["net"].mu)
    assert reference.metadata["preprocessing"] == "grey repeated in three channels"
    for options in ({}, {"channels": 1}):
        judged = evaluate(source_of(grey, **options), reference, sets, SETTINGS)
        expected = evaluate(source_of(grey.expand(-1, 3, -1, -1)), colour, sets, SETTINGS)
        for number in expected.numbers:
            assert judged[number.metric].value == number.value
        assert judged.protocol.preprocessing == "grey repeated in three channels"
        assert expected.protocol.preprocessing is None
    judged.save(tmp_path / "e.json")
    assert "grey repeated in three channels" in (tmp_path / "e.json").read_text()
    print_evaluation(judged)
    assert "grey repeated in three channels" in capsys.readouterr().out
