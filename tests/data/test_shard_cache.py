"""Shards are read by several threads at once, and fetched again where the disk damaged them."""

from __future__ import annotations

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils import tqdm as datasets_tqdm
from tqdm.contrib.concurrent import ensure_lock
from tqdm.std import tqdm

from mezzotint.core.object_store import stat_file
from mezzotint.core.store_errors import StoreError
from mezzotint.data import shard_cache
from mezzotint.data.shard_cache import ShardCache, write_arrow
from mezzotint.data.shard_fetcher import THREADS, ShardFetcher


@pytest.mark.parametrize("bar", [datasets_tqdm, tqdm])
def test_a_thread_of_datasets_leaves_the_lock_of_another(bar, tmp_path, monkeypatch):
    """Else a whole shard is called damaged: type object 'tqdm' has no attribute '_lock'."""
    for owner in (tqdm, datasets_tqdm):
        if "_lock" in vars(owner):
            monkeypatch.delattr(owner, "_lock")
    pq.write_table(pa.table({"label": [1, 2, 3]}), tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.parquet", "parquet", tmp_path / "a.arrow")
    # Another thread ends; one that began with it still uses, and at its end deletes, the lock.
    with ensure_lock(bar):
        pass
    assert bar._lock is not None


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A shard of 20 rows in a cache, in 5 batches of Arrow, and where it lies there."""
    monkeypatch.setattr(shard_cache, "BATCH_ROWS", 4)
    table = pa.table({"label": range(20), "text": [f"no. {i}" for i in range(20)]})
    pq.write_table(table, tmp_path / "a.parquet")
    shard = stat_file(f"file://{tmp_path}/a.parquet")
    assert shard is not None
    cache = ShardCache(tmp_path / "cache", 10**8)
    assert len(cache.open(shard, "parquet")) == 20
    return cache, shard, cache.path(shard, "parquet")


def ends_of_batches(data: bytes) -> list[int]:
    """Return the lengths at which a stream of Arrow ends between two of its messages."""
    stream = pa.BufferReader(data)
    return [stream.tell() for _ in pa.ipc.MessageReader.open_stream(stream)]


@pytest.mark.parametrize("where", ["anywhere", "between batches"])
def test_a_shard_that_is_cut_on_the_disk_is_fetched_again(cached, where):
    cache, shard, path = cached
    data = path.read_bytes()
    ends = ends_of_batches(data)
    assert len(ends) == 6  # of the columns, then of the batches
    lengths = {*range(0, len(data), 23), len(data) - 9, len(data) - 1} - {*ends}
    for length in ends if where == "between batches" else sorted(lengths):
        path.unlink()  # its rows may still be mapped
        path.write_bytes(data[:length])
        rows = cache.open(shard, "parquet")
        assert rows["label"][:] == list(range(20)), length
        assert rows["text"][19] == "no. 19"
        assert path.read_bytes() == data


def test_an_error_of_the_disk_is_no_damage_of_a_shard(cached, monkeypatch):
    cache, shard, path = cached

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard_cache, "_map_rows", fail)
    with pytest.raises(OSError, match="Input/output error"):
        cache.open(shard, "parquet")
    assert path.is_file()


@pytest.mark.parametrize("error", [StoreError, ValueError, RuntimeError, OSError, KeyError])
def test_shards_are_fetched_ahead_after_errors_of_any_type(error):
    """Each would end one of the threads."""
    asked, done = [], threading.Event()

    def fetch(shard):
        asked.append(shard)
        if len(asked) == 3 * THREADS:
            done.set()
        raise error("credentials ended")

    fetcher = ShardFetcher(fetch, 8)
    for block in range(3):
        fetcher.fetch(
            (block, 0, 0), lambda block: range(THREADS * block[0], THREADS * block[0] + 4)
        )
    assert done.wait(30)
    assert sorted(asked) == list(range(3 * THREADS))
