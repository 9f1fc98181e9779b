"""`mezzotint doctor` on sound and unsound data, disks and process groups."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint import config
from mezzotint.core.registry import build
from mezzotint.data.image_dataset import open_images
from mezzotint.process import schedules
from mezzotint.recipes import recipe_for
from mezzotint.tools import doctor


@pytest.fixture
def folder(tmp_path):
    """30 pictures of 80 x 70 in two classes, 24 against 1, with a duplicate, a torn duplicate and damage."""
    rng = np.random.default_rng(0)
    for name, count in (("many", 24), ("few", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.fromarray(rng.integers(0, 255, (70, 80, 3), dtype=np.uint8))
            picture.save(tmp_path / "set" / name / f"{i:02d}.png")
    many = tmp_path / "set" / "many"
    (many / "copy.png").write_bytes((many / "00.png").read_bytes())
    (tmp_path / "set" / "few" / "torn.png").write_bytes((many / "01.png").read_bytes())
    (many / "broken.png").write_bytes((many / "02.png").read_bytes()[:100])
    return tmp_path / "set"


def test_data_is_looked_at_whole(folder):
    found = doctor.examine_data(str(folder), None, 3, seconds=30)
    json.dumps(found)
    assert found["size"] == 64  # the largest usual side that 70 reaches
    assert found["logsnr_shift"] == 0
    assert found["examined"] == found["total"] == 28
    assert found["audit"]["classes"] == {"few": 2, "many": 26}
    said = " ".join(found["concerns"])
    assert "unreadable" in said
    assert "2 duplicates in 2 groups" in said
    assert "different labels" in said
    assert "uneven" in said
    assert all(speed > 0 for speed in found["images_per_second"].values())


def test_shift_and_its_override(folder):
    found = doctor.examine_data(str(folder), 256, 3, seconds=30)
    assert found["logsnr_shift"] == pytest.approx(2 * math.log(64 / 256))
    assert "smaller than the size asked for" in " ".join(found["concerns"])

    spec = config.override(recipe_for("dimr-tiny"), found["overrides"]).schedule
    middle = build(schedules.registry, spec)(torch.tensor([0.5], dtype=torch.float64))
    assert middle.item() == pytest.approx(found["logsnr_shift"], abs=1e-6)


def test_an_audit_out_of_time_still_counts_all_labels(folder, monkeypatch):
    monkeypatch.setattr(doctor, "BLOCK", 4)
    summary = doctor.audit_for(open_images(str(folder), size=32, keep_in_memory=False), seconds=0.0)
    assert summary["images"] + len(summary["unreadable"]) == 4
    assert summary["classes"] == {"few": 2, "many": 26}


def test_processes_find_each_other():
    found = doctor.smoke(timeout=200)
    assert found["passed"], found["error"]
    assert found["processes"] >= 2


def test_processes_that_do_not_answer_are_a_concern():
    found = doctor.smoke(timeout=0.01)
    assert not found["passed"]
    assert "no answer within" in found["error"]


def test_disk_speed_and_a_disk_that_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_BYTES", 4 << 20)
    found = doctor.disk(tmp_path / "not" / "yet")
    assert found["free"] > 0
    assert found["write"] > 0
    assert not list(tmp_path.iterdir())

    def refuse(*args, **kwargs):
        raise OSError("read-only file system")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert "read-only" in doctor.disk(tmp_path)["error"]


SOUND = {
    "environment": {
        "python": "3.12", "torch": "2.13", "processor": "a", "cores": 8, "threads": 8, "load": [0.1, 0, 0],
        "memory_bytes": 2**34, "gpus": [], "packages": {"gradio": "6", "wandb": None},
    },
    "matmul": {"float32": 2e11, "bf16": 1e12},
    "distributed": {"backend": "gloo", "processes": 2, "passed": True, "error": "", "seconds": 3.0},
    "disk": {"folder": "runs", "free": 1e12, "write": 1e9, "read": 2e9},
    "data": None,
}  # fmt: skip


def test_nothing_to_say_is_said():
    assert doctor._machine_concerns(SOUND) == []
    assert doctor.render({**SOUND, "concerns": []}).endswith("no concerns")


@pytest.mark.parametrize(
    ("part", "change", "word"),
    [
        ("environment", {"load": [7.9, 0, 0]}, "OMP_NUM_THREADS"),
        ("environment", {"gpus": [{"name": "g", "bytes": 8e10, "free": 1e10}]}, "GiB are free"),
        ("matmul", {"bf16": 1e9}, "engine.precision=float32"),
        ("distributed", {"passed": False, "error": "refused"}, "refused"),
        ("disk", {"free": 1e9}, "free for checkpoints"),
        ("disk", {"write": 1e6}, "stall"),
        ("disk", {"error": "read-only"}, "read-only"),
    ],
)
def test_each_concern(part, change, word):
    found = {**SOUND, part: {**SOUND[part], **change}}
    said = doctor._machine_concerns(found)
    assert len(said) == 1
    assert word in said[0]
    assert f"! {said[0]}" in doctor.render({**found, "concerns": said})


def test_a_data_set_that_is_not_there():
    with pytest.raises(ValueError, match="nowhere"):
        doctor.examine_data("nowhere/at/all", 64, 3, seconds=1)
