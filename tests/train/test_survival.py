"""Runs survive kills, full disks, damaged files and jumping clocks, and resume bitwise."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.evaluators import digits_reference, random_evaluator
from helpers.runs import assert_same_run, small
from mezzotint import config
from mezzotint.recipes import recipe_for
from mezzotint.train import checkpoint, log, loop, run_folder
from mezzotint.train.loop import train


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The writer waits for the loop's next step; if training waited too, both would hang."""
    stepped, overtaken = threading.Event(), []
    manifest, averages = checkpoint.write_manifest, loop.update_averages

    def slow_manifest(folder, **facts):
        overtaken.append(stepped.wait(timeout=30))
        manifest(folder, **facts)

    def update(run):
        averages(run)
        if run.state.images == 64:  # one step after the first checkpoint, at 48
            stepped.set()

    monkeypatch.setattr(checkpoint, "write_manifest", slow_manifest)
    monkeypatch.setattr(loop, "update_averages", update)
    train(small("images=96"), tmp_path, quiet=True)
    assert overtaken == [True, True]
    assert checkpoint.find_damage(tmp_path / "checkpoints" / "48") is None


def test_a_failed_write_stops_training_at_the_next_step(tmp_path, monkeypatch):
    reached, stepped = [], threading.Event()
    averages = loop.update_averages

    def update(run):
        averages(run)
        if run.state.images == 64:
            stepped.set()
            run.writer._pending.exception()  # waits until it has failed
        reached.append(run.state.images)

    def full(*args, **kwargs):
        stepped.wait(timeout=30)  # a write that fails at once stops the step in progress
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    monkeypatch.setattr(loop, "update_averages", update)
    with pytest.raises(OSError, match=r"48 images.*No space left"):
        train(small(), tmp_path, quiet=True)
    assert reached == [16, 32, 48, 64]
    assert not list((tmp_path / "checkpoints").iterdir())


@contextlib.contextmanager
def disk(folder: Path, size: str):
    """A file system of `size` at `folder`; without the right to mount, a limit of 60 kB per file.

    Yields: whether it was mounted.
    """
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True
    )
    if mounted.returncode == 0:
        try:
            yield True
        finally:
            subprocess.run(["umount", folder], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        yield False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoints_that_fit(whole, tmp_path):
    """The disk has room for the checkpoint at 48 images only; a file limit leaves none at all."""
    room = sum(
        p.stat().st_size for p in whole.rglob("*") if p.is_file() and "/checkpoints/48/" in str(p)
    )
    room += sum(p.stat().st_size for p in (whole / "model").iterdir())
    with disk(tmp_path / "disk", f"{int(1.7 * room / 1024)}k") as mounted:
        with pytest.raises(OSError, match=r"^[^\n]*(No space left|File too large)[^\n]*$"):
            train(small("save.keep=10"), tmp_path / "disk" / "run", quiet=True)
        intact, messages = checkpoint.find_newest_intact(tmp_path / "disk" / "run")
        assert messages == []
        shutil.copytree(tmp_path / "disk" / "run", tmp_path / "run", dirs_exist_ok=True)
    assert (intact.name if intact else None) == ("48" if mounted else None)
    train(small(), tmp_path / "run", quiet=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_named_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"file/run cannot be written.*--out"):
        train(small(), tmp_path / "file" / "run", quiet=True)


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    with run_folder.run_lock(tmp_path), pytest.raises(ValueError, match="another process"):
        train(small(), tmp_path, quiet=True)
    assert not (tmp_path / "recipe.yaml").exists()
    train(small("images=16"), tmp_path, quiet=True)


def test_a_machine_that_had_another_rank_may_become_that_of_rank_0(tmp_path):
    """With checkpoints on a store it keeps an empty folder, or one of a restore that was killed."""
    for name in (".480.partial", "480"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        run_folder.check_run_folder(tmp_path, "")
    (tmp_path / "checkpoints" / "best.ckpt").touch()
    with pytest.raises(ValueError, match="is no run folder and holds checkpoints"):
        run_folder.check_run_folder(tmp_path, "")


def test_a_run_that_torchrun_restarts_waits_for_the_process_before_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    lock = run_folder.run_lock(tmp_path)
    lock.__enter__()
    threading.Timer(0.3, lock.__exit__, (None, None, None)).start()
    with run_folder.run_lock(tmp_path):
        pass
    monkeypatch.setattr(run_folder, "RESTART_SECONDS", 0.3)
    with run_folder.run_lock(tmp_path), pytest.raises(ValueError, match="another process"):
        train(small(), tmp_path, quiet=True)


def test_a_checkpoints_folder_that_cannot_be_written_is_named(tmp_path):
    """A file is in its place: root may write to any folder, so a read-only one would not do."""
    (tmp_path / "recipe.yaml").write_text(config.to_yaml(small()))
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="48 images"):
        train(small(), tmp_path, quiet=True)
    assert (tmp_path / "checkpoints").read_text() == "in the way"


def test_half_written_folders_are_removed_or_passed_over(whole, stopped):
    """A checkpoint not yet renamed, one without its manifest, and a model not yet in place."""
    folder = stopped(96)
    checkpoints = folder / "checkpoints"
    (checkpoints / "96").rename(checkpoints / ".96.partial")
    (checkpoints / "144").mkdir()
    (checkpoints / "144" / "__0_0.distcp").write_bytes(b"half")
    (folder / ".model.partial").mkdir()
    # Killed while a file of a half-written folder was written.
    (folder / ".model.partial" / ".model.safetensors.partial").touch()
    intact, messages = checkpoint.find_newest_intact(folder)
    assert intact == checkpoints / "48"
    assert len(messages) == 1
    assert "144" in messages[0]
    assert "manifest.json is missing" in messages[0]
    train(small(), folder, quiet=True)
    assert not list(folder.rglob(".*.partial"))
    assert_same_run(whole, folder)


def test_a_log_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = ['{"images": 16, "loss": 1}', '{"images": 32, "loss": 2}', '{"images": 48, "loss": 3}']
    for text in ("\n".join(lines), "\n".join(lines)[:-1], "\n".join(lines)[:-9]):
        path.write_text(text)
        log.Log(path, 32).write({"images": 48, "loss": 4})
        assert [r["loss"] for r in log.read(path)] == [1, 2, 4]


def test_a_clock_that_jumps_does_not_change_the_run(whole, tmp_path, monkeypatch):
    """Forwards by a year, backwards by a day and more, or stopped."""
    jumps = iter([0, 3e7, -9e4, 0, 0, -1e9] * 200)
    now = [time.monotonic()]

    def jumping():
        now[0] += next(jumps)
        return now[0]

    for name in ("loop",):
        monkeypatch.setattr(f"mezzotint.train.{name}.time.monotonic", jumping)
    train(small(), tmp_path / "run")
    monkeypatch.undo()
    assert_same_run(whole, tmp_path / "run")
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        speed = json.loads(line)["images_per_second"]
        assert 0 <= speed < math.inf


def test_a_run_stopped_by_a_killed_worker_resumes_with_fewer(whole, stopped, monkeypatch):
    folder = stopped(48)
    averages = loop.update_averages

    def update(run):
        averages(run)
        if run.state.images == 80:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()

    monkeypatch.setattr(loop, "update_averages", update)
    with pytest.raises(ChildProcessError, match=r"a data worker process died.*same command"):
        train(small("data.workers=1"), folder, quiet=True)
    monkeypatch.undo()
    assert checkpoint.list_checkpoints(folder)[-1].name == "48"
    train(small(), folder, quiet=True)
    assert_same_run(whole, folder)


SCRIPT = """
import sys
import torch; torch.set_num_threads(1)
from helpers.evaluators import random_evaluator
from helpers.runs import small
from mezzotint.train.loop import train
recipe = small(*{overrides!r})
train(recipe, {folder!r}, evaluator=random_evaluator(recipe))
print("finished", file=sys.stderr, flush=True)
"""
LONG = (
    "images=3200", "save.every_images=32", "save.keep=3", "log_every_images=16",
    "samples.every_images=800", "ema.power_stds=[0.05]", "ema.snapshot_every_images=320",
    "data.workers=0",
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker_behind(tmp_path):
    import psutil

    overrides = ("images=100000", "data.workers=2")
    script = SCRIPT.format(overrides=overrides, folder=str(tmp_path / "run"))
    with subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        next(iter(process.stderr))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """kill -9 and -TERM in turn, from start-up to writing; then the rest of the run."""
    torch.set_num_threads(1)
    judged = (
        "evaluate.every_images=400",
        "evaluate.num_images=50",
        "evaluate.steps=2",
        "evaluate.batch=16",
    )
    overrides = (*LONG, *judged, f"evaluate.reference={digits_reference(tmp_path / 'digits.npz')}")
    recipe = small(*overrides)
    whole = train(recipe, tmp_path / "whole", quiet=True, evaluator=random_evaluator(recipe))
    folder, choose = tmp_path / "run", random.Random(0)
    script = SCRIPT.format(overrides=overrides, folder=str(folder))
    reached, codes = [], []
    for i in range(20):
        number = signal.SIGKILL if i % 2 else signal.SIGTERM
        process = subprocess.Popen(
            [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        lines = 0 if i % 7 == 6 else choose.randrange(1, 9)  # sometimes while it is still starting
        for line in process.stderr:
            assert line != "finished\n", "the run is too short for twenty kills"
            lines -= "/3,200 images" in line
            if lines <= 0:
                break
        time.sleep(choose.uniform(0, 0.3))
        process.send_signal(number)
        process.communicate()
        codes.append(process.returncode)
        reached.append(max([int(p.name) for p in checkpoint.list_checkpoints(folder)], default=0))
    assert set(codes[1::2]) == {-signal.SIGKILL}
    # SIGTERM before training listens ends the process as it always does.
    assert set(codes[::2]) <= {0, -signal.SIGTERM}
    assert codes.count(0) >= 5
    assert len(set(reached)) >= 10, reached
    assert reached[-1] < 3200
    train(recipe, folder, quiet=True, evaluator=random_evaluator(recipe))
    assert_same_run(whole, folder)  # the log with its evaluations too
    cards = [sorted((run / "evaluations").iterdir()) for run in (whole, folder)]
    assert [[c.name for c in of_run] for of_run in cards] == [
        sorted(f"{n}.json" for n in range(400, 3201, 400))
    ] * 2
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*cards, strict=True))
    snapshots = sorted(p.name for p in (whole / "ema").iterdir())
    assert snapshots == sorted(p.name for p in (folder / "ema").iterdir())
    for name in snapshots:
        a, b = load_file(whole / "ema" / name), load_file(folder / "ema" / name)
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("objective", ["eps_mse", "consistency"])
def test_a_loss_of_the_finest_branch_alone_resumes(tmp_path, objective):
    """The heads of DiMR's other branches have gradients of zero, and their optimiser's state."""
    changes = [
        "data.source=digits", "model.size=8", "model.channels=1", "model.dims=[16,16,16]",
        "model.hidden_dims=[32,32,32]", "model.depths=[1,1,1]", "model.heads=1", "batch=16",
        "samples.count=2", "samples.steps=2", "samples.every_images=32",
        "log_every_images=32", f"objective={{name: {objective}}}", "time.loss_measure=u",
    ]  # fmt: skip
    recipe = config.override(recipe_for("dimr-tiny"), changes)
    whole = train(config.override(recipe, ["images=64"]), tmp_path / "whole", quiet=True)
    folder = train(config.override(recipe, ["images=32"]), tmp_path / "run", quiet=True)
    train(config.override(recipe, ["images=64"]), folder, quiet=True)
    assert_same_run(whole, folder)
