"""Optimisers: which parameters each takes, training and bitwise resume, the learning rate."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import assert_same_run, records, small
from mezzotint import config
from mezzotint.backbones import Backbone
from mezzotint.config import Optim
from mezzotint.models import create_model
from mezzotint.recipes import recipe_for
from mezzotint.train.loop import train
from mezzotint.train.optim import group_by_decay, learning_rate, make_optimisers

VIT = [
    "data.source=digits", "model.size=8", "model.channels=1", "model.multipliers=[1,2,4]",
    "batch=16", "images=1152", "log_every_images=192", "samples.every_images=576",
    "samples.count=10", "samples.steps=2", "save.every_images=576", "save.keep=9",
    "engine.precision=float32", "optim.warmup_images=0", "optim.name=muon", "optim.lr=2e-3",
    "time.sampling=stratified",
]  # fmt: skip


def test_muon_takes_only_hidden_matrices():
    net = create_model("dimr-tiny", size=16).backbone
    muon, adamw = make_optimisers(Optim(name="muon", weight_decay=0.1), net, fused=True)
    name = {id(p): n for n, p in net.named_parameters()}
    hidden = {name[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {name[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert hidden
    assert not hidden & rest
    assert hidden | rest == {n for n, p in net.named_parameters() if p.requires_grad}
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    spared = net.no_decay_parameters()
    assert spared
    assert spared <= rest
    for group in adamw.param_groups:
        if group["weight_decay"]:
            assert not spared & {name[id(p)] for p in group["params"]}


@pytest.mark.parametrize("preset", ["dimr-tiny", "diffit-latent-tiny", "diffit-tiny"])
def test_muon_leaves_positions_classes_and_bias_tables_to_adamw(preset):
    net = create_model(preset, size=16).backbone
    muon, _ = make_optimisers(Optim(name="muon"), net, fused=True)
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    tables = [n for n, p in net.named_parameters() if id(p) in taken and not n.endswith(".weight")]
    assert not tables
    assert taken <= {id(m.weight) for m in net.modules() if isinstance(m, torch.nn.Linear)}


def test_groups_hold_every_trained_parameter_once():
    net = create_model("dimr-tiny", size=16).backbone
    grouped = [id(p) for group in group_by_decay(net, 0.1) for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in net.parameters())


def test_a_network_without_hidden_matrices_refuses_muon():
    net = Backbone(None)
    net.conv = torch.nn.Conv2d(1, 1, 3)
    with pytest.raises(ValueError, match="use adamw"):
        make_optimisers(Optim(name="muon"), net, fused=True)


def test_muon_trains_and_resumes_bitwise(tmp_path):
    """The loss falls; a run in two parts equals the run in one, moments included."""
    recipe = config.override(recipe_for("uvit-tiny"), VIT)
    whole = train(recipe, tmp_path / "whole", quiet=True)
    loss = [r["loss"] for r in records(whole)]
    assert loss[-1] < 0.8 * loss[0]
    part = config.override(recipe, ["images=576"])
    train(part, tmp_path / "parts", quiet=True)
    train(recipe, tmp_path / "parts", quiet=True)
    assert_same_run(whole, tmp_path / "parts")
    plain = train(
        config.override(recipe, ["optim.name=adamw", "images=192"]), tmp_path / "adamw", quiet=True
    )
    assert records(plain)[0]["loss"] != loss[0]


@pytest.mark.parametrize("name", ["adamw", "radam"])
def test_weight_decay_is_apart_from_the_gradient(name):
    """Without a gradient every decayed weight shrinks by rate times decay, and no other does."""
    net = create_model("dimr-tiny", size=16).backbone
    optim = Optim(name=name, lr=0.1, weight_decay=0.5)
    (optimiser,) = make_optimisers(optim, net, fused=True)
    assert type(optimiser).__name__.lower() == name
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for n, p in net.named_parameters():
        kept = 1.0 if n in net.no_decay_parameters() or not p.requires_grad else 0.95
        torch.testing.assert_close(p.detach(), kept * before[n], rtol=1e-5, atol=1e-8)


def test_the_rate_is_a_function_of_images_seen():
    optim = Optim(lr=1.0, warmup_images=100, decay="cosine")
    assert learning_rate(optim, 0, 1000) == 0
    assert learning_rate(optim, 50, 1000) == pytest.approx(0.5, rel=0.01)
    assert learning_rate(optim, 500, 1000) == pytest.approx(0.5)
    assert learning_rate(optim, 1000, 1000) == pytest.approx(0, abs=1e-12)
    assert learning_rate(Optim(lr=2.0), 10**9, 1000) == 2.0


def test_weight_decay_and_clipping_change_the_run(tmp_path):
    """A bound far above the gradient norm is the same as none."""

    def last_loss(*overrides):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train(small("images=48", "samples.count=0", *overrides), folder, quiet=True)
        return records(folder)[-1]["loss"]

    unclipped = last_loss("optim.clip=null")
    assert last_loss("optim.clip=1e9") == unclipped
    assert last_loss("optim.clip=1e-4") != unclipped
    assert last_loss("optim.clip=null", "optim.weight_decay=1") != unclipped
