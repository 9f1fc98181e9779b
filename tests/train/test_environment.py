"""environment.json: an entry for each start of a run."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mezzotint
from helpers.runs import small
from mezzotint.train import environment
from mezzotint.train.loop import train
from mezzotint.train.report import environment_rows


def test_each_start_adds_an_entry(tmp_path):
    train(small("images=48"), tmp_path, quiet=True)
    train(small("images=64"), tmp_path, quiet=True)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["images"], second["images"]) == (0, 48)
    assert second["versions"]["torch"] == importlib.metadata.version("torch")
    assert second["versions"]["mezzotint"] == mezzotint.__version__
    assert list(second["devices"].values()) == [1]
    assert second["cores"] >= 1
    assert Path(sys.argv[0]).name in second["command"]
    rows = dict(environment_rows(tmp_path))
    assert "2 times so far" in rows["started"]
    assert rows["images seen at the start"] == "48"
    assert "torch 2." in rows["versions"]
    assert rows["platform"] == second["platform"]


def test_a_damaged_or_missing_file_has_no_entries(tmp_path):
    for text in ("", '[{"images": 1', '{"images": 1}', "[3]"):
        (tmp_path / "environment.json").write_text(text)
        assert environment.read(tmp_path / "environment.json") == []
    assert environment.read(tmp_path / "none.json") == []


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    package, installed = tmp_path / "src" / "package", tmp_path / "venv"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    git("init", "-q")
    git("add", "src")
    git("commit", "-qm", "first")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert environment.find_commit(package) == head
    (package / "__init__.py").write_text("x = 1\n")
    assert environment.find_commit(package) == f"{head}-dirty"
    assert (
        environment.find_commit(installed) != head
    )  # it lies inside the checkout without being part of it


def test_the_home_folder_is_abbreviated(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [
        "/usr/bin/python",
        "-m",
        "mezzotint",
        "train",
        "unet-tiny",
        "--data",
        f"{tmp_path}/my pictures",
    ]
    monkeypatch.setattr(environment.sys, "orig_argv", words)
    command = environment.command_line()
    assert f"'{tmp_path}/my pictures'" in command  # as it can be run again
    assert (
        environment.hide_home(command)
        == "python -m mezzotint train unet-tiny --data '~/my pictures'"
    )


@pytest.mark.parametrize(
    ("home", "command", "shown"),
    [
        ("/", "mezzotint train --data /data/a", "mezzotint train --data /data/a"),
        ("/home/ann", "--data /home/anna/a --out /home/ann", "--data /home/anna/a --out ~"),
        ("/home/ann", "out=/home/ann/x /mnt/home/ann/y", "out=~/x /mnt/home/ann/y"),
    ],
)
def test_only_the_home_folder_is_abbreviated(home, command, shown, monkeypatch):
    monkeypatch.setenv("HOME", home)
    assert environment.hide_home(command) == shown
