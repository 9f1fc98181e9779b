"""`mezzotint doctor` on good and bad data, disks and process groups."""

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
    """28 files of 80 x 70 in two classes: two duplicates, one with another label, one broken."""
    rng = np.random.default_rng(0)
    for name, count in (("many", 24), ("few", 1)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 255, (70, 80, 3), dtype=np.uint8))
            image.save(tmp_path / "set" / name / f"{i:02d}.png")
    many = tmp_path / "set" / "many"
    (many / "copy.png").write_bytes((many / "00.png").read_bytes())
    (tmp_path / "set" / "few" / "other_class.png").write_bytes((many / "01.png").read_bytes())
    (many / "broken.png").write_bytes((many / "02.png").read_bytes()[:100])
    return tmp_path / "set"


def test_audit_of_all_data(folder):
    result = doctor.examine_data(str(folder), None, 3, seconds=30)
    json.dumps(result)
    assert result["size"] == 64  # the largest usual side that 70 reaches
    assert result["logsnr_shift"] == 0
    assert result["examined"] == result["total"] == 28
    assert result["audit"]["classes"] == {"few": 2, "many": 26}
    assert list(result["audit"]["unreadable"]) == ["many/broken.png"]
    assert len(result["audit"]["duplicates"]) == 2
    assert len(result["audit"]["duplicates_with_other_labels"]) == 1
    assert len(result["concerns"]) >= 4  # these three, and 26 images against 2
    assert all(speed > 0 for speed in result["images_per_second"].values())


def test_schedule_shift_and_its_override(folder):
    result = doctor.examine_data(str(folder), 256, 3, seconds=30)
    assert result["logsnr_shift"] == pytest.approx(2 * math.log(64 / 256))
    assert result["audit"]["upscaled"] == 27

    spec = config.override(recipe_for("dimr-tiny"), result["overrides"]).schedule
    middle = build(schedules.registry, spec)(torch.tensor([0.5], dtype=torch.float64))
    assert middle.item() == pytest.approx(result["logsnr_shift"], abs=1e-6)


def test_audit_that_runs_out_of_time_counts_all_labels(folder, monkeypatch):
    monkeypatch.setattr(doctor, "BLOCK", 4)
    summary = doctor.audit_within(
        open_images(str(folder), size=32, keep_in_memory=False), seconds=0.0
    )
    assert summary["images"] + len(summary["unreadable"]) == 4
    assert summary["classes"] == {"few": 2, "many": 26}


def test_disk_speed_and_a_read_only_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_BYTES", 4 << 20)
    result = doctor.measure_disk(tmp_path / "not" / "yet")
    assert result["free"] > 0
    assert result["write"] > 0
    assert not list(tmp_path.iterdir())

    def refuse(*args, **kwargs):
        raise OSError("read-only file system")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert "read-only" in doctor.measure_disk(tmp_path)["error"]


HEALTHY = {
    "environment": {
        "python": "3.12",
        "torch": "2.13",
        "processor": "a",
        "cores": 8,
        "threads": 8,
        "load": [0.1, 0, 0],
        "memory_bytes": 2**34,
        "gpus": [],
        "packages": {"gradio": "6", "wandb": None},
    },
    "matmul": {"float32": 2e11, "bf16": 1e12},
    "distributed": {"backend": "gloo", "processes": 2, "passed": True, "error": "", "seconds": 3.0},
    "disk": {"folder": "runs", "free": 1e12, "write": 1e9, "read": 2e9},
    "data": None,
}


def test_healthy_machine_has_no_concerns():
    assert doctor._machine_concerns(HEALTHY) == []
    assert doctor.render_diagnosis({**HEALTHY, "concerns": []}).endswith("no concerns")


@pytest.mark.parametrize(
    ("part", "change", "value"),
    [
        ("environment", {"load": [7.9, 0, 0]}, "OMP_NUM_THREADS"),
        ("environment", {"gpus": [{"name": "g", "bytes": 8e10, "free": 1e10}]}, "9.3 of 74.5 GiB"),
        ("matmul", {"bf16": 1e9}, "engine.precision=float32"),
        ("distributed", {"passed": False, "error": "refused"}, "refused"),
        ("disk", {"free": 1e9}, "1.0 GB"),
        ("disk", {"write": 1e6}, "1 MB/s"),
        ("disk", {"error": "read-only"}, "read-only"),
    ],
)
def test_each_concern(part, change, value):
    result = {**HEALTHY, part: {**HEALTHY[part], **change}}
    (concern,) = doctor._machine_concerns(result)
    assert value in concern
    assert f"! {concern}" in doctor.render_diagnosis({**result, "concerns": [concern]})


def test_missing_dataset():
    with pytest.raises(ValueError, match="nowhere"):
        doctor.examine_data("nowhere/at/all", 64, 3, seconds=1)
