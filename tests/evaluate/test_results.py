"""Results: saved and loaded unchanged, compared only if they were made in the same way."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from mezzotint.evaluate.results import (
    Evaluation,
    Number,
    Protocol,
    compare,
    keep_other_numbers,
    load_evaluation,
    print_comparison,
    require_comparable,
)


def make_evaluation(value=2.0, reference_hash="a", **changes):
    protocol = Protocol(
        source="m", num_images=100, code_version="1", sampler="ddim", guidance="1.4"
    )
    number = Number(
        metric="FID",
        value=value,
        features={"hash": "f"},
        reference={"hash": reference_hash, "name": "r"},
    )
    return Evaluation(protocol=dataclasses.replace(protocol, **changes), numbers=(number,))


def with_number(**changes):
    """Return `make_evaluation()` with another number."""
    evaluation = make_evaluation()
    number = dataclasses.replace(evaluation.numbers[0], **changes)
    return dataclasses.replace(evaluation, numbers=(number,))


def test_a_saved_evaluation_loads_unchanged(tmp_path):
    evaluation = make_evaluation(resolution=(8, 8))
    evaluation.save(tmp_path / "deep" / "e.json")
    assert load_evaluation(tmp_path / "deep" / "e.json") == evaluation


def test_nan_is_saved_as_null(tmp_path):
    settings = {"std_over_splits": float("nan")}
    with_number(metric="IS", value=float("nan"), settings=settings).save(tmp_path / "e.json")
    (number,) = json.loads((tmp_path / "e.json").read_text())["numbers"]
    assert number["value"] is None
    assert number["settings"] == {"std_over_splits": None}
    assert np.isnan(load_evaluation(tmp_path / "e.json")["IS"].value)


def write(path, evaluation):
    keep_other_numbers(path, evaluation.to_json())
    evaluation.save(path)


@pytest.mark.parametrize(
    "other",
    [
        make_evaluation(guidance="2"),
        make_evaluation(source="another"),
        make_evaluation(ema="none, the raw weights"),
        make_evaluation(training_images=64),
        make_evaluation(reference_hash="b"),
        with_number(metric="sFID"),
        with_number(settings={"k": 5}),
    ],
)
def test_numbers_of_other_settings_are_kept(other, tmp_path, capsys):
    path = tmp_path / "e.json"
    write(path, make_evaluation(value=2.0))
    path.with_suffix(".copies.png").write_bytes(b"sheet")
    path.with_suffix(".png").write_bytes(b"mine")
    write(path, make_evaluation(value=3.0))
    assert not capsys.readouterr().out
    write(path, other)
    assert "e.json held numbers of other settings" in " ".join(capsys.readouterr().out.split())
    write(path, make_evaluation(value=4.0))
    found = {file.name: load_evaluation(file) for file in tmp_path.glob("*.json")}
    assert found == {
        "e.json": make_evaluation(value=4.0),
        "e-1.json": make_evaluation(value=3.0),
        "e-2.json": other,
    }
    assert (tmp_path / "e-1.copies.png").read_bytes() == b"sheet"
    assert (tmp_path / "e.png").read_bytes() == b"mine"


def test_an_empty_file_is_replaced(tmp_path):
    path = tmp_path / "e.json"
    path.touch()
    write(path, make_evaluation())
    assert [file.name for file in tmp_path.iterdir()] == ["e.json"]


def test_what_was_measured_is_no_setting():
    a, b = (
        with_number(metric="IS", settings={"split_size": 50, "std_over_splits": spread})
        for spread in (0.1, 0.2)
    )
    assert not compare(a, b).conflicts
    c = with_number(metric="IS", settings={"split_size": 60, "std_over_splits": 0.1})
    assert list(compare(a, c).conflicts) == ["IS: settings"]


def test_models_trained_for_other_lengths_are_comparable_and_raw_weights_are_not():
    a, b = (make_evaluation(ema="the saved average", training_images=n) for n in (64, 128))
    assert compare(a, b).differences == {"training_images": (64, 128)}
    raw = make_evaluation(ema="none, the raw weights", training_images=64)
    assert list(compare(a, raw).conflicts) == ["ema"]


def test_held_out_sets_must_agree():
    a, b = (
        with_number(metric="FDr (FID)", reference={"hash": "r", "heldout_hash": heldout})
        for heldout in "xy"
    )
    assert list(compare(a, b).conflicts) == ["FDr (FID): reference"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"mezzotint_evaluation": 9}',
        '{"mezzotint_evaluation": 1, "protocol": {"x": 1}, "numbers": []}',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(ValueError, match=r"e\.json is not an evaluation"):
        load_evaluation(tmp_path / "e.json")


def test_an_unknown_metric_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"'FIT'.*FID"):
        _ = make_evaluation()["FIT"]


def test_sources_seeds_and_versions_may_differ():
    other = make_evaluation(
        3.0, source="other", seeds="100...199", code_version="2", dtype="bfloat16"
    )
    comparison = require_comparable(make_evaluation(2.0), other)
    assert comparison.rows == (("FID", 2.0, 3.0),)
    assert set(comparison.differences) == {"source", "seeds", "code_version", "dtype"}
    assert "steps" in comparison.unknown


def test_a_copied_reference_is_the_same_reference():
    copied = with_number(reference={"hash": "a", "name": "elsewhere"})
    assert not compare(make_evaluation(), copied).conflicts


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 50},
        {"sampler": "heun"},
        {"steps": 20},
        {"network_calls": 500},
        {"guidance": None},
        {"ema": "0.9999"},
        {"uint8_rule": "truncate"},
        {"label_order": "50 per class"},
        {"resolution": (8, 8)},
        {"preprocessing": "crop"},
    ],
)
def test_every_other_field_must_agree(change):
    (name,) = change
    other = make_evaluation(**change)
    with pytest.raises(ValueError, match=rf"  {name}: "):
        require_comparable(make_evaluation(), other)
    assert set(compare(make_evaluation(), other).conflicts) == {name}
    allowed = require_comparable(make_evaluation(), other, varying=(name,))
    assert name in allowed.differences


def test_references_and_features_must_agree():
    with pytest.raises(ValueError, match=r"FID: reference: a \| b"):
        require_comparable(make_evaluation(), make_evaluation(reference_hash="b"))
    with pytest.raises(ValueError, match="FID: features"):
        require_comparable(make_evaluation(), with_number(features={"hash": "g"}))
    with pytest.raises(ValueError, match="no metric in common"):
        require_comparable(make_evaluation(), with_number(metric="sFID"))
    with pytest.raises(ValueError, match=r"'guidence'.*guidance"):
        compare(make_evaluation(), make_evaluation(), varying=("guidence",))


def test_a_printed_comparison_names_conflicts_and_unknown_fields(capsys):
    a, b = make_evaluation(2.0), make_evaluation(3.0, steps=20)
    print_comparison(a, b, compare(a, b))
    printed = capsys.readouterr().out
    assert "steps: None | 20" in printed
    assert "label_order" in printed
