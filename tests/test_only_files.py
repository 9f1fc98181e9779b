"""A pipe or a device in place of a file is refused; nothing waits for it or reads on for ever."""

from __future__ import annotations

import os
import shutil
import signal

import numpy as np
import pytest

import mezzotint as mz
from helpers.runs import small
from helpers.tiny_models import tiny
from mezzotint.cli import run_command
from mezzotint.core.files import open_regular
from mezzotint.core.npz_files import load_npy
from mezzotint.train import report
from mezzotint.train.loop import train


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """End a test that waits; an alarm interrupts even the opening of a pipe."""

    def waited(*_):
        raise AssertionError("it waited")

    monkeypatch.chdir(tmp_path)
    old = signal.signal(signal.SIGALRM, waited)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, make_device])
@pytest.mark.parametrize("read", [open_regular, load_npy])
def test_only_regular_files_are_opened(read, make, tmp_path):
    make(tmp_path / "odd")
    with pytest.raises(OSError, match="it is a folder, device, pipe or socket, no file"):
        read(tmp_path / "odd")
    np.save(tmp_path / "a.npy", np.arange(3))
    with open_regular(tmp_path / "a.npy") as file:
        assert np.load(file).tolist() == [0, 1, 2]
    assert load_npy(tmp_path / "a.npy", mmap=True).tolist() == [0, 1, 2]


COMMANDS = [
    ("evaluate images --reference odd.npz --features digits", "odd.npz"),
    ("evaluate images --reference odd.pkl --features digits", "odd.pkl"),
    ("evaluate odd.npz --reference odd.npz --features digits", "odd.npz"),
    ("reference digits out.npz --size 8 --features inception-64 --weights odd.pth", "odd.pth"),
    ("reference odd.npz out.npz --features digits", "odd.npz"),
    ("reference odd.zip out.npz --features digits", "odd.zip"),
    ("compare odd.json odd.json", "odd.json"),
    ("prepare odd.zip out --size 8", "odd.zip"),
    ("prepare odd.tar out --size 8", "odd.tar"),
    ("prepare odd.parquet out --size 8", "odd.parquet"),
    ("prepare odd.npz out --size 8", "odd.npz"),
    ("convert odd.pth out", "odd.pth"),
    ("convert odd.safetensors out", "odd.safetensors"),
    ("sample odd -n 1 --steps 1", "odd"),
    ("sample model -n 1 --steps 1 --prompts odd.txt", "odd.txt"),
    ("sample model -n 1 --steps 1 --guide-model odd --guidance 2", "odd"),
    ("edit img2img model --image odd.png --start-logsnr 0 --out o.png", "odd.png"),
    ("edit inpaint model --image odd.png --mask odd.png --out o.png", "odd.png"),
    ("train unet-tiny --data digits --recipe odd.yaml", "odd.yaml"),
    ("train unet-tiny --data digits --init-from odd model.size=8", "odd"),
    ("train unet-tiny --data odd.zip --dry-run", "odd.zip"),
    ("download odd.yaml", "odd.yaml"),
    ("doctor odd.zip", "odd.zip"),
    ("ema odd --width 0.1", "odd"),
    ("report odd", "odd"),
    ("card odd", "odd"),
    ("card model --evaluation odd.json", "odd.json"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_a_command_refuses_it(command, name, tmp_path):
    os.mkfifo(tmp_path / name)
    if "images" in command:
        (tmp_path / "images").mkdir()
        np.savez(tmp_path / "images" / "a.npz")
    if "model" in command.split():
        mz.save_model(tiny(), tmp_path / "model")
    with pytest.raises((ValueError, OSError), match=name):
        run_command(*command.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 16 images with a snapshot."""
    recipe = small("images=16", "ema.power_stds=[0.1]", "samples.every_images=16")
    return train(recipe, tmp_path_factory.mktemp("trained") / "run", quiet=True)


IN_RUNS = [
    ("recipe.yaml", "report run"),
    ("log.jsonl", "report run"),
    ("environment.json", "report run"),
    ("samples/000000000016.png", "report run"),
    ("model/config.json", "sample run -n 1 --steps 1"),
    ("model/model.safetensors", "sample run -n 1 --steps 1"),
    ("ema/000000000016-0.1.safetensors", "ema run --width 0.1"),
    ("checkpoints/16/manifest.json", "train"),
    ("checkpoints/16/.metadata", "train"),
    ("checkpoints/16/__0_0.distcp", "train"),
    ("data.npy", "train"),
    ("data.json", "train"),
    ("log.jsonl", "train"),
    ("events.jsonl", "train"),
    ("environment.json", "train"),
]


@pytest.mark.parametrize(("name", "command"), IN_RUNS)
def test_a_run_with_a_pipe_ends_or_does_without(name, command, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "zero_output_loss", lambda recipe: {})  # slow, and not at issue
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    try:
        if command == "train":
            train(small("images=16", "ema.power_stds=[0.1]", "samples.every_images=16"), run, True)
        else:
            run_command(*command.split())
    except (ValueError, OSError) as error:
        assert name.rpartition("/")[2] in str(error)  # noqa: PT017
