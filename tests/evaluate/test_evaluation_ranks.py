"""Evaluation along the way on two processes: both work, the number is that of one, and a failure ends it on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.evaluators import judge, judged, reference
from mezzotint.train.loop import train

SCRIPT = """
import os, sys
import torch; torch.set_num_threads(1)
from helpers.evaluators import judge, judged
from mezzotint.evaluate import during_training
from mezzotint.train.loop import train
rank, fails = int(os.environ["RANK"]), {fails!r}
draw = judging.samples_of

def samples(job, n, first=0):
    source = draw(job, n, first)
    def batches(start, stop):
        line = f"rank {{rank}} makes {{start}} to {{stop}} at {{job.model.info.images}}\\n"
        os.write(1, line.encode())  # one write: print makes several, and two ranks share the pipe
        if rank == 1 and fails and job.model.info.images == 64:
            raise ValueError("rank one has no memory")
        yield from source.batches(start, stop)
    return judging.dataclasses.replace(source, batches=batches)

judging.samples_of = samples
recipe = judged({real!r}, *{overrides!r})
train(recipe, {folder!r}, judge=judge(recipe))
"""
SMOOTH = ("model.dropout=0", "images=128")


def two(tmp_path: Path, real: str, fails: bool, *overrides: str) -> tuple[str, str]:
    """The judged run on two processes; what they said on stdout and stderr."""
    folder = tmp_path / "run"
    script = tmp_path / "run.py"
    words = {
        "tests": str(Path(__file__).parents[1]),
        "folder": str(folder),
        "real": real,
        "fails": fails,
    }
    script.write_text(SCRIPT.format(**words, overrides=(*SMOOTH, *overrides)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def values(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["images"]: line["evaluation"] for line in lines if "evaluation" in line}


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_both_work_and_give_the_number_of_one(tmp_path, strategy):
    """The weights of two ranks differ from those of one by rounding, so the same weights are judged by one again."""
    real = reference(tmp_path / "digits.npz")
    said, _ = two(tmp_path, real, False, f"engine.strategy={strategy}")
    for line in (
        "rank 0 makes 0 to 32 at 64",
        "rank 1 makes 32 to 50 at 64",
        "rank 1 makes 32 to 50 at 128",
    ):
        assert line in said
    folder = tmp_path / "run"
    found = values(folder)
    assert list(found) == [64, 128]
    (folder / "log.jsonl").unlink()
    (folder / "evaluations" / "128.json").unlink()
    recipe = judged(real, *SMOOTH, f"engine.strategy={strategy}")
    train(
        recipe, folder, quiet=True, judge=judge(recipe)
    )  # resumes at the end and owes the evaluation
    assert values(folder)[128] == pytest.approx(found[128], rel=1e-9, abs=1e-12)


def test_one_rank_failing_ends_the_evaluation_on_both_and_training_goes_on(tmp_path):
    real = reference(tmp_path / "digits.npz")
    _, words = two(tmp_path, real, True)
    assert "evaluation failed at 64 images" in words
    (event,) = [
        json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    ]
    assert event["event"] == "evaluation failed"
    assert "rank 1: ValueError: rank one has no memory" in event["why"]
    assert list(values(tmp_path / "run")) == [128]
    assert sorted(p.name for p in (tmp_path / "run" / "evaluations").iterdir()) == ["128.json"]
