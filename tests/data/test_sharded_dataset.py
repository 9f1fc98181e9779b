"""Shards at an address: the same images whatever the form; what is wrong is named or left out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mezzotint.data import sharded_dataset
from mezzotint.data.loader import load_batches
from mezzotint.data.shard_cache import ShardCache
from mezzotint.data.shard_index import is_sharded
from mezzotint.data.sharded_dataset import ShardError, open_shards

COUNTS = (10, 11, 12, 13)  # images of each shard
TOTAL = sum(COUNTS)


def encode(k: int, size=(24, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (k % 256, k // 2 % 256, 7)).save(file, "PNG")
    return file.getvalue()


def rows_of(shard: int) -> list[dict]:
    first = sum(COUNTS[:shard])
    return [
        {
            "image": {"bytes": encode(k), "path": f"{k}.png"},
            "label": f"class {k % 3}",
            "text": f"caption {k}",
        }
        for k in range(first, first + COUNTS[shard])
    ]


def write_parquet(folder: Path, change=lambda shard, rows: rows) -> str:
    folder.mkdir(parents=True)
    for shard in range(len(COUNTS)):
        table = pa.Table.from_pylist(change(shard, rows_of(shard)))
        pq.write_table(table, folder / f"shard-{shard:03d}.parquet", row_group_size=4)
    return f"file://{folder}"


def write_tars(folder: Path) -> str:
    folder.mkdir(parents=True)
    for shard in range(len(COUNTS)):
        with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as tar:
            for row in rows_of(shard):
                key = f"{int(row['image']['path'][:-4]):05d}"
                facts = {"label": row["label"], "text": row["text"]}
                for name, data in [
                    (f"{key}.png", row["image"]["bytes"]),
                    (f"{key}.json", json.dumps(facts).encode()),
                ]:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return f"file://{folder}"


def open_at(address: str, tmp_path: Path, max_bytes: int = 10**8, **options):
    cache = ShardCache(tmp_path / "cache", max_bytes, patience_s=0.5)
    dataset = open_shards(address, cache, size=16, channels=3, **options)
    dataset.set_order(2, 8)
    return dataset


def check_epoch(dataset, skip=()):
    """Read an epoch and compare every image and label with what was written."""
    seen = []
    for start in range(0, TOTAL, 6):
        indices = dataset.batch_indices(0, start, min(6, TOTAL - start), 6)
        pixels, labels = dataset.batch(indices)
        for k, image, label in zip(indices.tolist(), pixels.numpy(), labels.tolist(), strict=True):
            if k not in skip:
                assert (image[0] == k % 256).all()
                assert (image[2] == 7).all()
                assert dataset.label_names[label] == f"class {k % 3}"
            seen.append(k)
    assert sorted(seen) == list(range(TOTAL))


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_an_epoch_holds_every_image_with_its_label_and_caption(write, tmp_path):
    dataset = open_at(write(tmp_path / "set"), tmp_path)
    assert len(dataset) == TOTAL
    assert dataset.label_names == ("class 0", "class 1", "class 2")
    assert dataset.num_classes == 3
    check_epoch(dataset)
    assert [dataset.text(k) for k in (0, 9, 10, TOTAL - 1)] == [
        "caption 0", "caption 9", "caption 10", f"caption {TOTAL - 1}",
    ]  # fmt: skip
    assert dataset.name(10).endswith("row 0")
    assert "shard-001" in dataset.name(10)
    assert dataset.describe_enlarged() is None


def test_numbers_of_classes_hold_over_all_shards(tmp_path):
    # Each shard alone would number its classes from 0.
    def change(shard, rows):
        return [{**row, "label": ["b", "d", "a", "c"][shard]} for row in rows]

    dataset = open_at(write_parquet(tmp_path / "set", change), tmp_path)
    assert dataset.label_names == ("a", "b", "c", "d")
    assert [dataset.label(sum(COUNTS[:k])) for k in range(4)] == [1, 3, 0, 2]
    dataset.relabel(("d", "c", "b", "a"))
    assert [dataset.label(sum(COUNTS[:k])) for k in range(4)] == [2, 0, 3, 1]


def test_images_without_labels(tmp_path):
    def drop(shard, rows):
        return [{"image": row["image"]} for row in rows]

    dataset = open_at(write_parquet(tmp_path / "set", drop), tmp_path)
    assert dataset.label_names is None
    assert dataset.batch([3])[1] is None
    assert not dataset.has_captions


def test_some_images_without_a_label(tmp_path):
    def blank(shard, rows):
        return [{**row, "label": None if k % 5 == 0 else row["label"]} for k, row in
                enumerate(rows)]  # fmt: skip

    dataset = open_at(write_parquet(tmp_path / "set", blank), tmp_path)
    assert dataset.count_unlabelled() == sum(-(-n // 5) for n in COUNTS)
    assert dataset.label(0) is None
    assert dataset.batch([0, 1])[1].tolist() == [-1, 1]


def test_a_pattern_a_split_and_all(tmp_path):
    folder = tmp_path / "set"
    address = write_parquet(folder)
    (folder / "shard-003.parquet").rename(folder / "test-00000-of-00001.parquet")
    for shard in range(3):
        (folder / f"shard-{shard:03d}.parquet").rename(
            folder / f"train-{shard:05d}-of-00003.parquet"
        )
    assert len(open_at(address, tmp_path)) == sum(COUNTS[:3])
    assert len(open_at(f"{address}:test", tmp_path)) == COUNTS[3]
    assert len(open_at(f"{address}:all", tmp_path)) == TOTAL
    assert len(open_at(f"{address}/train-*.parquet", tmp_path)) == sum(COUNTS[:3])
    with pytest.raises(ValueError, match="no split 'other'"):
        open_at(f"{address}:other", tmp_path)


def test_worker_processes_read_the_same(tmp_path):
    dataset = open_at(write_parquet(tmp_path / "set"), tmp_path)
    copy = pickle.loads(pickle.dumps(dataset))
    for a, b in zip(dataset.batch([1, 40, 17]), copy.batch([1, 40, 17]), strict=True):
        assert a.equal(b)
    common = {"seed": 0, "start_image": 12, "batch": 6}
    with contextlib.closing(load_batches(dataset, **common)) as threads:
        first = [next(threads) for _ in range(9)]
    with contextlib.closing(load_batches(copy, **common, workers=2, processes=True)) as workers:
        for one in first:
            other = next(workers)
            assert one.inputs.equal(other.inputs)
            assert one.labels.equal(other.labels)


# --- damage --------------------------------------------------------------------------------------


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_changed(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data)
    os.utime(path, (1, 1))


def damage_rows(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows_of(1)[:3]), path)


DAMAGES = [damage_missing, damage_cut, damage_changed, damage_rows]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_stops_with_its_name(damage, tmp_path):
    dataset = open_at(write_parquet(tmp_path / "set"), tmp_path)
    damage(tmp_path / "set" / "shard-001.parquet")
    with pytest.raises(ShardError, match=r"shard-001\.parquet, 11 images: .*missing=skip"):
        check_epoch(dataset)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_left_out_and_counted(damage, tmp_path):
    dataset = open_at(write_parquet(tmp_path / "set"), tmp_path, missing="skip")
    damage(tmp_path / "set" / "shard-001.parquet")
    lost = range(10, 21)
    check_epoch(dataset, skip=lost)
    pixels, _ = dataset.batch(list(lost))
    others = {int(image[0, 0, 0]) for image in pixels.numpy()}
    assert others <= set(range(TOTAL)) - set(lost)
    assert len(others) > 5  # not one image in place of all
    assert list(dataset.report.unreadable) == ["shard shard-001.parquet"]
    assert set(dataset.unreadable()) == set(lost)


def test_a_lost_shard_is_asked_for_once(tmp_path, monkeypatch):
    dataset = open_at(write_parquet(tmp_path / "set"), tmp_path, missing="skip")
    (tmp_path / "set" / "shard-001.parquet").unlink()
    asked, open_shard = [], sharded_dataset.open_shard
    monkeypatch.setattr(
        sharded_dataset, "open_shard", lambda *args: asked.append(args[1]) or open_shard(*args)
    )
    dataset.batch(list(range(10, 21)))
    dataset.batch(list(range(10, 21)))
    assert asked.count(1) == 1


def test_an_unreadable_image_is_replaced_by_the_next_of_its_shard(tmp_path):
    def spoil(shard, rows):
        if shard == 2:
            rows[3]["image"]["bytes"] = b"no image"
        return rows

    dataset = open_at(write_parquet(tmp_path / "set", spoil), tmp_path)
    k = sum(COUNTS[:2]) + 3
    pixels, labels = dataset.batch([k])
    assert (pixels.numpy()[0, 0] == k + 1).all()
    assert dataset.label_names[int(labels[0])] == f"class {(k + 1) % 3}"
    assert list(dataset.report.unreadable) == ["shard-002.parquet row 3"]
    assert dataset.readable(k) == k + 1


def test_a_store_that_is_gone_is_no_damage(tmp_path, monkeypatch):
    dataset = open_at(write_parquet(tmp_path / "set"), tmp_path, missing="skip")
    for path in (tmp_path / "cache").glob("*.arrow"):
        path.unlink()

    def refuse(*_):
        raise ConnectionRefusedError("connection refused")

    monkeypatch.setattr("mezzotint.data.shard_cache.stat_file", refuse)
    with pytest.raises(OSError, match="refused"):
        dataset.batch([TOTAL - 1])


# --- bad input -----------------------------------------------------------------------------------


def test_mixed_columns_name_the_shard(tmp_path):
    def rename(shard, rows):
        if shard == 2:
            return [{"photo": row["image"], "label": row["label"]} for row in rows]
        return rows

    with pytest.raises(ValueError, match=r"shard-002\.parquet has no column 'image'.*photo"):
        open_at(write_parquet(tmp_path / "set", rename), tmp_path)


def test_an_empty_address_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="set"):
        open_at(f"file://{tmp_path}/set", tmp_path)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(encode(1))
    with pytest.raises(ValueError, match="set"):
        open_at(f"file://{tmp_path}/set", tmp_path)


@pytest.mark.parametrize("shard", ["shard-000.parquet", "shard-002.parquet"])
def test_a_shard_that_is_no_parquet_is_named(shard, tmp_path, capfd):
    address = write_parquet(tmp_path / "set")
    (tmp_path / "set" / shard).write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(ValueError, match=f"{shard} cannot be read"):
        open_at(address, tmp_path)
    assert "Failed" not in capfd.readouterr().err


def test_a_latent_network_wants_latents(tmp_path):
    with pytest.raises(ValueError, match="mezzotint prepare SOURCE"):
        open_at(write_parquet(tmp_path / "set"), tmp_path, codec_name="sd-vae")


def test_a_cache_larger_than_the_disk_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cache_gb=1e\+09 is more than the disk"):
        open_at(write_parquet(tmp_path / "set"), tmp_path, max_bytes=10**18)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [("s3://bucket/x", True), ("hf://datasets/a/b:train", True), ("shapes:64", False),
     ("digits", False), ("/data/images:test", False), ("C:\\images", False)],
)  # fmt: skip
def test_addresses_are_told_from_paths(source, wanted):
    assert is_sharded(source) == wanted


# --- cache ---------------------------------------------------------------------------------------


def test_the_cache_stays_within_its_size(tmp_path):
    address = write_parquet(tmp_path / "set")
    shard_bytes = max(p.stat().st_size for p in (tmp_path / "set").iterdir())
    limit = 5 * shard_bytes
    dataset = open_at(address, tmp_path, max_bytes=limit)
    for _ in range(2):
        check_epoch(dataset)
        dataset._open.clear()
        files = list((tmp_path / "cache").glob("*.arrow"))
        assert sum(p.stat().st_size for p in files) <= limit
    assert not list((tmp_path / "cache").glob("*.stored"))


# Fetches slowly, and writes down what it fetches.
OPEN_ALL = """
import sys, time
from pathlib import Path
import mezzotint.data.shard_cache as module
from mezzotint.data.sharded_dataset import open_shards

address, cache, log, count = sys.argv[1:]
fetch = module.download_file

def slow(address, path):
    with open(log, "a") as file:
        file.write(f"{address}\\n")
    time.sleep(0.2)
    fetch(address, path)

module.download_file = slow
dataset = open_shards(address, module.ShardCache(Path(cache), 10**8), size=16, channels=3)
dataset.batch(list(range(int(count))))
"""


def test_processes_of_a_machine_fetch_a_shard_once(tmp_path):
    address, log = write_parquet(tmp_path / "set"), tmp_path / "fetched"
    command = [sys.executable, "-c", OPEN_ALL, address, tmp_path / "cache", log, str(TOTAL)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    fetched = log.read_text().split()
    assert sorted(fetched) == sorted(set(fetched))
    assert len(fetched) == len(COUNTS)


def test_what_killed_processes_left_is_removed(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("x.1.stored", ".x.arrow.host.1.partial"):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (1, 1))
    (folder / "y.2.stored").write_bytes(b"x")  # of a process that fetches now
    ShardCache(folder, 100).check()
    assert [path.name for path in folder.iterdir()] == ["y.2.stored"]


def test_a_cached_shard_that_is_damaged_is_fetched_again(tmp_path):
    dataset = open_at(write_parquet(tmp_path / "set"), tmp_path)
    check_epoch(dataset)
    dataset._open.clear()
    for path in (tmp_path / "cache").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    check_epoch(dataset)


def test_another_version_of_a_set_has_another_fingerprint(tmp_path):
    address = write_parquet(tmp_path / "set")
    first = open_at(address, tmp_path).fingerprint
    assert open_at(address, tmp_path).fingerprint == first
    copy = write_parquet(tmp_path / "copy")
    assert open_at(copy, tmp_path).index.fingerprint == open_at(address, tmp_path).index.fingerprint

    def change(shard, rows):
        return [{**row, "text": row["text"].replace("caption", "another")} for row in rows]

    other = write_parquet(tmp_path / "other", change)
    assert open_at(other, tmp_path).fingerprint != first


def test_pixels_are_those_of_an_ordinary_dataset(tmp_path):
    from mezzotint.data.image_dataset import open_images

    dataset = open_at(write_parquet(tmp_path / "set"), tmp_path)
    plain = open_images(tmp_path / "set", size=16)
    for k in (0, 13, TOTAL - 1):
        assert np.array_equal(dataset.image(k).numpy(), plain.image(k).numpy())
    assert dataset.label_names == plain.label_names


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([]) if not rows else None), path)


@pytest.mark.parametrize(
    "name", ["_SUCCESS", ".part-0.parquet.crc", "._shard-000.parquet", "_temporary/0/a.parquet"]
)
def test_hidden_files_beside_shards_are_no_data(name, tmp_path):
    address = write_parquet(tmp_path / "set")
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"junk")
    check_epoch(open_at(address, tmp_path))


@pytest.mark.parametrize("name", ["a.parquet", "shard-001-b.parquet", "z.parquet"])
def test_shards_without_rows_are_left_out(name, tmp_path):
    address = write_parquet(tmp_path / "set")
    write_rows(tmp_path / "set" / name, [])
    dataset = open_at(address, tmp_path)
    check_epoch(dataset)
    assert "1 shards without rows" in str(dataset.report)


def test_shards_without_any_row_are_refused(tmp_path):
    write_rows(tmp_path / "set" / "a.parquet", [])
    with pytest.raises(ValueError, match="holds no images"):
        open_at(f"file://{tmp_path}/set", tmp_path)


def test_a_file_is_an_address_too(tmp_path):
    address = write_parquet(tmp_path / "set")
    assert len(open_at(f"{address}/shard-002.parquet", tmp_path)) == COUNTS[2]


def test_many_rows_with_a_column_of_nulls(tmp_path):
    rows = [{"image": {"bytes": encode(k), "path": None}, "label": k % 3} for k in range(300)]
    write_rows(tmp_path / "set" / "a.parquet", rows)
    dataset = open_at(f"file://{tmp_path}/set", tmp_path)
    pixels, labels = dataset.batch([0, 255, 256, 299])
    assert pixels[:, 0, 0, 0].tolist() == [0, 255, 0, 43]
    assert labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("where", ["file", "file/below", "set/cache", "set"])
def test_a_cache_that_cannot_be_a_folder_is_refused(where, tmp_path):
    address = write_parquet(tmp_path / "set")
    (tmp_path / "file").write_text("x")
    cache = ShardCache(tmp_path / where, 10**6)
    with pytest.raises((ValueError, OSError), match=r"data\.shards\.cache"):
        open_shards(address, cache, size=16, channels=3)
    assert len(list((tmp_path / "set").iterdir())) == len(COUNTS)


@pytest.mark.parametrize("write", ["parquet", "tar"])
def test_a_nested_label_or_caption_that_a_shard_lacks_is_none(write, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    facts = [{"label": 3, "text": "a"}, {"text": "b"}, {"label": 5}, {"other": 1}]
    for k, fact in enumerate(facts):
        if write == "parquet":
            write_rows(folder / f"{k}.parquet", [{"image": encode(k), "json": fact}] * 2)
        else:
            with tarfile.open(folder / f"{k}.tar", "w") as tar:
                for name, data in [("a.png", encode(k)), ("a.json", json.dumps(fact).encode())]:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    columns = {"label": "json.label", "caption": "json.text"}
    dataset = open_at(f"file://{folder}", tmp_path, columns=columns)
    firsts = dataset.starts[:-1].tolist()
    assert dataset.label_names == ("3", "5")
    assert [dataset.label(k) for k in firsts] == [0, None, 1, None]
    assert [dataset.text(k) for k in firsts] == ["a", "b", None, None]
    assert dataset.count_unlabelled() == len(dataset) // 2


@pytest.mark.parametrize(
    "content",
    ["", "{junk", "[]", "{}", {"counts": [1]}, {"counts": [-1] * 4}, {"checksums": [2**40] * 4},
     {"columns": {"image": 3}}, {"label_names": [None]}],
)  # fmt: skip
def test_a_damaged_index_is_made_again(content, tmp_path):
    address = write_parquet(tmp_path / "set")
    before = open_at(address, tmp_path).index
    (path,) = (tmp_path / "cache").glob("index-*.json")
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    again = open_at(address, tmp_path)
    assert again.index.fingerprint == before.fingerprint
    assert again.index.columns == before.columns
    check_epoch(again)
