"""Training from a real S3 server: the same promises as from a disk, with kills on both sides."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from helpers.launch import run_here, torchrun
from helpers.runs import assert_same_tensors, last_state, records, weights
from helpers.s3_server import running_server
from mezzotint.core.object_store import delete_files, upload_file

SHARDS, ROWS = 20, 12
RECIPE = [
    "unet-tiny", "model.size=16", "model.width=16", "model.emb_dim=32", "batch=12",
    "images=480", "log_every_images=48", "samples.count=0", "save.every_images=48",
    "engine.precision=float32", "optim.warmup_images=0", "data.shards.shuffle_images=8",
    "data.shards.lanes=2", "data.shards.patience_s=60",  # so that few shards are fetched ahead
]  # fmt: skip


def write_set(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        rows = []
        for _ in range(ROWS):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue()}, "label": int(rng.integers(3))})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard:05d}.parquet")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Return a running server with a set in its bucket."""
    with running_server(tmp_path_factory.mktemp("s3")) as server:
        write_set(server.folder / "bucket" / "set")
        yield server


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """Return a run from the same shards on a disk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copytree(server.folder / "bucket" / "set", folder / "copy")
    run_here(*arguments(f"file://{folder}/copy", folder / "disk"))
    return folder / "disk"


SOURCE = "s3://bucket/set"


def arguments(source: str, out: Path, *more: str) -> list[str]:
    cache = f"data.shards.cache={out.parent / f'cache-{out.name}'}"
    return ["train", *RECIPE, cache, *more, "--data", source, "--out", str(out)]


def start(*command: str, ranks: int = 1) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *(launch if ranks > 1 else []), "-m", "mezzotint", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def wait_for_images(out: Path, images: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run has saved a checkpoint of so many images."""
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / str(images) / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_bitwise(a: Path, b: Path) -> None:
    """Weights, newest checkpoint and log of two runs are equal, bit for bit."""
    assert records(a) == records(b)
    for of in (weights, last_state):
        assert_same_tensors(of(a), of(b))


def test_a_run_from_a_store_is_bitwise_that_from_a_disk_with_kills(undisturbed, tmp_path):
    out = tmp_path / "killed"
    for images in (96, 240):
        process = start(*arguments(SOURCE, out))
        wait_for_images(out, images, process)
        process.kill()
        process.communicate()
    run_here(*arguments(SOURCE, out))
    assert_bitwise(undisturbed, out)


@pytest.mark.parametrize("fault", ["kill", pytest.param("freeze", marks=pytest.mark.slow)])
def test_a_run_waits_for_a_server_that_goes_and_returns(fault, server, undisturbed, tmp_path):
    out = tmp_path / fault
    process = start(*arguments(SOURCE, out))
    wait_for_images(out, 48, process)
    getattr(server, fault)()
    time.sleep(6)
    assert process.poll() is None
    if fault == "kill":
        server.start()
    else:
        server.thaw()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert_bitwise(undisturbed, out)


def test_a_store_that_does_not_return_ends_the_run_which_resumes(server, undisturbed, tmp_path):
    out = tmp_path / "gone"
    process = start(*arguments(SOURCE, out, "data.shards.patience_s=1"))
    wait_for_images(out, 48, process)
    server.kill()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert "s3://bucket/set" in last
    server.start()
    run_here(*arguments(SOURCE, out))
    assert_bitwise(undisturbed, out)


@pytest.mark.slow
def test_ranks_come_and_go(undisturbed, tmp_path):
    """2, then 1, then 3 ranks see what one rank sees; their sums round otherwise."""
    out = tmp_path / "ranks"
    for ranks, images in ((2, 144), (1, 288), (3, 480)):
        command = arguments(SOURCE, out, f"images={images}")
        if ranks == 1:
            run_here(*command)
        else:
            done = torchrun(ranks, *command)
            assert done.returncode == 0, done.stderr[-3000:]
    assert [line["images"] for line in records(out)] == list(range(48, 481, 48))
    # Adam turns the rounding of a gradient near zero into a step, so single entries may differ.
    expected = weights(undisturbed)
    for name, value in weights(out).items():
        apart = (value - expected[name]).abs() > 2e-4 + 1e-3 * expected[name].abs()
        assert apart.float().mean() < 0.01, name


@pytest.mark.parametrize(("missing", "ranks"), [("stop", 2), ("skip", 1)])
def test_a_shard_that_is_lost_stops_all_ranks_or_is_counted(missing, ranks, server, tmp_path):
    # Through the server, which lists its own changes at once.
    for path in (server.folder / "bucket" / "set").iterdir():
        upload_file(path, f"s3://bucket/{missing}/{path.name}")
    out = tmp_path / missing
    process = start(
        *arguments(f"s3://bucket/{missing}", out, f"data.shards.missing={missing}"), ranks=ranks
    )
    wait_for_images(out, 48, process)
    for path in (server.folder / "bucket" / missing).glob("*[37].parquet"):
        delete_files(f"s3://bucket/{missing}/{path.name}")
    printed, _ = process.communicate(timeout=120)
    if missing == "stop":
        assert process.returncode != 0
        assert "it is missing" in printed
        assert "data.shards.missing=skip" in printed
    else:
        assert process.returncode == 0, printed
        assert "shard train-000" in (out / "unreadable.txt").read_text()


@pytest.mark.parametrize(
    ("source", "variables", "words"),
    [
        ("s3://no-such-bucket/set", {}, "no-such-bucket"),
        ("s3://bucket/empty", {}, "empty"),
        ("s3://bucket/set", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "AWS_SECRET_ACCESS_KEY"),
        ("gs://bucket/set", {}, "gcsfs"),
    ],
)
def test_bad_addresses_are_one_line(source, variables, words, server, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=words) as raised:
        run_here(*arguments(source, out, "data.shards.patience_s=1"))
    assert "\n" not in str(raised.value)
    assert not out.exists()


def test_a_cache_too_small_for_the_lanes_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="2 lanes of 8 images need about"):
        run_here(*arguments(SOURCE, tmp_path / "run", "data.shards.cache_gb=0.0001"))


@pytest.mark.parametrize("lanes", [5, 24])
def test_lanes_that_do_not_divide_the_batch_are_refused(lanes, server, tmp_path):
    with pytest.raises(ValueError, match=rf"lanes={lanes} does not divide batch=12; try"):
        run_here(*arguments(SOURCE, tmp_path / "run", f"data.shards.lanes={lanes}"))


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("save.store=s3://bucket/set/", "save.store s3://bucket/set/ is where the data is"),
        ("data.shards.cache=s3://bucket/cache", "data.shards.cache=s3://bucket/cache is an addr"),
    ],
)
def test_places_that_cannot_be_are_refused_before_anything_is_written(
    field, words, server, tmp_path
):
    out, bucket = tmp_path / "run", server.folder / "bucket"
    before = {path.name for path in bucket.iterdir()}
    with pytest.raises(ValueError, match=words):
        run_here(*arguments(SOURCE, out, field))
    assert not (out / "checkpoints").exists()
    assert {path.name for path in bucket.iterdir()} == before
    assert len(list((server.folder / "bucket" / "set").iterdir())) == SHARDS


def test_another_batch_on_resume_is_another_recipe_and_not_wrong_lanes(server, tmp_path):
    out = tmp_path / "run"
    fields = [field for field in arguments(SOURCE, out, "images=48") if "lanes" not in field]
    run_here(*fields)
    with pytest.raises(ValueError, match="batch: 12 there, 6 asked"):
        run_here(*[field.replace("batch=12", "batch=6") for field in fields])
