"""The prepared call for a GPU: its parts and limits, its rows, the batch it chooses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks are not part of the source distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
try:
    import gpu
    import gpu_rows
    import latents
finally:
    sys.path.remove(str(BENCHMARKS))

from mezzotint.data.latent_dataset import LatentDataset  # noqa: E402

GIB = 2**30


def test_the_parts_of_the_script_are_those_of_the_benchmark_and_fit_into_eight_minutes():
    script = (BENCHMARKS / "gpu.sh").read_text()
    called = re.findall(r"^part (\w+) (\d+)$", script, re.MULTILINE)
    assert [name for name, _ in called] == [
        "first", "compiled", "second", "loop", "others", "checks", "twins",
    ]  # fmt: skip
    assert {name for name, _ in called} == set(gpu.parts(Path()))
    assert int(re.search(r"LIMIT:-(\d+)", script)[1]) == 480
    # The first three, which decide everything, are never cut short by the whole's limit.
    assert sum(int(seconds) for _, seconds in called[:3]) < 300
    assert sum(int(seconds) for _, seconds in called) <= 480 + 60


def test_the_text_of_the_call_is_short_enough():
    assert len((BENCHMARKS / "gpu-call.md").read_text()) < 2000


def test_a_row_is_on_the_disk_before_the_next_is_measured(tmp_path):
    path = tmp_path / "out" / "gpu.jsonl"
    gpu_rows.RowFile(path, "first").write({"seconds": 1.5})
    assert gpu_rows.read_rows(path) == [{"part": "first", "seconds": 1.5}]
    gpu_rows.RowFile(path, "second").write({"seconds": 2.5})
    with path.open("a") as file:
        file.write('{"part": "second", "sec')  # killed here
    assert [row["part"] for row in gpu_rows.read_rows(path)] == ["first", "second"]


def test_the_batch_fits_the_card():
    """An H200, an H100 and a card in use."""
    chosen = [gpu_rows.batch_that_fits("dimr-xl-2r-256", 128, n * GIB) for n in (139, 78, 40, 1)]
    assert chosen == [128, 64, 32, 1]
    assert gpu_rows.batch_that_fits("dimr-latent-tiny", 4, GIB) == 4
    assert gpu_rows.free_bytes("cpu") == float("inf")


def test_a_step_that_does_not_fit_after_all_is_repeated_at_half_the_batch():
    def measure(batch):
        if batch > 16:
            raise torch.OutOfMemoryError("too large")
        return {"seconds": batch / 8}

    assert gpu_rows.halving(64, measure) == {"batch": 16, "seconds": 2.0}
    with pytest.raises(torch.OutOfMemoryError):
        gpu_rows.halving(64, lambda batch: measure(99))


def test_what_needs_more_time_than_is_left_is_not_begun_and_an_error_is_a_row():
    def fail():
        raise RuntimeError("no such kernel")

    tasks = [({"a": 1}, 5.0, lambda: {"b": 2}), ({"a": 2}, 500.0, fail), ({"a": 3}, 0.0, fail)]
    rows = list(gpu_rows.in_time(gpu_rows.Clock(60.0), tasks, "cpu"))
    assert (rows[0]["a"], rows[0]["b"]) == (1, 2)
    assert rows[1]["error"].startswith("not begun: ")
    assert rows[2]["error"] == "RuntimeError: no such kernel"


def test_a_part_of_the_rehearsal_writes_its_rows(tmp_path, monkeypatch):
    """The cascade, eager; the whole rehearsal is DEVICE=cpu SMALL=1 bash benchmarks/gpu.sh."""
    arguments = ["second", "--device", "cpu", "--small", "--seconds", "14", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    parts = {"second": [("cascade", gpu.gpu_kernels.cascade, 14)]}
    monkeypatch.setattr(gpu, "parts", lambda out: parts)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit):
            gpu.main()
    finally:
        torch.set_num_threads(threads)
    machine, eager, compiled = gpu_rows.read_rows(tmp_path / "gpu.jsonl")
    assert (machine["process"], machine["torch"]) == ("second", torch.__version__)
    assert eager["form"] == "eager"
    assert eager["seconds"] > 0
    assert compiled["error"].startswith("not begun")


def test_random_latents_are_a_dataset(tmp_path):
    latents.write_random_latents(
        tmp_path / "set", 6, size=8, channels=4, classes=3, codec="sd-vae-ft-ema"
    )
    opened = LatentDataset(tmp_path / "set")
    moments, labels = opened.batch([0, 4])
    assert moments.shape == (2, 2, 2, 4, 8, 8)
    assert labels.tolist() == [0, 1]
    assert json.loads((tmp_path / "set" / "latents.json").read_text())["count"] == 6
