"""A run keeps its stream of random numbers, and resumes bitwise with either."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from helpers.runs import assert_same_run, records, small
from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.train import draws, loop
from mezzotint.train.loop import train

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """An uninterrupted run that draws from philox4x32."""
    folder = tmp_path_factory.mktemp("streams") / "run"
    return train(small("stream=philox4x32"), folder, quiet=True)


def stop_at(folder, images: int, recipe: Recipe, monkeypatch) -> None:
    """Train until a signal comes at so many images."""
    stop = loop.StopSignal()
    real = loop.update_averages

    def update(run):
        real(run)
        stop.requested = run.state.images >= images

    monkeypatch.setattr(loop, "StopSignal", lambda: stop)
    monkeypatch.setattr(loop, "update_averages", update)
    with pytest.raises(SystemExit):
        train(recipe, folder, quiet=True)
    monkeypatch.undo()


def test_the_streams_differ(whole, counted):
    assert config.from_yaml(counted / "recipe.yaml").stream == "philox4x32"
    a, b = ([r["loss"] for r in records(folder)] for folder in (whole, counted))
    assert a[0] != b[0]


def test_a_run_of_the_counter_resumes_bitwise_and_keeps_its_stream(counted, tmp_path, monkeypatch):
    """Also where "auto" would choose the other one for a new run, as on the CPU here."""
    assert draws.draws_of(small(), CPU).stream == "philox4x64"
    stop_at(tmp_path / "run", 64, small("stream=philox4x32"), monkeypatch)
    train(small(), tmp_path / "run", quiet=True)
    assert_same_run(counted, tmp_path / "run")


def test_a_run_begun_before_there_were_two_streams_keeps_the_first(whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stop_at(folder, 64, small(), monkeypatch)
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert recipe.pop("stream") == "philox4x64"
    path.write_text(yaml.safe_dump(recipe))
    assert draws.draws_of(small(), GPU).stream == "philox4x32"  # of a new run
    assert draws.resolve_stream(small(), folder, GPU) == "philox4x64"
    assert draws.resolve_stream(small(), tmp_path / "new", GPU) == "philox4x32"
    train(small(), folder, quiet=True)
    assert_same_run(whole, folder)


def test_another_stream_does_not_resume_a_run(counted, tmp_path):
    folder = shutil.copytree(counted, tmp_path / "run")
    with pytest.raises(ValueError, match="stream: philox4x32 there, philox4x64 asked"):
        train(small("stream=philox4x64"), folder, quiet=True)
    with pytest.raises(ValueError, match="philox4x32"):
        small("stream=philox")
