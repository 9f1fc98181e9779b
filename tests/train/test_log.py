"""The log: gradient norms, speed, memory; trackers get every line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from helpers.runs import SMALL, small
from mezzotint.core.distributed import World, init_distributed
from mezzotint.models import create_model, meta_model
from mezzotint.train import log, parallel, trackers
from mezzotint.train.loop import train
from mezzotint.train.setup import count_training_flop, setup

CPU = World(rank=0, size=1, device=torch.device("cpu"))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_gradient_norms_by_part_add_up(tmp_path):
    train(small("images=32", "log_every_images=16"), tmp_path, quiet=True)
    for line in lines(tmp_path):
        parts = line["grad_norm_by_part"]
        assert len(parts) > 2
        assert line["grad_norm"] == pytest.approx(math.sqrt(sum(n**2 for n in parts.values())))


def test_group_norms_equal_torchs():
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3, 4, generator=draw) for _ in range(3))
    found = parallel.group_norms([[a, b], [c], []], CPU)
    expected = torch.stack([torch.cat([a, b]).norm(), c.norm(), torch.zeros(())]).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_speed_and_memory_are_logged(tmp_path):
    train(small("images=32", "log_every_images=16", "engine.peak_tflops=0.5"), tmp_path, quiet=True)
    flop = count_training_flop(
        meta_model(setup(small(), tmp_path / "other", init_distributed()).info), "eps_mse"
    )
    for line in lines(tmp_path):
        assert line["tflops"] == pytest.approx(line["images_per_second"] * flop / 1e12, rel=2e-3)
        assert line["utilisation"] == pytest.approx(line["tflops"] / 0.5, rel=2e-3)
        assert 0.1 < line["peak_memory_gib"] < 20


def test_flop_of_a_step_is_three_forward_passes_and_one_more_for_a_target():
    """`mezzotint info` counts 1e9 multiply-accumulates of one forward pass."""
    from mezzotint.tools.summary import read_summary

    card = create_model("unet-tiny").info
    forward = 2 * read_summary("unet-tiny")["gmac"] * 1e9
    for objective, passes in [("eps_mse", 3), ("consistency", 4)]:
        flop = count_training_flop(meta_model(card), objective)
        assert flop == pytest.approx(passes * forward, rel=1e-6)


def test_utilisation_is_of_all_ranks():
    two = World(rank=0, size=2, device=torch.device("cpu"))
    assert log.measure_speed(100, 1.0, 1e10, 1.0, two)["utilisation"] == pytest.approx(0.5)
    assert "utilisation" not in log.measure_speed(100, 1.0, 1e10, None, two)


def test_tensorboard_gets_every_line_across_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small("images=64", "trackers=[tensorboard]"), tmp_path, quiet=True)
    train(small("images=128", "trackers=[tensorboard]"), tmp_path, quiet=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [32, 64, 96, 128]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(
        [r["loss"] for r in lines(tmp_path)]
    )
    assert {t.split("/")[0] for t in events.Tags()["scalars"]} >= {
        "grad_norm_by_part",
        "loss_by_logsnr",
        "tflops",
    }


def test_wandb_stays_on_this_disk_without_a_key(tmp_path, monkeypatch):
    """A fake client records its calls: wandb is not installed here."""
    calls = []

    class Session:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    def init(**settings):
        calls.append(settings)
        return Session()

    package = types.ModuleType("wandb")
    package.init = init
    package.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", package)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    train(small("images=32", "trackers=[wandb]"), tmp_path / "run", quiet=True)
    settings, (step, values), end = calls
    assert settings["mode"] == "offline"
    assert settings["resume"] == "allow"
    assert settings["config"]["preset"] == "unet-tiny"
    assert step == 32
    assert values["loss"] == lines(tmp_path / "run")[0]["loss"]
    assert end == "finished"


@pytest.mark.slow
def test_trackio_keeps_every_line_on_this_machine(tmp_path):
    words = [*SMALL, "images=64", "trackers=[trackio]"]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        "-m",
        "mezzotint",
        "train",
        "unet-tiny",
        *words,
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (store,) = (tmp_path / "trackio").glob("mezzotint*.db")
    import sqlite3

    connection = sqlite3.connect(store)
    rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    connection.close()
    assert [step for step, _ in rows] == [32, 64]
    assert json.loads(rows[0][1])["loss"] == pytest.approx(lines(tmp_path / "run")[0]["loss"])


def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackers=trackio .*pip install mezzotint\[track\]"):
        train(small("trackers=[trackio]"), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match=r"pip install wandb"):
        train(small("trackers=[wandb]"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        ValueError, match=r"trackers\[0\] is 'tensorbord'; allowed: tensorboard, wandb, trackio"
    ):
        small("trackers=[tensorbord]")


def test_two_folders_of_one_name_are_two_runs(tmp_path):
    names = [trackers.folder_id(tmp_path / place / "run") for place in ("a", "b")]
    assert names[0] != names[1]
    assert all(name.startswith("run-") for name in names)
    assert Path(names[0]).name == names[0]
