"""Shards are read by several threads at once."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.utils import tqdm as datasets_tqdm
from tqdm.contrib.concurrent import ensure_lock
from tqdm.std import tqdm

from mezzotint.data.shard_cache import write_arrow


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
