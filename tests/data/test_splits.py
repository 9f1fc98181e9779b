"""Folders of splits under any usual name are never trained on as classes."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.image_files import png, write_folder, write_tar, write_zip
from mezzotint.data.image_dataset import open_images
from mezzotint.data.splits import choose_split, find_splits, match_split, split_kinds


def names_of(images):
    return [images.name(i) for i in range(len(images))]


def tree(*folders: str, classes: tuple[str, ...] = ("ant", "bee"), per_class: int = 2):
    """Return small image files FOLDER/CLASS/NUMBER.png."""
    return {
        f"{folder}/{name}/{i}.png": png(i + 10 * k + 100 * j)
        for j, folder in enumerate(folders)
        for k, name in enumerate(classes)
        for i in range(per_class)
    }


LAYOUTS = [
    ("train", "test"),
    ("train", "val"),
    ("Training", "Testing"),
    ("Train", "Test", "Valid"),
    ("train", "dev"),
    ("train", "test", "unlabeled"),
    ("train", "test", "extra"),
    ("train", "unsupervised"),
    ("seg_train", "seg_test", "seg_pred"),
    ("TRAIN", "VALIDATION"),
    ("trn", "tst"),
    ("train", "holdout"),
    ("train_set", "eval_set"),
    ("Train Set", "Test Set"),
    ("images_train", "images_val"),
    ("01_train", "02_valid"),
    ("train2017", "val2017"),
    ("trainset", "testset"),
    ("TrainImages", "TestImages"),
    ("DIV2K_train_HR", "DIV2K_valid_HR"),
    ("bounding_box_train", "bounding_box_test", "gt_bbox"),
    ("train", "test", "sample_pictures"),
    ("train", "train_extra", "val"),
]


@pytest.mark.parametrize(
    ("form", "folders"),
    [("folder", f) for f in LAYOUTS] + [(f, LAYOUTS[2]) for f in ("zip", "tar", "tgz")],
)
def test_splits_are_named_and_each_way_of_choosing_one_works(tmp_path, monkeypatch, folders, form):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    files = tree(*folders)
    path = tmp_path / ("data" if form == "folder" else f"data.{form}")
    writers = {"folder": write_folder, "zip": write_zip, "tar": write_tar}
    if form == "tgz":
        write_tar(path, files, "w:gz")
    else:
        writers[form](path, files)
    with pytest.raises(ValueError, match=f"holds the splits .*{folders[0]}") as refused:
        open_images(path, size=8)
    for folder in folders:
        assert folder in str(refused.value)
    advised = str(refused.value).split("e.g. ")[1].split(", or ")
    truth = open_images(write_folder(tmp_path / "truth", tree(folders[0])) / folders[0], size=8)
    for source in (*advised[:1], f"{path}:{folders[0]}", f"{path}/{folders[0]}"):
        images = open_images(source, size=8)
        assert images.label_names == ("ant", "bee")
        if source.endswith(folders[0]):
            assert len(images) == 4
            assert torch.equal(images.batch(range(4))[0], truth.batch(range(4))[0])
            assert [images.label(i) for i in range(4)] == [0, 0, 1, 1]
    everything = open_images(advised[1], size=8)
    assert len(everything) == 4 * len(folders)
    assert everything.label_names == ("ant", "bee")
    with pytest.raises(ValueError, match="has no split 'nonsense'; it has"):
        open_images(f"{path}:nonsense", size=8)


def test_a_split_by_colon_and_by_slash_is_one_dataset(tmp_path):
    folder = write_folder(tmp_path / "data", tree("train", "val") | {"val/bee/9.png": png(9)})
    by_colon, by_slash = (open_images(f"{folder}{s}", size=8) for s in (":train", "/train"))
    assert by_colon.fingerprint == by_slash.fingerprint
    assert by_colon.fingerprint != open_images(f"{folder}:val", size=8).fingerprint
    bundle = write_zip(tmp_path / "data.zip", tree("train", "val"))
    by_colon, by_slash = (open_images(f"{bundle}{s}", size=8) for s in (":train", "/train"))
    assert by_colon.fingerprint == by_slash.fingerprint


@pytest.mark.parametrize("prefix", ["dataset", "archive/dataset", "my train data"])
def test_splits_below_one_folder(tmp_path, prefix):
    bundle = write_zip(tmp_path / "a.zip", tree(f"{prefix}/Training", f"{prefix}/Testing"))
    for source in (f"{bundle}:Training", f"{bundle}:train", f"{bundle}/{prefix}/Training"):
        images = open_images(source, size=8)
        assert (len(images), images.label_names) == (4, ("ant", "bee"))
    assert names_of(open_images(f"{bundle}/Testing", size=8))[0] == f"{prefix}/Testing/ant/0.png"


def test_a_split_that_repeats_its_own_folder(tmp_path):
    root = write_folder(tmp_path, tree("seg_train/seg_train", "seg_test/seg_test", "seg_pred"))
    images = open_images(f"{root}:seg_train", size=8)
    assert images.label_names == ("ant", "bee")
    assert len(images) == 4


def test_splits_below_every_class(tmp_path):
    files = tree("bottle", "cable", classes=("train/good", "test/good", "test/broken"))
    root = write_folder(tmp_path / "data", files)
    with pytest.raises(ValueError, match="holds the splits test, train"):
        open_images(root, size=8)
    images = open_images(f"{root}:train", size=8)
    assert (len(images), images.label_names) == (4, ("bottle", "cable"))
    assert len(open_images(f"{root}:test", size=8)) == 8


@pytest.mark.parametrize(
    ("classes", "images"),
    [
        (("car", "train", "bus"), 6),
        (("Train", "Plane"), 4),
        (("train_station", "test_tube"), 4),
        (("extra", "regular"), 4),
        (("trainA", "trainB"), 4),
        (("val", "ant"), 4),
    ],
)
def test_classes_that_are_named_like_a_split_stay_classes(tmp_path, classes, images):
    files = {f"{name}/{i}.png": png(i) for name in classes for i in range(2)}
    opened = open_images(write_folder(tmp_path, files), size=8)
    assert opened.label_names == tuple(sorted(classes))
    assert len(opened) == images


@pytest.mark.parametrize("outer", [("fold1", "fold2"), ("lern", "pruef"), ("day", "night")])
def test_classes_that_hold_the_same_folders_are_said(tmp_path, outer):
    same = {f"{name}/{c}/0.png": png(1) for name in outer for c in ("ant", "bee")}
    opened = open_images(write_folder(tmp_path / "a", same), size=8)
    assert opened.label_names == outer
    assert f"({outer[0]}, ...) that all hold the folders ant, bee" in " ".join(opened.report.notes)
    other = {f"{name}/{name}{c}/0.png": png(1) for name in outer for c in ("ant", "bee")}
    assert not open_images(write_folder(tmp_path / "b", other), size=8).report.notes


def test_one_folder_of_class_folders_beside_a_flat_one(tmp_path):
    files = tree("Training") | {f"to_classify/{i}.png": png(i) for i in range(3)}
    with pytest.raises(ValueError, match="holds the splits Training, to_classify"):
        open_images(write_folder(tmp_path, files), size=8)
    assert len(open_images(f"{tmp_path}:to_classify", size=8)) == 3
    assert open_images(f"{tmp_path}:train", size=8).label_names == ("ant", "bee")


def test_flat_splits_and_stray_images(tmp_path):
    files = {f"{s}/{i}.png": png(i) for s in ("trainA", "trainB", "testA", "testB") for i in (0, 1)}
    root = write_folder(tmp_path, {**files, "cover.png": png(9)})
    images = open_images(f"{root}:trainB", size=8)
    assert names_of(images) == ["trainB/0.png", "trainB/1.png"]
    assert images.label_names is None
    assert "1 images beside the folders of the splits were left out" in str(images.report)
    with pytest.raises(ValueError, match="has no split 'train'; it has testA, testB, trainA"):
        open_images(f"{root}:train", size=8)  # two of them are training images


def test_a_split_that_a_kind_names(tmp_path):
    root = write_folder(tmp_path / "data", tree("Training", "Validation"))
    for source in (f"{root}:train", f"{root}/train", f"{root}:TRAINING"):
        assert names_of(open_images(source, size=8))[0] == "Training/ant/0.png"
    assert names_of(open_images(f"{root}:val", size=8))[0] == "Validation/ant/0.png"
    with pytest.raises(ValueError, match="no split 'test'; it has Training, Validation"):
        open_images(f"{root}:test", size=8)
    with pytest.raises(ValueError, match="there is no file or folder"):
        open_images(f"{root}/nowhere", size=8)


def rows_of(*names: str) -> bytes:
    """Return a parquet file of images with a label."""
    buffer = io.BytesIO()
    images = [png(ord(name[0])) for name in names]
    pq.write_table(pa.table({"image": images, "label": [*names]}), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "files",
    [
        tree("ant", "bee", classes=("",)),
        tree("ant", "bee"),
        {"0.png": png(0), "1.png": png(1)},
        {"train-00000-of-00001.parquet": rows_of("ant", "bee")},
        {"validation.parquet": rows_of("ant", "bee")},
    ],
    ids=["classes", "classes of folders", "no folders", "rows", "rows for validation"],
)
@pytest.mark.parametrize("name", ["train", "test", "val", "Training"])
def test_a_split_of_a_folder_without_splits_is_no_data(tmp_path, name, files):
    root = write_folder(tmp_path / "data", files)
    with pytest.raises(ValueError, match=rf"no data at .*data/{name}': there is no file or folder"):
        open_images(f"{root}/{name}", size=8)


def saved_rows(root):
    """Write splits as `datasets` saves them."""
    import datasets

    splits = {
        split: datasets.Dataset.from_dict({"image": [{"bytes": png(k), "path": None}]})
        for k, split in enumerate(("train", "validation"))
    }
    datasets.DatasetDict(splits).save_to_disk(str(root))


@pytest.mark.parametrize("form", ["images", "rows", "saved rows"])
@pytest.mark.parametrize("name", ["val", "dev", "VALID"])
def test_a_missing_folder_names_a_split_of_a_folder_with_splits(tmp_path, monkeypatch, name, form):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "data"
    if form == "saved rows":
        saved_rows(root)
    elif form == "rows":
        write_folder(root, {"train.parquet": rows_of("ant"), "validation.parquet": rows_of("bee")})
    else:
        write_folder(root, {"train/0.png": png(0), "validation/1.png": png(1)})
    by_slash, truth = (open_images(f"{root}{s}", size=8) for s in (f"/{name}", ":validation"))
    assert torch.equal(by_slash.batch([0])[0], truth.batch([0])[0])
    assert len(by_slash) == 1
    assert not torch.equal(by_slash.image(0), open_images(f"{root}:train", size=8).image(0))


def test_folders_in_archives(tmp_path):
    bundle = write_zip(tmp_path / "a.zip", tree("x", "y"))
    assert open_images(bundle, size=8).label_names == ("x", "y")
    assert open_images(f"{bundle}/x", size=8).label_names == ("ant", "bee")
    assert names_of(open_images(f"{bundle}/x/ant", size=8)) == ["x/ant/0.png", "x/ant/1.png"]
    assert len(open_images(f"{bundle}/x:train", size=8)) == 4
    with pytest.raises(ValueError, match=r"a\.zip has no split 'z'"):
        open_images(f"{bundle}/z", size=8)


def test_names_of_splits():
    kinds = split_kinds(["train", "Validation_set", "seg_test", "testimony", "restrain", "x_val"])
    assert kinds == {"train": "train", "Validation_set": "validation", "seg_test": "test",
                     "x_val": "validation"}  # fmt: skip
    assert match_split("dev", ["train", "validation"]) == "validation"
    assert match_split("train", ["train", "train_extra"]) == "train"
    assert match_split("training", ["trainA", "trainB"]) is None
    assert choose_split("data", {"test": 1, "train": 2}, "TRAIN") == "train"
    assert find_splits(["a/0.png", "b/0.png"], "") == {}
