"""Evaluation during training on two processes: shared work, the numbers of one, common failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.evaluators import digits_reference, evaluated_recipe, random_evaluator
from helpers.runs import events, records
from mezzotint.train.loop import train

SCRIPT = """
import dataclasses, os
import torch; torch.set_num_threads(1)
from helpers.evaluators import evaluated_recipe, random_evaluator
from mezzotint.evaluate import during_training
from mezzotint.train.loop import train
rank, fails = int(os.environ["RANK"]), {fails!r}
from_job = during_training.from_job

def printing_job(job, num_images):
    source, images = from_job(job, num_images), job.model.info.images
    def batches(start, stop):
        # One write, since the ranks share a pipe and print makes several.
        os.write(1, f"rank {{rank}}: {{start}} to {{stop}} at {{images}}\\n".encode())
        if rank == 1 and fails and images == 64:
            raise ValueError("no memory on rank one")
        yield from source.batches(start, stop)
    return dataclasses.replace(source, batches=batches)

during_training.from_job = printing_job
recipe = evaluated_recipe({reference!r}, *{overrides!r})
train(recipe, {folder!r}, evaluator=random_evaluator(recipe))
"""
SHORT = ("model.dropout=0", "images=128")


def train_on_two_ranks(tmp_path: Path, reference: str, *overrides: str, fails: bool = False) -> str:
    """Run the evaluated recipe and return its standard output."""
    script, folder = tmp_path / "run.py", str(tmp_path / "run")
    overrides = (*SHORT, *overrides)
    script.write_text(
        SCRIPT.format(folder=folder, reference=reference, fails=fails, overrides=overrides)
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, *launch, str(script)],
        capture_output=True, text=True, timeout=200, env=environment, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """Return the metrics in the log, by images seen."""
    return {r["images"]: r["evaluation"] for r in records(folder) if "evaluation" in r}


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_share_the_work_and_get_the_numbers_of_one(tmp_path, strategy):
    """Weights trained on two ranks differ by rounding, so one rank evaluates the same weights."""
    reference, folder = digits_reference(tmp_path / "digits.npz"), tmp_path / "run"
    printed = train_on_two_ranks(tmp_path, reference, f"engine.strategy={strategy}")
    assert "rank 0: 0 to 32 at 64" in printed
    assert "rank 1: 32 to 50 at 64" in printed
    assert "rank 1: 32 to 50 at 128" in printed
    of_two = logged(folder)
    assert list(of_two) == [64, 128]
    # Without the log and the file, resuming the finished run repeats the last evaluation.
    (folder / "log.jsonl").unlink()
    (folder / "evaluations" / "128.json").unlink()
    recipe = evaluated_recipe(reference, *SHORT, f"engine.strategy={strategy}")
    train(recipe, folder, quiet=True, evaluator=random_evaluator(recipe))
    assert logged(folder)[128] == pytest.approx(of_two[128], rel=1e-9, abs=1e-12)


def test_a_failure_on_one_rank_ends_the_evaluation_on_both(tmp_path):
    folder = tmp_path / "run"
    train_on_two_ranks(tmp_path, digits_reference(tmp_path / "digits.npz"), fails=True)
    (event,) = events(folder)
    assert (event["images"], event["event"]) == (64, "evaluation failed")
    assert "rank 1" in event["why"]
    assert "no memory on rank one" in event["why"]
    # Training went on to the next evaluation.
    assert list(logged(folder)) == [128]
    assert sorted(p.name for p in (folder / "evaluations").iterdir()) == ["128.json"]
