"""Nothing of a run is lost: the models of the last state, and runs without an intact checkpoint."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from helpers.runs import assert_same_run, small
from mezzotint.models import saved_images
from mezzotint.train import checkpoint, log, loop, run_folder
from mezzotint.train.loop import train


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


EMA = ("ema.power_stds=[0.05]",)


def contents(folder):
    """Every file of a folder but the lock, with its bytes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def assert_whole_models(whole, folder):
    for name in ("model", "model-raw"):
        for file in ("model.safetensors", "config.json", "README.md"):
            assert (folder / name / file).read_bytes() == (whole / name / file).read_bytes()


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The models of the same run at 96 images."""
    return train(small("images=96"), tmp_path_factory.mktemp("earlier") / "run", quiet=True)


@pytest.mark.parametrize("left", [
    "nothing", "the averaged model", "older models", "new weights under an old config",
    "no weights",
])  # fmt: skip
def test_models_of_the_final_state_are_written_at_the_next_start(whole, stopped, earlier, left):
    """Killed after the last checkpoint got its name, at several points of writing the models."""
    folder = stopped(160)
    for name in ("model", "model-raw"):
        if left != "the averaged model" or name == "model-raw":
            shutil.rmtree(folder / name)
        if left in ("older models", "new weights under an old config"):
            shutil.copytree(earlier / name, folder / name)
    if left == "new weights under an old config":
        shutil.copy(whole / "model" / "model.safetensors", folder / "model")
    if left == "no weights":
        shutil.copytree(whole / "model", folder / "model", ignore=lambda *_: ["model.safetensors"])
    train(small(), folder, quiet=True)
    assert_whole_models(whole, folder)
    assert_same_run(whole, folder)


def test_a_snapshot_of_the_final_state_is_written_at_the_next_start(tmp_path):
    folder = train(small("images=48", *EMA), tmp_path, quiet=True)
    before = contents(folder / "ema")
    assert len(before) == 1
    shutil.rmtree(folder / "ema")
    train(small("images=48", *EMA), folder, quiet=True)
    assert contents(folder / "ema") == before


def test_a_finished_run_is_left_as_it_is(whole, stopped, monkeypatch):
    folder = stopped(160)
    before = contents(folder)
    del before["environment.json"]
    monkeypatch.setattr(loop, "save", None)
    train(small(), folder, quiet=True)
    after = contents(folder)
    del after["environment.json"]
    assert after == before


def test_a_newer_model_is_kept_when_an_older_checkpoint_is_resumed(whole, stopped, monkeypatch):
    """Until training has reached it again."""
    folder = stopped(48)
    monkeypatch.setattr(loop, "save", None)
    train(small("images=48"), folder, quiet=True)
    assert_whole_models(whole, folder)


@pytest.mark.parametrize(
    "lost", ["deleted", "empty files", slow("no manifest"), slow("one file missing")]
)
def test_a_trained_run_without_an_intact_checkpoint_is_refused(whole, stopped, lost):
    folder = stopped(160)
    saved = folder / "checkpoints"
    if lost == "deleted":
        shutil.rmtree(saved)
    else:
        name = "manifest.json" if lost == "no manifest" else "__0_0.distcp"
        for path in saved.glob(f"*/{name}"):
            path.write_bytes(b"") if lost == "empty files" else path.unlink()
    before = contents(folder)
    with pytest.raises(ValueError, match=r"no checkpoint to resume.*--out.*--init-from.*delete"):
        train(small("images=320"), folder, quiet=True)
    assert contents(folder) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, stopped):
    folder = stopped(0)
    for name in ("model", "model-raw"):
        shutil.rmtree(folder / name)
    train(small(), folder, quiet=True)
    assert_same_run(whole, folder)


@pytest.mark.parametrize("how", ["copied", slow("renamed"), slow("files copied")])
def test_a_checkpoint_under_another_number_is_passed_over(whole, stopped, capsys, how):
    folder = stopped(96)
    saved = folder / "checkpoints"
    if how == "renamed":
        (saved / "96").rename(saved / "128")
    elif how == "copied":
        shutil.copytree(saved / "48", saved / "128")
    else:
        (saved / "128").mkdir()
        for path in (saved / "96").iterdir():
            shutil.copy(path, saved / "128" / path.name)
    train(small(), folder)
    told = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"checkpoint 128 is damaged and passed over: it is the checkpoint at \d+", told
    )
    assert "resuming at 48 images" in told or "resuming at 96 images" in told
    assert_same_run(whole, folder)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        slow(FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file"),
        slow(RuntimeError("unexpected bytes\nand a second line"), "unexpected bytes"),
        (
            CheckpointException("read", {0: (EOFError("Ran out of input"), None)}),
            "Ran out of input",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_passed_over(
    whole, stopped, monkeypatch, capsys, fault, reason
):
    """Its hashes are right: reading fails, as from a broken disk."""
    from torch.distributed.checkpoint import FileSystemReader

    folder, read = stopped(96), FileSystemReader.read_data

    def fails(self, *arguments):
        if str(self.path).endswith("96"):
            raise fault
        return read(self, *arguments)

    monkeypatch.setattr(FileSystemReader, "read_data", fails)
    train(small(), folder)
    told = [line for line in capsys.readouterr().err.splitlines() if "passed over" in line]
    assert len(told) == 1
    assert re.search(f"checkpoint 96 cannot be loaded and is passed over: .*{reason}", told[0])
    assert_same_run(whole, folder)


def test_a_run_whose_every_checkpoint_fails_to_load_is_refused(stopped, monkeypatch):
    folder = stopped(96)
    before = contents(folder)
    monkeypatch.setattr(checkpoint, "CheckpointReader", None)
    with pytest.raises(ValueError, match=r"(?s)96 cannot be loaded.*48 cannot be loaded.*--out"):
        train(small(), folder, quiet=True)
    assert contents(folder) == before


def test_what_a_checkpoint_must_have_is_listed_though_it_is_missing(tmp_path, monkeypatch):
    """The file of another rank that writes to a disk of its own: no manifest, no checkpoint."""
    sizes = checkpoint.file_sizes
    monkeypatch.setattr(checkpoint, "file_sizes", lambda m: {**sizes(m), "__1_0.distcp": 9})
    with pytest.raises(OSError, match=r"48 images.*__1_0\.distcp is missing.*every rank") as caught:
        train(small(), tmp_path, quiet=True)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_manifest_that_lists_less_than_the_checkpoint_needs_is_damage(stopped):
    """As manifests did that listed what happened to be there."""
    newest = stopped(96) / "checkpoints" / "96"
    manifest = json.loads((newest / "manifest.json").read_text())
    del manifest["files"]["__0_0.distcp"]
    (newest / "manifest.json").write_text(json.dumps(manifest))
    (newest / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in (checkpoint.find_checkpoint_damage(newest) or "")


def test_pruning_keeps_the_new_checkpoint_beside_a_newer_one_passed_over(whole, stopped):
    """With keep=1 the damaged one of more images must not push out what was just written."""
    folder = stopped(96)
    (folder / "checkpoints" / "96" / "manifest.json").unlink()
    train(small("images=64", "save.keep=1", "save.every_images=64"), folder, quiet=True)
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ["64", "96"]
    assert checkpoint.find_newest_intact(folder)[0] == folder / "checkpoints" / "64"


@pytest.mark.parametrize("target", ["model", "ema"])
@pytest.mark.parametrize("full", ["an error of safetensors", "an error of the system"])
def test_a_full_disk_under_the_models_is_one_sentence(tmp_path, monkeypatch, target, full):
    import safetensors.torch
    from safetensors import SafetensorError

    real = safetensors.torch.save_file

    def save_file(tensors, path, *arguments, **options):
        if f"/{target}/" in str(path) or f".{target}." in str(path):
            if full == "an error of the system":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return real(tensors, path, *arguments, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    with pytest.raises(
        OSError, match=r"48 images: .*No space left.*checkpoints are intact"
    ) as caught:
        train(small("images=48", *EMA), tmp_path, quiet=True)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    train(small("images=48", *EMA), tmp_path, quiet=True)
    assert saved_images(tmp_path / "model") == saved_images(tmp_path / "model-raw") == 48
    assert len(list((tmp_path / "ema").iterdir())) == 1


@pytest.mark.parametrize(
    "name",
    [b"caf\xe9.png", b"\xff\xfe.png", "日本.png".encode(), b"a\nb.png", b"tab\there\x1b[2J.png"],
)
def test_a_damaged_image_of_any_name_does_not_stop_a_checkpoint(tmp_path, name):
    from PIL import Image

    data = tmp_path / "data"
    for label in "ab":
        (data / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(data / label / f"{i}.png")
    (data / os.fsdecode(b"a/" + name)).write_bytes(b"damaged")
    overrides = ("model.channels=3", "images=32", "samples.count=0", f"data.source={str(data)!r}")
    folder = train(small(*overrides), tmp_path / "run", quiet=True)
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ["32"]
    (line,) = (folder / "unreadable.txt").read_text("utf-8").splitlines()
    assert line.split("\t")[0].isprintable()
    # A name is listed once, whatever its bytes.
    raw = {f"b/{os.fsdecode(name)}": "x"}
    assert log.append_unreadable(folder / "unreadable.txt", raw) == 1
    assert log.append_unreadable(folder / "unreadable.txt", raw) == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), PermissionError("no")])
def test_a_list_that_cannot_be_written_does_not_stop_a_checkpoint(tmp_path, monkeypatch, error):
    def fails(*arguments):
        raise error

    monkeypatch.setattr(log, "append_unreadable", fails)
    train(small("images=16", "samples.count=0"), tmp_path, quiet=True)
    assert checkpoint.find_newest_intact(tmp_path)[0] is not None


def test_a_log_line_that_cannot_be_written_waits_for_the_next(tmp_path):
    lines = log.Log(tmp_path / "sub" / "log.jsonl", 0)
    lines.write({"images": 1})  # no such folder
    (tmp_path / "sub").mkdir()
    lines.write({"images": 2})
    lines.write({"images": 3})
    assert [r["images"] for r in log.read(tmp_path / "sub" / "log.jsonl")] == [1, 2, 3]


def test_a_tracker_that_fails_never_ends_training():
    from mezzotint.train.trackers import _tolerant

    told, seen = [], []

    def write(record):
        seen.append(record)
        raise OSError("the network is gone")

    tolerant = _tolerant("wandb", write, told.append)
    tolerant({"images": 1})
    tolerant({"images": 2})
    assert len(seen) == len(told) == 1
    assert "wandb" in told[0]


@pytest.mark.parametrize(
    ("opens", "error", "told"),
    [
        (False, RuntimeError("the store is locked"), "does not start and gets no records: the"),
        (False, ImportError("no such library"), "does not start and gets no records: no such"),
        (True, OSError("the network is gone"), "does not close: the network is gone"),
    ],
)
def test_a_tracker_that_does_not_open_or_close_never_ends_training(
    tmp_path, monkeypatch, capsys, opens, error, told
):
    """The other one gets every line."""
    from mezzotint.train import trackers

    seen = {"trackio": [], "wandb": []}

    @contextlib.contextmanager
    def broken(run):
        if opens:
            yield seen["trackio"].append
        raise error

    @contextlib.contextmanager
    def sound(run):
        yield seen["wandb"].append
        seen["wandb"].append("closed")

    monkeypatch.setattr(trackers, "check_installed", lambda names: None)
    monkeypatch.setattr(trackers, "open_trackio", broken)
    monkeypatch.setattr(trackers, "open_wandb", sound)
    train(small("images=32", "trackers=[wandb, trackio]", "log_every_images=16"), tmp_path)
    lines = log.read(tmp_path / "log.jsonl")
    assert [line["images"] for line in lines] == [16, 32]
    assert seen == {"trackio": lines if opens else [], "wandb": [*lines, "closed"]}
    assert saved_images(tmp_path / "model") == 32
    printed = " ".join(capsys.readouterr().err.split())
    assert printed.count("tracker") == 1
    assert f"the tracker trackio {told}" in printed


@pytest.mark.parametrize("how", ["moved", slow("deleted"), "replaced"])
def test_a_run_folder_that_is_gone_is_noticed_before_writing(tmp_path, monkeypatch, how):
    folder, averages = tmp_path / "run", loop.update_averages

    def update(run):
        averages(run)
        if run.state.images == 80:
            run.writer._pending.exception()  # waits until the checkpoint at 48 is written
            if how == "deleted":
                shutil.rmtree(folder)
            else:
                folder.rename(tmp_path / "moved")
            if how == "replaced":
                (folder / "checkpoints").mkdir(parents=True)
                (folder / ".lock").touch()

    monkeypatch.setattr(loop, "update_averages", update)
    with pytest.raises(OSError, match=r"run was moved, deleted or replaced.*--out"):
        train(small(), folder, quiet=True)
    monkeypatch.undo()
    if how == "replaced":
        assert set(contents(folder)) == set()
    else:
        assert not folder.exists()
    if how != "deleted":
        assert checkpoint.find_newest_intact(tmp_path / "moved")[0] is not None
        assert max(r["images"] for r in log.read(tmp_path / "moved" / "log.jsonl")) == 64


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    target = tmp_path / "precious"
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    if kind == "link":
        target.write_text("keep me")
    if "link" in kind:
        lock.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.mkdir()
    refused = pytest.raises((OSError, ValueError), match=r"cannot be written|is a device, pipe")
    with refused, run_folder.run_lock(lock.parent):
        pass
    assert not target.exists() or target.read_text() == "keep me"


def test_a_log_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "target").write_text("")
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match="is a link"):
        log.Log(tmp_path / "log.jsonl", 0)


OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
KILLED = 77
FUZZER = """
import contextlib, os, sys
import torch; torch.set_num_threads(1)
from helpers.runs import small
from mezzotint.train import loop

folder, operations = {folder!r}, {operations!r}

def train(folder=folder):
    loop.train(small(*{overrides!r}), folder, quiet=True)

def attempt(number, fault):
    '''Train in a child, with a fault at file operation `number` of the run folder.'''
    if (child := os.fork()) == 0:
        count, code = 0, 0
        def hook(event, arguments):
            nonlocal count
            if event in operations and {folder!r} in str(arguments[:2]):
                if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                    return
                count += 1
                if count == number:
                    if fault == "kill":
                        os._exit({killed})
                    raise OSError(28, "No space left on device")
        sys.addaudithook(hook)
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                train()
        except (OSError, ValueError) as error:
            code = 1 if "\\n" not in str(error) else 2
            if count < number:  # no fault of ours
                print(repr(error), file=sys.__stderr__)
        except BaseException as error:
            print(type(error), error, file=sys.__stderr__)
            code = 3
        os._exit(code if code or count >= number else {finished})
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

train(folder + "-first")  # imports what every child needs
for line in sys.stdin:
    number, fault = line.split()
    print(attempt(int(number), fault), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("fault", ["kill", "full disk"])
def test_a_fault_at_every_point_of_every_save_changes_nothing(tmp_path, fault):
    """The process ends, or the disk is full, at each file operation of a run; then it resumes."""
    overrides = (
        "images=64",
        "save.every_images=32",
        "save.keep=1",
        "samples.every_images=64",
        *EMA,
    )
    whole = train(small(*overrides), tmp_path / "whole", quiet=True)
    folder, finished = tmp_path / "run", 78
    script = FUZZER.format(
        folder=str(folder), operations=OPERATIONS, overrides=overrides, killed=KILLED,
        finished=finished,
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def attempt(number: int, kind: str) -> int:
            process.stdin.write(f"{number} {kind}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        number, codes = 0, []
        while True:
            number += 1
            shutil.rmtree(folder, ignore_errors=True)
            code = attempt(number, "kill" if fault == "kill" else "full")
            if code == finished:
                break
            codes.append(code)
            # On a full disk some writes may fail and nothing is lost: then the run has finished.
            assert code in ((KILLED,) if fault == "kill" else (0, 1)), (number, code)
            assert attempt(1_000_000, "kill") == finished, number
            assert_same_run(whole, folder)
            assert_whole_models(whole, folder)
            assert contents(folder / "ema") == contents(whole / "ema"), number
            assert not list(folder.rglob(".*.partial")), number
        process.stdin.close()
    print(f"\n{number - 1} points of a run with two saves, {fault}: all resumed bit for bit")
    assert number > 40
