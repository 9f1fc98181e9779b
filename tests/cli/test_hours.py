"""`mezzotint train ... --hours`: choice, resume, and what is refused before anything is written."""

from __future__ import annotations

import sys

import pytest

from helpers.image_files import png, write_folder
from helpers.runs import assert_same_run
from mezzotint import cli, config
from mezzotint.core.distributed import World
from mezzotint.tools import budget_facts
from mezzotint.tools.budget import Speed
from mezzotint.train import loop

# A network that trains on a hundred images of 16 px in a second.
FIELDS = [
    "model.size=16", "model.width=8", "model.emb_dim=16", "model.multipliers=[1,1]",
    "model.blocks=[1,1]", "model.attention=[false,true]", "model.heads=1", "batch=2",
    "samples.count=2", "samples.steps=2", "engine.precision=float32",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    names = [f"{name}/{i}.png" for name in ("daisy", "rose") for i in range(6)]
    return write_folder(
        tmp_path / "photos", {name: png(i, (20, 16)) for i, name in enumerate(names)}
    )


@pytest.fixture
def speed(monkeypatch):
    """Say how fast a network is, and count how often it is asked; None fails when asked."""
    asked = []

    def use(seconds):
        def measure(recipe):
            assert seconds is not None, "a resumed run is not measured"
            asked.append(recipe.preset)
            return Speed(seconds)

        monkeypatch.setattr(budget_facts, "make_speed_meter", lambda world: measure)
        return asked

    use(0.2)
    return use


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["mezzotint", *map(str, args)])
    cli.main()


def refused(monkeypatch, capsys, *args):
    """Return the sentence that the command prints before it ends."""
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *args)
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("mezzotint: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_auto_trains_a_folder_and_a_resumed_run_keeps_its_length(
    photos, speed, tmp_path, monkeypatch, capsys
):
    """The run stops at its first sample grid; the same command goes on as if it never had."""
    command = ("train", "auto", *FIELDS, "--data", photos, "--hours", "0.003", "--out")
    run(monkeypatch, *command, tmp_path / "whole")
    printed = capsys.readouterr().out
    assert "12 images, 2 classes" in printed
    assert "network  unet-tiny" in printed
    assert "! 12 images are too few" in printed
    recipe = config.from_yaml(tmp_path / "whole" / "recipe.yaml")
    assert (recipe.preset, recipe.hours, recipe.model["num_classes"]) == ("unet-tiny", 0.003, 2)
    assert recipe.images == 48  # 10.8 s, nine tenths of them, at 0.2 s an image
    assert recipe.optim.decay == "cosine"

    with monkeypatch.context() as broken:
        broken.setattr(loop, "draw_grid", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run(broken, *command, tmp_path / "cut", "save.every_images=8", "samples.every_images=24")
    speed(None)
    capsys.readouterr()
    run(monkeypatch, *command, tmp_path / "cut", "save.every_images=8", "samples.every_images=48")
    assert "goes on: unet-tiny, 48 images, as --hours 0.003 chose" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "cut")

    out = (*command[:-2], "0.006", "--out", tmp_path / "cut")
    out = tuple("0.006" if a == "0.003" else a for a in command)
    assert "began with --hours 0.003 and goes on to its 48 images" in refused(
        monkeypatch, capsys, *out, tmp_path / "cut"
    )


def fail(*_):
    raise RuntimeError("power cut")
