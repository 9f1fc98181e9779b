"""Pickles that would keep a reader busy for ever are refused from their operations alone."""

from __future__ import annotations

import io
import pickle
import time
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

import mezzotint as mz
from helpers.pickles import BUSY, CALL, as_legacy, as_zip
from mezzotint.core.pickle_scan import EXPANDED_LIMIT, scan_pickle
from mezzotint.evaluate.safe_pickle import load_arrays

SHARED = b"\x80\x02]" + b"q\x01]h\x01ah\x01a" * 60 + b"."  # of lists, which are not hashed


@pytest.mark.parametrize("name", BUSY)
def test_busy_pickles_are_refused_at_once(name, tmp_path, monkeypatch):
    # Every call costs a thousand times more under the type checks of the tests.
    monkeypatch.setattr("mezzotint.core.pickle_scan.EXPANDED_LIMIT", 1000)
    began = time.process_time()
    with pytest.raises(ValueError, match="goes through more than"):
        scan_pickle(io.BytesIO(BUSY[name]))
    for file, content in {
        "a.pkl": BUSY[name],
        "plain.pth": BUSY[name],
        "zip.pth": as_zip(BUSY[name]),
        "legacy.pth": as_legacy(BUSY[name]),
    }.items():
        (tmp_path / file).write_bytes(content)
        read = load_arrays if file.endswith(".pkl") else mz.load_official
        with pytest.raises(ValueError, match=rf"{file}.*goes through more than") as error:
            read(tmp_path / file)
        assert "\n" not in str(error.value)
    assert time.process_time() - began < 20


ITSELF = b"]q\x00(" + b"h\x00" * 2000 + b"e"  # a list that holds itself many times


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}" + ITSELF + b"K\x01s.",
        b"\x80\x02}(" + ITSELF + b"K\x01" + b"h\x00K\x01" * 500 + b"u.",
        b"\x80\x02(" + ITSELF + b"K\x01" + b"h\x00K\x01" * 500 + b"d.",
        b"\x80\x04\x8f(" + ITSELF + b"h\x00" * 500 + b"\x90.",
        b"\x80\x02" + CALL + b"(" + ITSELF + b"h\x00" * 500 + b"tR.",
        b"\x80\x02" + CALL + b")R" + ITSELF + b"b.",
        b"\x80\x02" + ITSELF + b"0" + b"](" + b"h\x00" * 2000 + b"e\x85Q.",
    ],
    ids=["key", "keys", "pairs", "set", "arguments", "state", "storage"],
)
def test_a_list_that_holds_itself_many_times_takes_no_memory(content, monkeypatch):
    monkeypatch.setattr("mezzotint.core.pickle_scan.EXPANDED_LIMIT", 1000)
    scan_pickle(io.BytesIO(b"\x80\x02N."))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="goes through more than"):
            scan_pickle(io.BytesIO(content))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # all parts of a thousand such lists take 16 MB


@pytest.mark.parametrize("parts", [1, 98, 99, 100, 101, 5000])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_values_are_counted_up_to_the_limit(parts, depth, monkeypatch):
    monkeypatch.setattr("mezzotint.core.pickle_scan.EXPANDED_LIMIT", 100)
    content = b"](" + b"N" * parts + b"e"
    for _ in range(depth - 1):
        content = b"](" + content + b"q\x00" + b"h\x00" * (parts - 1) + b"e"
    count = sum(parts**k for k in range(depth + 1))
    assert scan_pickle(io.BytesIO(b"\x80\x02" + content + b".")) == min(count, 101)


def test_shared_lists_are_refused_where_they_are_written_out(tmp_path):
    assert scan_pickle(io.BytesIO(SHARED)) == EXPANDED_LIMIT + 1
    (tmp_path / "a.pkl").write_bytes(SHARED)
    with pytest.raises(ValueError, match=r"a\.pkl.*more than 100,000 values"):
        load_arrays(tmp_path / "a.pkl")
    (tmp_path / "a.pth").write_bytes(as_zip(SHARED))
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        mz.load_official(tmp_path / "a.pth")


def test_many_large_arguments_are_refused(monkeypatch):
    monkeypatch.setattr("mezzotint.core.pickle_scan.VISITS_LIMIT", 10_000)
    large = b"(" + b"K\x01" * 900 + b"tq\x01"
    with pytest.raises(ValueError, match="keys and calls go through more than"):
        scan_pickle(io.BytesIO(b"\x80\x02" + large + b"]" + b"}h\x01K\x01sa" * 30 + b"."))


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02", b"\x80\x02)", b"s.", b"\x80\x02h\x07.", b"\xff"]
)
def test_damaged_pickles(content):
    with pytest.raises(ValueError):
        scan_pickle(io.BytesIO(content))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ordinary_pickles_pass(protocol):
    array = np.arange(3.0)
    for value in (
        {"a": [1, 2.5, (None, True)], "b": {"x", 3}, (1, (2, 3)): frozenset([1])},
        [array, array, np.float64(2)],
        OrderedDict(a=b"x", b=bytearray(b"y"), c=10**50),
        torch.float32,
    ):
        stream = io.BytesIO(pickle.dumps(value, protocol) + b"rest")
        assert 0 < scan_pickle(stream) < 100
        assert stream.read() == b"rest"


def test_a_zip_with_two_members_of_one_name_is_refused(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", pickle.dumps({}))
    (tmp_path / "a.pth").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="same name"):
        mz.load_official(tmp_path / "a.pth")
