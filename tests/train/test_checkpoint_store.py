"""Checkpoints on an object store: a fresh machine goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from helpers import ranks, store_runs
from helpers.launch import run_here
from helpers.runs import assert_same_run, assert_same_tensors, records, small, weights
from mezzotint import config
from mezzotint.core.object_store import (
    StoreError,
    list_files,
    patience,
    read_bytes,
    write_bytes,
)
from mezzotint.models import load_model
from mezzotint.train import checkpoint, checkpoint_store
from mezzotint.train.loop import check, train

STORE = "s3://bucket/runs/xl"


def on_store(*overrides):
    return small(f"save.store={STORE}", *overrides)


def stored():
    """The paths of all objects of the run."""
    return [file.address.removeprefix(f"{STORE}/") for file in list_files(STORE)]


def stored_checkpoints():
    names = [path.split("/") for path in stored()]
    return sorted(int(name[1]) for name in names if name[0] == "checkpoints" and len(name) > 2
                  and name[2] == "manifest.json")  # fmt: skip


def assert_as_whole(whole, folder):
    """The run in `folder` has ended as the uninterrupted one; its newest checkpoint is fetched."""
    checkpoint_store.fetch_newest(STORE, folder, store_runs.ALONE)
    assert_same_run(whole, folder)
    checkpoint_store.drop_fetched(folder, store_runs.ALONE)
    assert checkpoint.list_checkpoints(folder) == []


@pytest.fixture
def forget(tmp_path):
    """A function: lose the disk of the machine; the run's folder on the next one."""
    numbers = iter(range(100))

    def lose():
        number = next(numbers)
        shutil.rmtree(tmp_path / f"disk{number}", ignore_errors=True)
        return tmp_path / f"disk{number + 1}" / "xl"

    return lose


def test_a_killed_run_goes_on_on_a_fresh_machine(whole, s3_server, forget, capsys):
    folder = forget()
    code = f"""
from helpers.store_runs import train_and_die
train_and_die({str(folder)!r}, {STORE!r}, 112)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200,
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == -9, process.stderr[-2000:]
    assert stored_checkpoints() == [48, 96]
    assert not [p for p in (folder / "checkpoints").iterdir() if not p.name.startswith(".")]

    folder = forget()
    train(on_store(), folder)
    assert "resuming at 96 images" in capsys.readouterr().err
    assert_as_whole(whole, folder)
    assert stored_checkpoints() == [48, 96, 144, 160]
    # Everything but the checkpoints is in both places.
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            assert read_bytes(f"{STORE}/{name}") == path.read_bytes(), name

    # A finished run starts again and changes nothing, here and elsewhere.
    before = stored()
    train(on_store(), forget(), quiet=True)
    assert stored() == before


def test_retention_and_leftovers(s3_server, tmp_path):
    leftover = f"{STORE}/checkpoints/32/__0_0.distcp"
    write_bytes(leftover, b"of a killed save")
    folder = train(on_store("save.keep=1", "save.keep_every_images=96"), tmp_path / "a", quiet=True)
    assert stored_checkpoints() == [96, 160]
    assert not any(name.startswith("checkpoints/32/") for name in stored())
    # Where the recipe names no store any more, nothing is trained twice by mistake.
    with pytest.raises(ValueError, match=rf"no checkpoint to resume from; its .* went to {STORE}"):
        train(small(), folder, quiet=True)
    # Fields that change nothing that is learnt may differ.
    train(on_store("save.keep=2"), folder, quiet=True)


def test_a_damaged_checkpoint_is_passed_over(whole, s3_server, forget, capsys):
    train(on_store("save.keep=9"), forget(), quiet=True)
    for images, name in ((160, "__0_0.distcp"), (144, "manifest.json")):
        address = f"{STORE}/checkpoints/{images}/{name}"
        content = bytearray(read_bytes(address))
        content[len(content) // 2] ^= 1
        write_bytes(address, bytes(content))
    folder = forget()
    train(on_store(), folder)
    told = capsys.readouterr().err
    assert f"checkpoint 160 of {STORE} is damaged and passed over: __0_0.distcp has changed" in told
    assert f"checkpoint 144 of {STORE} is damaged and passed over" in told
    assert "resuming at 96 images" in told
    assert_as_whole(whole, folder)

    for name in stored():
        if name.endswith(".distcp"):
            write_bytes(f"{STORE}/{name}", b"")
    before = stored()
    with pytest.raises(ValueError, match=r"holds checkpoints at .* and none is intact"):
        train(on_store(), forget(), quiet=True)
    assert stored() == before


def test_another_run_on_the_store_is_not_mixed_in(s3_server, tmp_path):
    train(on_store("images=48"), tmp_path / "a", quiet=True)
    other = small("images=48", "seed=3", f"save.store={STORE}-2")
    folder = train(other, tmp_path / "b", quiet=True)
    before = (folder / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"holds another run than .*\n  seed: 0 there, 3 asked"):
        train(config.override(other, [f"save.store={STORE}"]), folder, quiet=True)
    with pytest.raises(ValueError, match="belongs to another recipe"):
        train(config.override(other, [f"save.store={STORE}"]), tmp_path / "c", quiet=True)
    assert (folder / "recipe.yaml").read_bytes() == before


def test_a_store_that_is_used_later(whole, stopped, s3_server, forget):
    folder = stopped(96)
    train(on_store(), folder, quiet=True)  # goes on from the checkpoint of the folder
    assert stored_checkpoints() == [144, 160]
    checkpoint_store.fetch_newest(STORE, folder, store_runs.ALONE)
    assert_same_run(whole, folder)


def test_no_bucket_or_no_access_is_said_at_the_start(s3_server, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="there is no bucket s3://nowhere"):
        train(small("save.store=s3://nowhere/xl"), tmp_path / "a", quiet=True)
    with pytest.raises(StoreError, match="can be read and not written"):
        train(small("images=16", "save.store=https://127.0.0.1:9/xl"), tmp_path / "b", quiet=True)
    with pytest.raises(ValueError, match=r"save\.store runs/xl is no address"):
        small("save.store=runs/xl")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match=r"may not be used .* set AWS_ACCESS_KEY_ID"):
        train(on_store(), tmp_path / "c", quiet=True)
    assert not (tmp_path / "a").exists()
    check(on_store(), tmp_path / "d")  # a dry run asks the store nothing


def test_a_store_that_is_gone_ends_the_run_as_a_full_disk_does(whole, s3_server, forget):
    hurry = patience(1)

    def kill():
        s3_server.kill()
        hurry.__enter__()

    folder = forget()
    wanted = r"at (96|144) images.* did not answer"
    with store_runs.after_checkpoint(96, kill), pytest.raises(OSError, match=wanted) as caught:
        train(on_store(), folder, quiet=True)
    hurry.__exit__(None, None, None)
    assert "\n" not in str(caught.value)
    assert not list((folder / "checkpoints").iterdir())
    s3_server.start()
    assert stored_checkpoints() in ([48], [48, 96])
    folder = forget()
    train(on_store(), folder, quiet=True)
    assert_as_whole(whole, folder)


@pytest.mark.slow
def test_a_store_that_comes_back_is_waited_for(whole, s3_server, forget):
    def restart():
        s3_server.kill()
        threading.Timer(1.0, s3_server.start).start()

    folder = forget()
    with store_runs.after_checkpoint(96, restart), patience(30):
        train(on_store(), folder, quiet=True)
    assert_as_whole(whole, folder)


def test_roll_back_fetches_the_checkpoint(s3_server, tmp_path, monkeypatch):
    from mezzotint.train import nonfinite

    asked = []
    fetch = checkpoint_store.fetch_newest
    monkeypatch.setattr(
        nonfinite.checkpoint_store, "fetch_newest", lambda *a: (asked.append(a[0]), fetch(*a))
    )
    recipe = on_store("nonfinite.on_nonfinite=rollback", "nonfinite.limit=2")
    with store_runs.nan_at(112):
        folder = train(recipe, tmp_path / "run", quiet=True)
    assert asked[-1] == STORE
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [line["to_images"] for line in lines if line["event"] == "rollback"] == [96]


def test_two_ranks_without_a_common_disk(s3_server, tmp_path):
    """Each rank has a disk of its own, and loses it half way; then one process goes on."""
    overrides = ["samples.count=0", "save.every_images=32"]
    for attempt, images in enumerate((32, 64)):
        folder = str(tmp_path / f"{attempt}-rank")
        options = [*overrides, f"save.store={STORE}"]
        ranks.run_on_ranks(
            2, store_runs.train_apart, s3_server.environment, folder, options, images
        )
        assert stored_checkpoints()[-1] == images
        for rank in (0, 1):
            assert not list((tmp_path / f"{attempt}-rank{rank}" / "checkpoints").glob("*"))
    manifest = json.loads(read_bytes(f"{STORE}/checkpoints/64/manifest.json"))
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} <= set(manifest["files"])
    assert manifest["ranks"] == 2
    # As on a common disk, without interruption and without a store.
    shared = tmp_path / "shared"
    ranks.run_on_ranks(2, store_runs.train_shared, str(shared), overrides, 64)
    assert_same_tensors(weights(shared), weights(tmp_path / "1-rank0"))
    recipe = on_store("samples.count=0", "images=80")
    alone = train(recipe, tmp_path / "alone", quiet=True)
    assert [line["images"] for line in records(alone)] == [32, 64, 80]


def test_an_upload_that_fails_on_one_rank_ends_all(s3_server, tmp_path):
    options = ["samples.count=0", "save.every_images=32", f"save.store={STORE}"]
    for failing in (0, 1):
        folder = str(tmp_path / f"{failing}-rank")
        errors = ranks.run_on_ranks(
            2, store_runs.fail_on_one_rank, s3_server.environment, folder, options, failing
        )
        for error in errors:
            assert "the checkpoint at 32 images could not be written to s3://" in error
            assert "it does not answer" in error
        assert "manifest.json" not in "".join(stored())


def test_samples_of_a_model_on_the_store(s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    folder = train(on_store("images=48", "samples.count=0"), tmp_path / "run", quiet=True)
    options = ["-n", "2", "--steps", "2", "--out"]
    run_here("sample", str(folder), *options, str(tmp_path / "a"))
    for number, address in enumerate((STORE, f"{STORE}/model")):
        run_here("sample", address, *options, str(tmp_path / f"b{number}"))
        for name in ("000000.png", "000001.png"):
            same = (tmp_path / f"b{number}" / name).read_bytes()
            assert same == (tmp_path / "a" / name).read_bytes()
    # Other weights at the same address are downloaded again, and damaged ones are refused.
    damaged = bytearray(read_bytes(f"{STORE}/model/model.safetensors"))
    damaged[-1] ^= 1
    write_bytes(f"{STORE}/model/model.safetensors", bytes(damaged))
    with pytest.raises(ValueError, match="SHA-256"):
        load_model(STORE)
    with pytest.raises(ValueError, match=r"there is no model at s3://bucket/other"):
        load_model("s3://bucket/other")
