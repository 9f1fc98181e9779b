"""A start that fails leaves the folder as it was; what a run folder may be; the dry run."""

from __future__ import annotations

import re
import shutil

import pytest

from helpers.runs import assert_same_run, small
from mezzotint import config
from mezzotint.cli import training
from mezzotint.models import open_model
from mezzotint.recipes import recipe_for
from mezzotint.train import checkpoint, loop
from mezzotint.train.dataset import describe_data
from mezzotint.train.loop import train
from mezzotint.train.run_folder import run_lock


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.size=33", "33"),
        ("schedule={name: cosine, options: {noise: 1}}", "noise"),
        ("objective.name=eps_mes", "eps_mse"),
        ("model.prediction=xx", "xx"),
        ("ema.power_stds=[0.5]", r"0\.5.*0\.2887"),
        ("samples.sampler=dmi", r"samples\.sampler=dmi.*ddim"),
        ("evaluate.sampler=dmi", r"evaluate\.sampler=dmi.*ddim"),
        ("samples.sampler=ancestral:variance=learned", r"samples\..*variance"),
    ],
)
def test_a_start_that_fails_writes_no_recipe(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        train(small(wrong), tmp_path, quiet=True)
    assert not (tmp_path / "recipe.yaml").exists()


def test_initial_weights_that_fail_to_load_leave_no_recipe_either(tmp_path):
    def init_weights(model):
        raise ValueError("no such weights")

    with pytest.raises(ValueError, match="no such weights"):
        train(small(), tmp_path, quiet=True, init_weights=init_weights)
    assert not (tmp_path / "recipe.yaml").exists()


def test_another_recipe_is_refused_once_training_has_started(tmp_path):
    """A first step that runs out of memory leaves a recipe and an empty log: not a start yet."""
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(small("batch=512")))
    (tmp_path / "log.jsonl").touch()
    train(small("images=16", "samples.count=0"), tmp_path, quiet=True)
    assert config.from_yaml(tmp_path / "recipe.yaml").batch == 16
    with pytest.raises(ValueError, match=r"batch: 16 .*32"):
        train(small("batch=32"), tmp_path, quiet=True)
    for name in ("checkpoints", "model", "model-raw"):
        shutil.rmtree(tmp_path / name)
    # A log without a checkpoint is a start too.
    with pytest.raises(ValueError, match=r"batch: 16 .*32"):
        train(small("batch=32"), tmp_path, quiet=True)


def test_a_grid_that_fails_is_drawn_at_the_next_start(whole, tmp_path, monkeypatch):
    """The grid at 80 images fails, after the checkpoint due there."""
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


def test_zero_intervals_mean_no_grids_and_one_checkpoint(tmp_path):
    train(small("images=64", "samples.every_images=0", "save.every_images=0"), tmp_path, quiet=True)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["64"]
    assert not (tmp_path / "samples").exists()


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        ValueError,
        match=r"thesis\.tex.*--out",
    ):
        train(small(), tmp_path, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("split", ["", ":train"])
@pytest.mark.parametrize("inside", [".", "runs/first"])
def test_a_run_folder_inside_the_data_is_refused(tmp_path, split, inside):
    with pytest.raises(ValueError, match=r"data folder.*--out"):
        train(small(f"data.source={str(tmp_path) + split!r}"), tmp_path / inside, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["recipe.yaml", ".lock"])
def test_opening_a_run_without_a_model_names_the_train_command(tmp_path, file):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=r"train"):
        open_model(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothere\.yaml"):
        training.train("unet-tiny", recipe=tmp_path / "nothere.yaml")
    with pytest.raises(ValueError, match=r"nothere.*recipe\.yaml"):
        training.report(tmp_path / "nothere")


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        (["data.source=digits"], r"digits holds 1,500 images, 10 classes \(0, 1, 2 \.\.\.\)"),
        (["data.source=shapes:count=50"], "shapes:count=50 holds 50 images"),
        (["data.source=shapes:count=50", "data.buckets=[[32,48]]"], "holds 50 images"),
    ],
)
def test_a_dry_run_describes_the_data(tmp_path, overrides, pattern):
    recipe = config.override(recipe_for("unet-tiny"), overrides)
    start = loop.check(recipe, tmp_path / "run")
    line = describe_data(start.recipe, start.dataset)
    assert re.search(pattern, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        ([], "--data digits"),
        (["data.source=nowhere"], "nowhere"),
        (["data.source=digits", "model.num_classes=4"], "10 classes"),
        (["data.source=digits", "samples.sampler=abc"], r"samples\.sampler=abc"),
        (["data.source=digits", "evaluate.sampler=abc"], r"evaluate\.sampler=abc"),
        (["data.source=digits", "evaluate.sampler=ddim:eta=9"], r"evaluate\.sampler=ddim.*eta 9"),
        (["data.source=digits", "samples.sampler=ddim:eta=9", "samples.count=0"], "eta 9"),
        (["data.source=digits", "schedule.name=abc"], "abc.*cosine"),
        (["data.source=digits", "ema.power_stds=[-1]"], r"EMA width|power_stds"),
        (["data.source=digits", "data.codec=abc"], "abc"),
        (["data.source=digits", "data.portrait=true"], "portrait"),
        (["data.source=digits", "model.width=131072"], "width|memory|device has"),
        (["data.source=digits", "engine.depthwise=triton"], "triton"),
    ],
)
def test_a_dry_run_and_a_start_refuse_in_the_same_words(tmp_path, overrides, pattern):
    """And neither leaves anything behind."""
    command = ("model.size=8", "model.multipliers=[1,1]", "model.blocks=[1,1]",
               "model.attention=[false,false]", *overrides)  # fmt: skip
    sentences = []
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=pattern) as refused:
            training.train("unet-tiny", command, out=tmp_path / "run", dry_run=dry_run)
        sentences.append(str(refused.value))
        if dry_run:
            assert not (tmp_path / "run").exists()
    assert sentences[0] == sentences[1]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_sees_that_another_process_trains_and_that_the_folder_is_no_folder(tmp_path):
    with run_lock(tmp_path / "run"), pytest.raises(ValueError, match="another process is training"):
        loop.check(small(), tmp_path / "run")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        for start in (loop.check, loop.train):
            with pytest.raises(OSError, match=r"cannot be written.*--out"):
                start(small(), folder)
