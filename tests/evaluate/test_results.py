"""Whole evaluations: the same number however they run, a card on every number, no comparison of unlike ones."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.evaluate import extract as collecting
from mezzotint.evaluate.evaluate import (
    MetricSettings,
    evaluate,
    evaluate_memorization,
    make_protocol,
    print_evaluation,
)
from mezzotint.evaluate.extract import extract_features
from mezzotint.evaluate.features import from_module
from mezzotint.evaluate.image_source import from_dataset, from_samples
from mezzotint.evaluate.kid import kid
from mezzotint.evaluate.memorization import measure_memorization, neighbour_sheet
from mezzotint.evaluate.metrics import frechet_distance, inception_score
from mezzotint.evaluate.precision_recall import density_coverage, precision_recall
from mezzotint.evaluate.references import make_reference
from mezzotint.evaluate.results import (
    Evaluation,
    Number,
    Protocol,
    compare,
    load_evaluation,
    print_comparison,
    require_comparable,
)

SETTINGS = MetricSettings(subset_size=20, subsets=10)


def pictures(n, seed=0, size=12):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200 + 20 * seed, (n, 3, size, size), generator=g, dtype=torch.uint8)


def source(n=150, seed=0, batch=10, **card):
    x = pictures(n, seed)
    name, card = (
        f"pictures {seed}",
        {"seeds": f"0...{n - 1}", "sampler": "ddim", "steps": 50} | card,
    )
    return from_samples(
        lambda numbers: x[list(numbers)], n, name, card, identity=f"{seed}", batch=batch
    )


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


def own():
    return from_module(Net(), name="own", dims=5, size=12)


@pytest.fixture
def reference(tmp_path):
    return make_reference(source(200, seed=1), tmp_path / "reference.npz", [own()], keep=90)


# --- collecting -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(collecting, "piece_images", lambda n: 40)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_features_are_the_same_in_any_batches_on_disk_or_in_memory(batch, small_pieces, tmp_path):
    want = own()(pictures(150))
    assert extract_features(source(batch=batch), [own()])["own"].equal(want)
    assert extract_features(source(batch=batch), [own()], tmp_path)["own"].equal(want)


def test_an_interrupted_evaluation_is_taken_up_where_it_ended(small_pieces, tmp_path):
    x, drawn = pictures(150), []

    def draw(numbers):
        if numbers.start >= 80 and len(drawn) < 100:
            raise KeyboardInterrupt
        drawn.extend(numbers)
        return x[list(numbers)]

    def made():
        return from_samples(draw, 150, "model", {}, identity="model at 7")

    with pytest.raises(KeyboardInterrupt):
        extract_features(made(), [own()], tmp_path)
    assert drawn == list(range(80))
    drawn.extend([-1] * 20)
    assert extract_features(made(), [own()], tmp_path)["own"].equal(own()(x))
    assert drawn[100:] == list(range(80, 150))
    extract_features(dataclasses.replace(made(), identity="model at 8"), [own()], tmp_path)
    assert drawn[170:] == list(range(150))  # another model's pieces are no use
    assert not list(tmp_path.rglob("*.part"))


def test_progress_is_shown_when_asked_for(small_pieces, capsys):
    extract_features(source(), [own()])
    assert not capsys.readouterr().out
    extract_features(source(), [own()], show=True)
    assert "features of pictures 0" in capsys.readouterr().out


def test_a_damaged_piece_is_named(small_pieces, tmp_path):
    extract_features(source(), [own()], tmp_path)
    piece = next(tmp_path.rglob("00000040-00000080.npz"))
    piece.write_bytes(piece.read_bytes()[:-50])
    with pytest.raises(ValueError, match="00000040-00000080"):
        extract_features(source(), [own()], tmp_path)


def test_sources_are_held_to_their_word(tmp_path):
    x = pictures(30)
    with pytest.raises(ValueError, match="gave 20 images"):
        extract_features(from_samples(lambda numbers: x[:20], 30, "short", {}), [own()])
    with pytest.raises(ValueError, match="1 images; at least two"):
        extract_features(source(1), [own()])
    with pytest.raises(ValueError, match="no identity"):
        extract_features(
            from_samples(lambda numbers: x[list(numbers)], 30, "model", {}), [own()], tmp_path
        )


RANK = """
import os, sys, torch, torch.distributed as dist
import evaluate.test_results as t
from mezzotint.evaluate import extract
from mezzotint.core.distributed import EvaluationFailed, rank
from mezzotint.evaluate.references import read_reference
extract.piece_images = lambda n: 40
dist.init_process_group("gloo", init_method="file://{store}", rank=int(sys.argv[1]), world_size=2)
reference = read_reference({reference!r})
whole = t.evaluate(t.source(), reference, [t.own()], t.SETTINGS)
whole.save({out!r} + f"/{{rank()}}.json")
resumed = t.evaluate(t.source(), reference, [t.own()], t.SETTINGS, folder={out!r})
assert resumed == whole
x = t.pictures(150)
def draw(numbers):
    if 40 in numbers:  # the second piece is the second rank's
        raise OSError("no memory")
    return x[list(numbers)]
try:
    t.evaluate(t.from_samples(draw, 150, "model", {{}}), reference, [t.own()], t.SETTINGS)
except EvaluationFailed as error:
    print("failed:", error)
total = torch.ones(1)
dist.all_reduce(total)  # and the work goes on
print("goes on:", total.item(), flush=True)
dist.barrier()
os._exit(0)  # gloo's own teardown may abort when the other rank is gone first; it is not what is tested
"""


def test_two_ranks_give_the_number_of_one_and_fail_together(reference, tmp_path):
    script = tmp_path / "rank.py"
    tests, out = os.path.dirname(__file__), str(tmp_path / "out")
    os.mkdir(out)
    script.write_text(
        RANK.format(tests=tests, store=tmp_path / "store", reference=reference.name, out=out)
    )
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
    for output in outputs:
        assert "failed: rank 1: OSError: no memory" in output
        assert "goes on: 2.0" in output
    alone = evaluate(source(), reference, [own()], SETTINGS)
    for r in range(2):
        assert load_evaluation(f"{out}/{r}.json") == alone  # every number, to the last bit


# --- evaluating -----------------------------------------------------------------------------------------------------


def test_every_number_is_the_metric_of_the_features(reference):
    found = evaluate(source(), reference, [own()], SETTINGS)
    ours, kept = own()(pictures(150)).double().numpy(), reference.features["own"]
    real = own()(pictures(200, seed=1)).double().numpy()
    want = {
        "FD-own": frechet_distance(ours.mean(0), np.cov(ours.T), real.mean(0), np.cov(real.T)),
        "KID (own)": kid(kept, ours, 20, 10).value,
    }
    for values in (precision_recall(kept, ours), density_coverage(kept, ours)):
        want |= {f"{k} (own)": v for k, v in values._asdict().items()}
    assert {n.metric: n.value for n in found.numbers} == pytest.approx(want, rel=1e-9)
    assert found["KID (own)"].error == kid(kept, ours, 20, 10).standard_error
    assert 0 < found["precision (own)"].value < 1
    for number in found.numbers:
        assert number.features == {**own().card(), "hash": own().hash}
        assert number.reference["hash"] == reference.hash
        assert "FID" not in number.metric
    assert found.protocol == Protocol(
        source="pictures 0",
        n=150,
        code_version=found.protocol.code_version,
        resolution=(12, 12),
        seeds="0...149",
        sampler="ddim",
        steps=50,
    )


def test_fdr_and_intervals(reference, tmp_path):
    heldout = make_reference(source(100, seed=1, batch=7), tmp_path / "heldout.npz", [own()])
    settings = dataclasses.replace(SETTINGS, resamples=30)
    found = evaluate(source(), reference, [own()], settings, heldout=heldout)
    distance, base = found["FD-own"], found["FD-own of held-out images"]
    assert found["FDr (FD-own)"].value == distance.value / base.value > 1
    assert base.reference["heldout_hash"] == heldout.hash
    assert distance.low < distance.value < distance.high
    assert distance.settings == {"resamples": 30, "level": 0.95, "seed": 0}


def test_logits_give_a_score_without_any_reference(reference):
    logits = dataclasses.replace(own(), name="inception-logits")
    found = evaluate(source(), reference, [logits], dataclasses.replace(SETTINGS, split_size=50))
    want = inception_score(own()(pictures(150)), 50)
    assert found["IS"].value == want.mean
    assert found["IS"].settings == {"split_size": 50, "std_over_splits": want.std}
    assert found["IS"].reference is None


def test_real_digits_from_noise(tmp_path):
    pytest.importorskip("sklearn")
    from mezzotint.data.image_dataset import open_images
    from mezzotint.evaluate.features import open_features

    sets = open_features(["digits"])
    train, test = (
        from_dataset(open_images(f"digits:{split}", size=16, channels=1), split)
        for split in ("train", "test")
    )
    reference = make_reference(train, tmp_path / "digits.npz", sets)
    good = evaluate(test, reference, sets, SETTINGS)
    grey = pictures(90, size=16)[:, :1]
    noise = from_samples(lambda numbers: grey[list(numbers)], 90, "noise", {})
    bad = evaluate(noise, reference, sets, SETTINGS)
    assert good["FD-digits"].value * 10 < bad["FD-digits"].value
    assert good["precision (digits)"].value > 0.7
    assert bad["precision (digits)"].value < 0.2
    assert good["KID (digits)"].value < bad["KID (digits)"].value
    assert reference.card["preprocessing"] == "crop adm to 16 px"


def test_few_images_are_warned_of(reference):
    with pytest.warns(UserWarning, match="4 images in 5 dimensions"):
        found = evaluate(source(4), dataclasses.replace(reference, features={}), [own()], SETTINGS)
    assert [n.metric for n in found.numbers] == ["FD-own"]


def test_unlike_references_are_refused_before_any_work(reference):
    drawn = []

    def draw(numbers):
        drawn.extend(numbers)
        return pictures(len(numbers), size=16)

    sized = dataclasses.replace(reference, card={**reference.card, "resolution": [12, 12]})
    with pytest.raises(ValueError, match="12 x 12 px images, these are 16 x 16"):
        evaluate(from_samples(draw, 50_000, "model", {}), sized, [own()])
    assert len(drawn) <= 2
    with pytest.raises(ValueError, match="states 'step'; did you mean steps"):
        make_protocol(source(step=3), None)


def test_the_table_shows_numbers_claims_and_protocol(reference, capsys):
    print_evaluation(evaluate(source(), reference, [own()], SETTINGS), {"FD-own": "1.73 (paper)"})
    out = capsys.readouterr().out
    assert "1.73 (paper)" in out
    assert "precision (own)" in out
    assert "sampler: ddim" in out
    assert "guidance: not stated" in out


# --- cards ----------------------------------------------------------------------------------------------------------


def card(value=2.0, hash="a", **changes):
    protocol = Protocol(source="m", n=100, code_version="1", sampler="ddim", guidance="1.4")
    number = Number(
        metric="FID", value=value, features={"hash": "f"}, reference={"hash": hash, "name": "r"}
    )
    return Evaluation(protocol=dataclasses.replace(protocol, **changes), numbers=(number,))


def test_evaluations_survive_json(tmp_path):
    made = card(resolution=(8, 8))
    made.save(tmp_path / "deep" / "e.json")
    assert load_evaluation(tmp_path / "deep" / "e.json") == made
    score = dataclasses.replace(
        made.numbers[0], metric="IS", settings={"std_over_splits": float("nan")}
    )
    Evaluation(protocol=made.protocol, numbers=(score,)).save(tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["numbers"][0]["settings"] == {
        "std_over_splits": None
    }
    for text in (
        "{",
        "[]",
        '{"mezzotint_evaluation": 9}',
        '{"mezzotint_evaluation": 1, "protocol": {"x": 1}, "numbers": []}',
    ):
        (tmp_path / "e.json").write_text(text)
        with pytest.raises(ValueError, match="no evaluation written by mezzotint"):
            load_evaluation(tmp_path / "e.json")
    with pytest.raises(ValueError, match="no number 'FIT'; did you mean FID"):
        _ = made["FIT"]


def test_alike_cards_are_compared():
    found = require_comparable(
        card(2.0), card(3.0, source="other", seeds="100...199", code_version="2")
    )
    assert found.rows == (("FID", 2.0, 3.0),)
    assert set(found.noted) == {"source", "seeds", "code_version"}
    assert "steps" in found.unstated
    renamed = dataclasses.replace(card().numbers[0], reference={"hash": "a", "name": "elsewhere"})
    assert not compare(card(), Evaluation(protocol=card().protocol, numbers=(renamed,))).different


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 50},
        {"sampler": "heun"},
        {"steps": 20},
        {"network_calls": 500},
        {"guidance": None},
        {"ema": "0.9999"},
        {"uint8_rule": "truncate"},
        {"label_law": "50 per class"},
        {"resolution": (8, 8)},
        {"preprocessing": "crop"},
    ],
)
def test_unlike_cards_are_refused_line_by_line(changes):
    (line,) = changes
    with pytest.raises(ValueError, match=rf"(?s)not comparable.*  {line}: .*--anyway"):
        require_comparable(card(), card(**changes))
    assert set(compare(card(), card(**changes)).different) == {line}
    allowed = require_comparable(card(), card(**changes), varying=(line,))
    assert line in allowed.noted


def test_other_references_and_features_are_refused():
    with pytest.raises(ValueError, match=r"FID: reference: a \| b"):
        require_comparable(card(), card(hash="b"))
    other = dataclasses.replace(card().numbers[0], features={"hash": "g"})
    with pytest.raises(ValueError, match="FID: features"):
        require_comparable(card(), Evaluation(protocol=card().protocol, numbers=(other,)))
    nothing = dataclasses.replace(card().numbers[0], metric="sFID")
    with pytest.raises(ValueError, match="no metric in common"):
        require_comparable(card(), Evaluation(protocol=card().protocol, numbers=(nothing,)))
    with pytest.raises(ValueError, match="no line 'guidence' on a card; did you mean guidance"):
        compare(card(), card(), varying=("guidence",))


def test_comparisons_are_printed(capsys):
    a, b = card(2.0), card(3.0, steps=20)
    print_comparison(a, b, compare(a, b))
    out = capsys.readouterr().out
    assert "not comparable: steps: None | 20" in out
    assert "stated by neither" in out


# --- copies ---------------------------------------------------------------------------------------------------------


def test_copies_are_told_from_new_samples():
    rng = np.random.default_rng(0)
    train, heldout, new = rng.normal(size=(3, 300, 8))
    honest = measure_memorization(new, train, heldout, quantile=0.1)
    assert 0.03 < honest.rate < 0.2
    assert 0.4 < honest.closer < 0.6
    half = np.concatenate([new[:150], train[:150] + 1e-3])
    found = measure_memorization(half, train, heldout, quantile=0.1)
    assert 0.5 < found.rate < 0.6
    assert found.closer > 0.7
    assert found.index[150:, 0].tolist() == list(range(150))
    assert (found.distance.diff(dim=1) >= 0).all()
    assert measure_memorization(heldout, train, heldout, quantile=0.1).closer == pytest.approx(0.5)
    with pytest.raises(ValueError, match="give 1000 or more"):
        measure_memorization(new, train, heldout, quantile=0.001)
    with pytest.raises(ValueError, match="between 0 and 1"):
        measure_memorization(new, train, heldout, quantile=0)


def test_the_sheet_puts_a_copy_beside_its_original(tmp_path):
    x = pictures(60)
    sources = {
        "train": x[:30],
        "heldout": x[30:50],
        "samples": torch.cat([x[50:], (x[7:8].int() + 1).clamp(0, 255).to(torch.uint8)]),
    }
    made = {
        name: from_samples(lambda numbers, y=y: y[list(numbers)], len(y), name, {})
        for name, y in sources.items()
    }
    found = evaluate_memorization(
        made["samples"], made["train"], made["heldout"], own(), tmp_path / "s.png", 3, 0.05
    )
    assert found.index[10, 0] == 7
    assert found.distance[10, 0] == found.distance[:, 0].min()
    with Image.open(tmp_path / "s.png") as opened:
        picture = np.asarray(opened)
    assert picture.shape == (3 * 14 + 2, 5 * 14 + 8, 3)
    np.testing.assert_array_equal(picture[2:14, 2:14], sources["samples"][10].permute(1, 2, 0))
    np.testing.assert_array_equal(picture[2:14, 22:34], x[7].permute(1, 2, 0))
    with pytest.raises(ValueError, match="1 samples and 0 rows"):
        neighbour_sheet(x[:1], [], tmp_path / "t.png")
    neighbour_sheet(x[:2, :1], [x[2:4, :1], x[4:6, :1]], tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as opened:
        assert opened.mode == "L"
