"""Making a model of the box from a run."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import yaml

from helpers.runs import small
from mezzotint.convert import box
from mezzotint.convert.box import box_model
from mezzotint.convert.model_card import save_sample_grid
from mezzotint.core import boxed
from mezzotint.evaluate.results import Evaluation, Number, Protocol
from mezzotint.models import load_model
from mezzotint.train.loop import train

DATA = "digits (Alpaydin, Kaynak 1998), CC BY 4.0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = small("images=32", "samples.count=0", "save.every_images=0")
    return train(recipe, tmp_path_factory.mktemp("box") / "run", quiet=True)


@pytest.fixture(autouse=True)
def _short_sampling(monkeypatch):
    monkeypatch.setattr(box, "save_sample_grid", partial(save_sample_grid, count=4, steps=2))


def evaluation(path):
    number = Number(metric="FD", value=12.345, features={"name": "inception-64"})
    protocol = Protocol(source="somewhere/run", num_images=5000, code_version="1")
    Evaluation(protocol=protocol, numbers=(number,)).save(path)
    return path


def test_weights_facts_and_card(run, tmp_path, monkeypatch):
    files = (evaluation(tmp_path / "evaluation.json"),)
    folder = box_model(
        run, "digits-8", data=DATA, licence="cc-by-4.0", evaluation=files, box=tmp_path
    )
    assert folder == tmp_path / "digits-8"
    ours, trained = load_model(folder), load_model(run / "model")
    for name, weight in trained.backbone.state_dict().items():
        assert torch.equal(ours.backbone.state_dict()[name], weight.bfloat16().float())
    assert ours.info.config == trained.info.config
    assert ours.info.labels == trained.info.labels
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-4.0"
    for part in (DATA.split(",")[0], "12.345", 'mz.load_model("digits-8")', "## Training"):
        assert part in card
    assert str(tmp_path) not in card
    monkeypatch.setattr(boxed, "BOX", tmp_path)
    assert boxed.boxed_models() == ["digits-8"]
    row = boxed.read_boxed("digits-8")
    assert row["distance"] == "FD 12.35 of 5,000 samples"
    assert (row["data"], row["licence"], row["images"]) == (DATA, "cc-by-4.0", 32)
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_a_model_is_replaced_and_one_that_is_not_evaluated_says_so(run, tmp_path):
    for licence in ("mit", "cc-by-4.0"):
        folder = box_model(run, "x", data=DATA, licence=licence, box=tmp_path)
        values = json.loads((folder / "config.json").read_text())
        assert values["licence"] == licence
        assert values["extra"]["box"]["distance"] == "not evaluated"


def test_a_large_model_is_refused_and_leaves_the_old_one(run, tmp_path, monkeypatch):
    folder = box_model(run, "x", data=DATA, licence="mit", box=tmp_path)
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr(box, "MOST_BYTES", 10_000)
    with pytest.raises(ValueError, match="take a smaller network"):
        box_model(run, "x", data="other", licence="mit", box=tmp_path)
    assert (folder / "config.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
