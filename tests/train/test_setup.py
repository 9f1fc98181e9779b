"""A start that fails costs nothing: neither the run's folder, nor what lies in it, nor what training reached."""

from __future__ import annotations

import re
import shutil

import pytest

from helpers.runs import assert_same_run, small
from mezzotint import config
from mezzotint.cli import training
from mezzotint.models import open_model
from mezzotint.train import checkpoint, loop
from mezzotint.train.loop import train
from mezzotint.train.dataset import describe_data

EMPTY = "samples.count=0"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("model.size=33", "33"),
        ("schedule={name: cosine, options: {noise: 1}}", "noise"),
        ("objective.name=eps_mes", "eps_mse"),
        ("model.prediction=xx", "xx"),
        ("ema.power_stds=[0.5]", r"EMA width 0\.5 is outside"),
        ("samples.sampler=dmi", r"samples\.sampler=dmi: unknown sampler 'dmi'.*ddim"),
        ("evaluate.sampler=dmi", r"evaluate\.sampler=dmi: unknown sampler 'dmi'.*ddim"),
        ("samples.sampler=ancestral:variance=learned", r"samples\..*variance"),
    ],
)
def test_a_start_that_fails_leaves_the_folder_to_the_corrected_command(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        train(small(wrong), tmp_path, quiet=True)
    assert not (tmp_path / "recipe.yaml").exists()


def test_weights_that_cannot_be_started_from_leave_it_too(tmp_path):
    def initialise(model):
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        train(small(), tmp_path, quiet=True, init_weights=initialise)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_recipe_without_a_run_gives_way_and_a_run_does_not(tmp_path):
    """As a first step leaves it that runs out of memory; then once with a checkpoint and once with a log alone."""
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(small("batch=512")))
    (tmp_path / "log.jsonl").touch()
    train(small("images=16", EMPTY), tmp_path, quiet=True)
    assert config.from_yaml(tmp_path / "recipe.yaml").batch == 16
    with pytest.raises(
        ValueError, match=r"belongs to another recipe(.|\n)*batch: 16 there, 32 asked"
    ):
        train(small("batch=32"), tmp_path, quiet=True)
    for name in ("checkpoints", "model", "model-raw"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(ValueError, match="belongs to another recipe"):
        train(small("batch=32"), tmp_path, quiet=True)


def test_a_grid_that_fails_costs_no_training_and_is_drawn_at_the_next_start(
    whole, tmp_path, monkeypatch
):
    """The grid at 80 images fails where a checkpoint is due as well."""
    every = "save.every_images=80"

    def fails(*args):
        raise RuntimeError("no memory for the grid")

    monkeypatch.setattr(loop, "save_sample_grid", fails)
    with pytest.raises(RuntimeError, match="no memory for the grid"):
        train(small(every), tmp_path, quiet=True)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["80"]
    assert not (tmp_path / "samples").exists()
    train(small(every), tmp_path, quiet=True)
    assert_same_run(whole, tmp_path)


def test_no_grids_and_one_checkpoint_where_none_are_asked_for(tmp_path):
    train(small("images=64", "samples.every_images=0", "save.every_images=0"), tmp_path, quiet=True)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["64"]
    assert not (tmp_path / "samples").exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        ValueError,
        match=r"thesis\.tex.*--out",
    ):
        train(small(), tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("split", ["", ":train"])
@pytest.mark.parametrize("inside", [".", "runs/first"])
def test_a_run_has_no_place_in_its_data(tmp_path, split, inside):
    with pytest.raises(ValueError, match=r"data folder.*--out"):
        train(small(f"data.source={str(tmp_path) + split!r}"), tmp_path / inside, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["recipe.yaml", ".lock"])
def test_a_run_without_a_model_says_how_it_gets_one(tmp_path, left):
    (tmp_path / left).touch()
    with pytest.raises(
        ValueError, match="is a run that has saved no model yet; the same train command goes on"
    ):
        open_model(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe can be read at .*nothere\.yaml"):
        training.train("unet-tiny", recipe=tmp_path / "nothere.yaml")
    with pytest.raises(ValueError, match=r"nothere has no recipe\.yaml; give a run folder"):
        training.report(tmp_path / "nothere")


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        (
            "unet-tiny",
            ["data.source=digits"],
            r"digits holds 1,500 images, 10 classes \(0, 1, 2 \.\.\.\)",
        ),
        ("unet-tiny", ["data.source=shapes:count=50"], "shapes:count=50 holds 50 images"),
        ("unet-tiny", [], "none given; add --data"),
        ("unet-tiny", ["data.source=nowhere"], "cannot be trained on: no data at 'nowhere'"),
        (
            "unet-tiny",
            ["data.source=my/photos"],
            "my/photos.*hub",
        ),
        (
            "unet-tiny",
            ["data.source=digits", "model.num_classes=4"],
            "cannot be trained on: digits has 10 classes",
        ),
        (
            "diffit-256",
            ["data.source=digits"],
            r"10 classes.*sd-vae-ft-ema.*mezzotint prepare digits",
        ),
        (
            "unet-tiny",
            ["data.source=shapes:count=50", "data.buckets=[[32,48]]"],
            "holds 50 images",
        ),
    ],
)
def test_a_dry_run_looks_at_the_data(preset, overrides, words):
    from mezzotint.recipes import recipe_for

    found = describe_data(config.override(recipe_for(preset), overrides))
    assert re.search(words, found), found
