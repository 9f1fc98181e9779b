"""A paper's whole protocol on a tiny random model, and evaluation by command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re

import pytest
import torch

import mezzotint as mz
from helpers.coco import write_coco
from helpers.text_model import save_text_model
from helpers.tiny_t5 import saved_t5
from mezzotint.backbones import presets
from mezzotint.cli import evaluation, sampling
from mezzotint.evaluate import features
from mezzotint.evaluate.features import from_module
from mezzotint.evaluate.results import load_evaluation, require_comparable
from mezzotint.sampling import protocols
from mezzotint.sampling.coco import draw_coco_captions
from mezzotint.tools.reproduce import PUBLISHED, reproduce


@pytest.fixture
def model(tmp_path):
    """Random weights, final layer included."""
    torch.manual_seed(0)
    net = mz.create_model("unet-tiny", size=8, channels=1, num_classes=4, width=8, emb_dim=16)
    for p in net.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    mz.save_model(net, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "digits.npz"
    evaluation.reference("digits:test", path, features=("digits",), size=8, channels=1)
    return str(path)


def test_whole_protocol_on_a_tiny_model(model, reference, tmp_path, capsys):
    result = reproduce(
        "uvit-256",
        model=str(model),
        reference=reference,
        num_images=80,
        steps=2,
        features=("digits",),
        out=tmp_path / "out",
    )
    assert result is not None
    assert result.protocol.num_images == 80
    assert result.protocol.steps == 2
    assert result.protocol.network_calls == 2
    assert result["FD-digits"].value > 0
    assert load_evaluation(tmp_path / "out" / "evaluation.json") == result
    assert "FID 2.77" in capsys.readouterr().out


def test_zero_shot_on_coco_with_a_tiny_model(tmp_path, monkeypatch):
    """Its prompts are the captions that the protocol draws from the annotations."""
    t5, annotations = saved_t5(tmp_path / "t5", seed=0), write_coco(tmp_path / "coco")
    save_text_model(tmp_path / "model", t5, str(t5))
    few = dataclasses.replace(protocols.PROTOCOLS["coco-fid-30k"], coco_captions=12)
    monkeypatch.setitem(protocols.PROTOCOLS, "coco-fid-30k", few)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    random = from_module(network, name="random", dims=3, size=8)
    monkeypatch.setattr(features, "open_features", lambda *_: [random])
    monkeypatch.setattr("mezzotint.tools.reproduce.open_features", lambda *_: [random])
    evaluation.reference(str(tmp_path / "coco" / "val2014"), tmp_path / "coco.npz", size=16)
    given = {"model": str(tmp_path / "model"), "reference": str(tmp_path / "coco.npz")}
    with pytest.raises(ValueError, match="needs --prompts"):
        reproduce("uvit-text-256", **given, out=tmp_path / "out")
    result = reproduce(
        "uvit-text-256", **given, prompts=str(annotations), num_images=12, steps=2,
        out=tmp_path / "out",
    )  # fmt: skip
    assert result is not None
    assert result["FD-random"].value > 0
    drawn = draw_coco_captions(annotations, 12)
    digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]
    assert result.protocol.prompts == f"12 in turn, SHA-256 {digest}"


def test_the_cost_is_of_the_steps_given(tmp_path, capsys):
    reproduce("diffit-256", dry_run=True, steps=10, out=tmp_path / "none")
    calls = int(re.search(r"images x (\d+) network calls", capsys.readouterr().out)[1])
    assert 10 <= calls <= 20


def test_dry_run_prints_the_cost_and_runs_nothing(tmp_path, capsys):
    assert reproduce("dimr-xl-2r-256", dry_run=True, out=tmp_path / "none") is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "50,000 images x 500 network calls x 160.2 GMAC" in printed
    assert not (tmp_path / "none").exists()


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="--model"):
        reproduce("diffit-256", out=tmp_path)
    with pytest.raises(ValueError, match="diffit-256"):
        reproduce("diffit-25", out=tmp_path)


def test_every_published_result_is_of_a_preset():
    assert set(PUBLISHED) <= set(presets())


def test_published_metrics_are_named_as_in_evaluations():
    assert {m for p in PUBLISHED.values() for m in p.numbers} == {"FID", "sFID", "IS"}


def test_a_model_and_its_samples_get_the_same_number(model, reference, tmp_path):
    out = tmp_path / "of_model.json"
    evaluation.evaluate(
        str(model),
        reference=reference,
        features=("digits",),
        num_images=80,
        steps=2,
        out=out,
    )
    options = sampling.SamplingOptions(steps=2)
    sampling.sample(str(model), out=tmp_path / "samples.npz", num_images=80, sampling=options)
    evaluation.evaluate(
        str(tmp_path / "samples.npz"),
        reference=reference,
        features=("digits",),
        channels=1,
        out=tmp_path / "of_file.json",
    )
    of_model, of_file = load_evaluation(out), load_evaluation(tmp_path / "of_file.json")
    assert of_model["FD-digits"].value == pytest.approx(of_file["FD-digits"].value, rel=1e-9)
    # samples.npz.json, next to the file, records how the images were made.
    assert require_comparable(of_model, of_file).unknown == ()
    evaluation.compare(out, tmp_path / "of_file.json")
    (tmp_path / "samples.npz.json").unlink()
    evaluation.evaluate(
        str(tmp_path / "samples.npz"),
        reference=reference,
        features=("digits",),
        channels=1,
        out=tmp_path / "bare.json",
    )
    with pytest.raises(ValueError, match="comparable"):
        evaluation.compare(out, tmp_path / "bare.json")
    evaluation.compare(out, tmp_path / "bare.json", anyway=True)
