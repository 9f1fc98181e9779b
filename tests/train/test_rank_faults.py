"""A fault on one rank: all ranks stop, skip or save together, and report its message."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import os, sys
import torch; torch.set_num_threads(1)
from helpers.runs import small
from mezzotint.train import loop
rank, folder, fault = int(os.environ["RANK"]), {folder!r}, {fault!r}
gradient = loop.gradient

def faulty(run, batch):
    if rank == 1 and fault == "raise" and run.state.images == 64:
        raise ValueError("the disk of rank one is on fire")
    losses = gradient(run, batch)
    if rank == 1 and fault == "nan" and run.state.images == 64:
        losses.loss[0] = torch.nan
    return losses

loop.gradient = faulty
loop.train(small("model.dropout=0", *{overrides!r}), folder)
"""


def launch(ranks, folder, fault, *overrides, **options):
    script = SCRIPT.format(folder=str(folder), fault=fault, overrides=overrides)
    path = folder.with_suffix(".py")
    path.write_text(script)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def test_one_rank_raising_ends_all_with_its_message_within_seconds(tmp_path):
    process = launch(2, tmp_path / "run", "raise", "save.every_images=32")
    assert process.stderr is not None
    raised, lines = None, []
    with process:
        for line in process.stderr:
            lines.append(line)
            if raised is None and "the disk of rank one is on fire" in line:
                raised = time.monotonic()
    assert raised is not None, "".join(lines)[-3000:]
    assert time.monotonic() - raised < 30
    assert process.returncode != 0
    assert max(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")) in (32, 64)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_loss_that_is_nan_on_one_rank_stops_both_before_the_update(tmp_path, strategy):
    """The bundle holds the images of both ranks; one process repeats their step."""
    from mezzotint.train.replay import replay

    process = launch(
        2, tmp_path / "run", "nan", "save.every_images=64", f"engine.strategy={strategy}"
    )
    _, printed = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "1 of 16 losses are not finite: image 72 " in printed, printed[-3000:]
    facts = json.loads((tmp_path / "run" / "bundles" / "64" / "bundle.json").read_text())
    assert facts["ranks"] == 2
    assert facts["image_numbers"] == list(range(64, 80))
    assert all(isinstance(layer["grad_norm"], float) for layer in facts["layers"].values())
    again = replay(tmp_path / "run" / "bundles" / "64", device=torch.device("cpu"))
    assert not again.fails
    finite = [i for i, v in enumerate(again.recorded) if v == v]
    assert len(finite) == 15
    torch.testing.assert_close(
        [again.loss[i] for i in finite], [again.recorded[i] for i in finite], rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_both_skip_together(tmp_path):
    process = launch(
        2, tmp_path / "run", "nan", "nonfinite.on_nonfinite=skip", "save.every_images=64"
    )
    _, printed = process.communicate(timeout=200)
    assert process.returncode == 0, printed[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1]
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["skip"]


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_once_and_resumes(tmp_path):
    """torchrun passes the signal to every rank; all stop after the same step."""
    whole = launch(2, tmp_path / "whole", "", "images=1600")
    process = launch(2, tmp_path / "run", "", "images=1600")
    assert process.stderr is not None
    for line in process.stderr:
        if "64/1,600 images" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=200)
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")]
    assert 64 <= max(saved) < 1600
    again = launch(2, tmp_path / "run", "", "images=1600")
    for ended in (again, whole):
        _, printed = ended.communicate(timeout=200)
        assert ended.returncode == 0, printed[-3000:]
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_launcher_and_all_ranks_saves_once_and_resumes(tmp_path, number):
    """As a terminal sends Ctrl-C; torchrun then sends a signal to every rank a second time."""
    process = launch(2, tmp_path / "run", "", "images=16000", start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "64/16,000 images" in line:
            os.killpg(process.pid, number)
            break
    _, printed = process.communicate(timeout=200)
    assert "stopped at" in printed, printed[-3000:]
    saved = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert 64 <= saved < 16000
    again = launch(2, tmp_path / "run", "", f"images={saved + 64}")
    _, printed = again.communicate(timeout=200)
    assert again.returncode == 0, printed[-3000:]
    assert f"resuming at {saved:,} images" in printed
