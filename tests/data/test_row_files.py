"""A folder cloned from the hub is read without naming the folder of its files."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.image_files import png, write_folder, write_tar
from mezzotint.data.image_dataset import open_images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def write_rows(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([png(i) for i in range(count)], pa.binary())
    pq.write_table(pa.table({"image": images, "label": [i % 2 for i in range(count)]}), path)


def clone(root, files):
    write_folder(root, {"README.md": "---\nlicense: mit\n---\n", ".gitattributes": "*.parquet lfs",
                        ".cache/huggingface/download/data/x.metadata": "1"})  # fmt: skip
    for name, count in files.items():
        write_rows(root / name, count)
    return root


TRAIN, TEST = "train-00000-of-00001.parquet", "test-00000-of-00001.parquet"


@pytest.mark.parametrize(
    "files",
    [
        {f"mnist/{TRAIN}": 6, f"mnist/{TEST}": 4},
        {f"data/{TRAIN}": 6, f"data/{TEST}": 4},
        {f"default/plain_text/{TRAIN}": 6, f"default/plain_text/{TEST}": 4},
        {TRAIN: 6, TEST: 4},
        {"default/train/0000.parquet": 6, "default/test/0000.parquet": 4},
        {"train-00000-of-00002-a09b74b3.parquet": 3, "train-00001-of-00002-ef9c3b56.parquet": 3,
         "test.parquet": 4},
        {"Training/part [1].parquet": 6, "Testing/part [1].parquet": 4},
    ],
)  # fmt: skip
def test_a_clone_is_read_by_the_names_of_its_files(tmp_path, files):
    root = clone(tmp_path / "clone", files)
    for source, count in (("", 6), (":train", 6), (":test", 4), ("/train", 6), (":all", 10)):
        if source == "/train" and (root / "train").exists():
            continue
        images = open_images(f"{root}{source}", size=8)
        assert (len(images), images.label_names) == (count, ("0", "1"))
    with pytest.raises(ValueError, match="has no split 'unlabeled'"):
        open_images(f"{root}:unlabeled", size=8)


@pytest.mark.parametrize("name", ["../out/{}", "{root}/out/{}", "link.arrow", "pipe.arrow", "no"])
@pytest.mark.parametrize("of", ["splits", "files"])
def test_a_saved_dataset_names_files_of_its_own_alone(tmp_path, name, of):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [{"bytes": png(i)} for i in range(2)]})
    for folder in ("out", "set/a"):
        rows.save_to_disk(tmp_path / folder)
    (arrow,) = (tmp_path / "out").glob("*.arrow")
    (tmp_path / "set" / "a" / "link.arrow").symlink_to(arrow)
    os.mkfifo(tmp_path / "set" / "a" / "pipe.arrow")
    file = name.format(arrow.name, root=tmp_path)
    whole, split = {"splits": ["a"]}, tmp_path / "set" / "a"
    (tmp_path / "set" / "dataset_dict.json").write_text(json.dumps(whole))
    assert len(open_images(tmp_path / "set:a", size=8)) == 2
    if of == "splits":
        changed = tmp_path / "set" / "dataset_dict.json"
        changed.write_text(json.dumps({"splits": ["a", file.rpartition("/")[0] or file]}))
    else:
        changed = split / "state.json"
        state = json.loads(changed.read_text()) | {"_data_files": [{"filename": file}]}
        changed.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="is no file of the folder"):
        open_images(tmp_path / "set:a", size=8)


def test_other_names_and_several_configurations(tmp_path):
    root = clone(tmp_path / "one", {"shards/0000.parquet": 3, "shards/0001.parquet": 2})
    assert len(open_images(root, size=8)) == 5
    root = clone(tmp_path / "several", {f"{c}/{TRAIN}": 3 for c in ("en", "fr")})
    with pytest.raises(ValueError, match=r"several data sets \(en, fr\); give one.*several/en"):
        open_images(root, size=8)
    assert len(open_images(root / "en", size=8)) == 3


def test_images_beside_tables_are_read_as_files(tmp_path):
    root = clone(tmp_path / "clone", {"extra/rows.parquet": 2})
    write_folder(root, {"ant/0.png": png(0), "bee/1.png": png(1)})
    assert open_images(root, size=8).label_names == ("ant", "bee")


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("missing", [0, 3, 6])
def test_a_sample_of_a_webdataset_may_lack_its_class(tmp_path, missing, in_folder):
    members = {f"{i}.{kind}": content for i in range(8)
               for kind, content in (("cls", "ab"[i % 2]), ("png", png(i)))}  # fmt: skip
    del members[f"{missing}.cls"]
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set" / "train-00000-of-00001.tar", members)
    images = open_images(tmp_path / "set" if in_folder else next(tmp_path.rglob("*.tar")), size=8)
    assert (len(images), images.label_names) == (8, ("a", "b"))
    labels = [images.label(i) for i in range(8)]
    assert labels == [None if i == missing else i % 2 for i in range(8)]
