"""Tars whose samples are unlike each other: each is a row, whatever it lacks or adds."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from mezzotint.data.shard_cache import EmptyShardError, UnreadableShardError, write_arrow
from mezzotint.data.tar_rows import read_tar_rows


def encode(format_name: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file, format_name)
    return file.getvalue()


IMAGE = encode()


def write_tar(path: Path, samples: list[dict[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for k, sample in enumerate(samples):
            for field, data in sample.items():
                info = tarfile.TarInfo(f"{k:04d}.{field}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def read_all(path: Path) -> list[dict]:
    _, tables = read_tar_rows(path, 4)
    return [row for table in tables for row in table.to_pylist()]


FIRST = {"label": 1, "text": "a", "score": 2, "tags": ["x"], "more": {"a": 1}}


@pytest.mark.parametrize(
    ("odd", "wanted"),
    [
        (FIRST | {"text": None}, FIRST | {"text": None}),
        ({"label": 2}, dict.fromkeys(FIRST) | {"label": 2}),
        (dict(reversed(FIRST.items())), FIRST),
        (FIRST | {"score": 2.5}, FIRST | {"score": 2.5}),
        (FIRST | {"score": 2**70}, FIRST | {"score": float(2**70)}),
        (FIRST | {"tags": []}, FIRST | {"tags": []}),
        (FIRST | {"more": {}}, FIRST | {"more": {"a": None}}),
        (FIRST | {"label": "cat"}, FIRST | {"label": "cat"}),
        (FIRST | {"more": "none"}, FIRST | {"more": "none"}),
        (FIRST | {"text": "\ud800"}, FIRST | {"text": "?"}),
    ],
)
@pytest.mark.parametrize("place", [0, 3, 8])
def test_json_of_another_form_in_one_sample(odd, wanted, place, tmp_path):
    facts = [odd if k == place else FIRST for k in range(9)]
    samples = [{"png": IMAGE, "json": json.dumps(fact).encode()} for fact in facts]
    rows = read_all(write_tar(tmp_path / "a.tar", samples))
    assert [row["png"]["bytes"] for row in rows] == [IMAGE] * 9
    assert rows[place]["json"] == wanted
    assert rows[4]["json"]["text"] == "a"


@pytest.mark.parametrize("place", [0, 3, 8])
def test_fields_that_a_sample_lacks_or_adds(place, tmp_path):
    usual = {"png": IMAGE, "cls": b"dog"}
    for odd, rows_wanted in [
        ({"png": IMAGE}, 9),
        ({"cls": b"dog", "png": IMAGE, "txt": b"more"}, 9),
        ({"txt": b"about this set"}, 8),
        ({"jpg": encode("JPEG"), "cls": b"dog"}, 9),
    ]:
        samples = [odd if k == place else usual for k in range(9)]
        rows = read_all(write_tar(tmp_path / "a.tar", samples))
        assert len(rows) == rows_wanted
        assert all(row["cls"] == "dog" for k, row in enumerate(rows) if k != place)


def test_a_pickle_is_no_reason_to_refuse_a_tar_and_is_not_read(tmp_path):
    trap = b"cos\nmkdir\n(S'" + str(tmp_path / "trap").encode() + b"'\ntR."
    sample = {"png": IMAGE, "pth": trap, "pkl": trap, "pyd": trap, "npy": b"junk"}
    assert len(read_all(write_tar(tmp_path / "a.tar", [sample] * 3))) == 3
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("num_bytes", [700, 1500, 5000, 5120 + 300])
def test_a_cut_tar_is_unreadable(num_bytes, tmp_path):
    path = write_tar(tmp_path / "a.tar", [{"png": IMAGE, "cls": b"1"}] * 9)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(UnreadableShardError):
        write_arrow(path, "webdataset", tmp_path / "rows")


@pytest.mark.parametrize("samples", [[], [{"txt": b"a"}, {}]])
def test_a_tar_without_images(samples, tmp_path):
    path = write_tar(tmp_path / "a.tar", samples)
    if samples:
        assert [row["txt"] for row in read_all(path)] == ["a"]
    else:
        with pytest.raises(EmptyShardError):
            write_arrow(path, "webdataset", tmp_path / "rows")


def test_a_compressed_tar(tmp_path):
    assert len(read_all(write_tar(tmp_path / "a.tar", [{"png": IMAGE}] * 3, "w:gz"))) == 3
