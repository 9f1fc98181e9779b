"""Every kind of source with labels and captions; bad input is an error or a named gap."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.core.rng import Draws
from mezzotint.data import image_dataset as images_module
from mezzotint.data.image_dataset import open_images
from mezzotint.data.transforms import draw_flips


def png(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


CLASSES = {f"{name}/{i}.png": png(i) for name in ("cat", "dog", "ürgüp 猫") for i in range(4)}


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Where `datasets` may write."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def test_a_folder_and_its_zip_are_the_same_dataset(tmp_path):
    folder = open_images(write(tmp_path / "set", CLASSES), size=8)
    bundle = open_images(zipped(tmp_path / "set.zip", CLASSES), size=8)
    nested = open_images(
        zipped(tmp_path / "n.zip", {f"top/set/{name}": data for name, data in CLASSES.items()}),
        size=8,
    )
    assert (
        folder.label_names == bundle.label_names == nested.label_names == ("cat", "dog", "ürgüp 猫")
    )
    for other in (bundle, nested):
        for x, y in zip(folder.batch(range(12)), other.batch(range(12)), strict=True):
            assert torch.equal(x, y)
    assert [folder.label(i) for i in (0, 4, 11)] == [0, 1, 2]
    assert folder.image(0).dtype == torch.uint8


def test_a_flat_folder_has_no_labels(tmp_path):
    images = open_images(write(tmp_path, {f"{i}.png": png(i) for i in range(3)}), size=8)
    assert images.label_names is None
    assert images.num_classes == 0
    assert images.label(0) is None
    assert images.batch([0, 1])[1] is None


def test_hidden_and_other_files_are_ignored(tmp_path):
    clutter = {
        "Thumbs.db": "x",
        "read me.txt": "x",
        ".DS_Store": "x",
        "._0.png": "x",
        "__MACOSX/0.png": "x",
    }
    files = {**{f"{i}.png": png(i) for i in range(3)}, **clutter}
    bundle = open_images(zipped(tmp_path / "a.zip", files), size=8)
    assert len(bundle) == 3
    assert "2 files that are not images" in str(bundle.report)


def test_images_outside_class_folders_remove_the_labels_with_a_note(tmp_path):
    images = open_images(write(tmp_path, {**CLASSES, "stray.png": png(9)}), size=8)
    assert images.label_names is None
    assert "no labels: 1 images are outside the class folders cat, dog" in str(images.report)


def test_dataset_json_gives_labels_classes_and_the_test_split(tmp_path):
    card = {
        "labels": [["x/1.png", 1], ["x/0.png", 0], ["y.png", 1]],
        "classes": ["even", "odd"],
        "test": ["y.png"],
    }
    files = {
        "x/0.png": png(0),
        "x/1.png": png(1),
        "y.png": png(2),
        "z.png": png(3),
        "dataset.json": json.dumps(card),
    }
    train = open_images(zipped(tmp_path / "a.zip", files), size=8)
    assert [(train.name(i), train.label(i)) for i in range(len(train))] == [
        ("x/0.png", 0),
        ("x/1.png", 1),
    ]
    assert train.label_names == ("even", "odd")
    assert "1 images are not in dataset.json" in str(train.report)
    test = open_images(f"{tmp_path / 'a.zip'}:test", size=8)
    assert [(test.name(i), test.label(i)) for i in range(len(test))] == [("y.png", 1)]
    assert len(open_images(f"{tmp_path / 'a.zip'}:all", size=8)) == 3
    unlabelled = open_images(
        zipped(tmp_path / "b.zip", {**CLASSES, "dataset.json": '{"labels": null}'}), size=8
    )
    assert unlabelled.label_names is None


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"labels": [["nowhere.png", 0]]}, "first 'nowhere.png'"),
        ({"labels": [["a.png", -2]]}, "negative"),
        ({"labels": [["a.png", 0], ["a.png", 1]]}, "twice"),
        ({"labels": [["a.png", 5]], "classes": ["one"]}, "label 5 but only 1 classes"),
        ({"labels": {"a.png": 0}}, "not of the form"),
        ([1, 2], "not of the form"),
    ],
)
def test_a_wrong_dataset_json_is_refused(tmp_path, card, words):
    write(tmp_path, {"a.png": png(0), "dataset.json": json.dumps(card)})
    with pytest.raises(ValueError, match=words):
        open_images(tmp_path, size=8)


def test_every_tenth_image_is_the_default_test_split(tmp_path):
    write(tmp_path, {f"{i:02d}.png": png(i) for i in range(25)})
    train, test, every = (
        open_images(f"{tmp_path}:{split}", size=8) for split in ("train", "test", "all")
    )
    assert [test.name(i) for i in range(len(test))] == ["09.png", "19.png"]
    assert (len(train), len(every), len(open_images(tmp_path, size=8))) == (23, 25, 25)
    assert len({images.fingerprint for images in (train, test, every)}) == 3


def test_captions_from_text_files_and_metadata(tmp_path):
    lines = [
        {"file_name": "1.png", "text": "from metadata"},
        {"file_name": "2.png", "caption": "also"},
    ]
    files = {f"in/{i}.png": png(i) for i in range(4)} | {
        "in/0.txt": "von der Datei: Ä\n",
        "in/1.txt": "overruled",
        "in/metadata.jsonl": "\n".join(map(json.dumps, lines)) + "\n\n",
    }
    for images in (
        open_images(write(tmp_path / "a", files), size=8),
        open_images(zipped(tmp_path / "a.zip", files), size=8),
    ):
        assert [images.text(i) for i in range(4)] == [
            "von der Datei: Ä",
            "from metadata",
            "also",
            None,
        ]
    write(tmp_path / "a", {"in/metadata.jsonl": '{"file_name": "1.png", "text": "x"}\nnonsense'})
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 2 is not of the form"):
        open_images(tmp_path / "a", size=8)


def test_the_fingerprint_changes_with_the_content(tmp_path):
    a = open_images(write(tmp_path / "a", CLASSES), size=8).fingerprint
    assert open_images(write(tmp_path / "elsewhere", CLASSES), size=8).fingerprint == a
    assert open_images(tmp_path / "a", size=16).fingerprint != a
    assert open_images(tmp_path / "a", size=8, crop="plain").fingerprint != a
    write(tmp_path / "a", {"dog/9.png": png(9)})
    assert open_images(tmp_path / "a", size=8).fingerprint != a


def test_keeping_in_memory_changes_nothing_and_has_a_limit(tmp_path, monkeypatch):
    write(tmp_path, CLASSES)
    plain = open_images(tmp_path, size=8, keep_in_memory=False).batch(range(12))[0]
    monkeypatch.setattr(images_module, "MEMORY_LIMIT_BYTES", 5 * 3 * 8 * 8)
    images = open_images(tmp_path, size=8)
    for _ in range(2):
        assert torch.equal(images.batch(range(12))[0], plain)
    for path in sorted(tmp_path.glob("*/*.png")):
        path.unlink()
    assert torch.equal(images.batch(range(5))[0], plain[:5])
    with pytest.raises(ValueError, match="cannot be read: FileNotFoundError"):
        images.image(5)


def test_npz_of_encoded_images_and_of_pixels(tmp_path):
    data = [png(i) for i in range(5)]
    blob = np.frombuffer(b"".join(data), np.uint8)
    offsets = np.cumsum([0, *map(len, data)])
    labels = np.array([1, 0, 1, 0, 1], np.uint8)
    np.savez(
        tmp_path / "a.npz",
        train_blob=blob,
        train_offsets=offsets,
        train_labels=labels,
        classes=["x", "y"],
    )
    images = open_images(tmp_path / "a.npz", size=8)
    truth = open_images(write(tmp_path / "f", {f"{i}.png": d for i, d in enumerate(data)}), size=8)
    assert torch.equal(images.batch(range(5))[0], truth.batch(range(5))[0])
    assert images.label_names == ("x", "y")
    assert images.label(2) == 1
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        open_images(f"{tmp_path / 'a.npz'}:test", size=8)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "b.npz", pixels)
    adm = open_images(tmp_path / "b.npz", size=8)
    assert adm.image(3).permute(1, 2, 0).numpy().tolist() == pixels[3].tolist()
    assert len(open_images(f"{tmp_path / 'b.npz'}:test", size=8)) == 2
    np.savez(tmp_path / "c.npz", pixels.astype(np.float32))
    with pytest.raises(ValueError, match="float32"):
        open_images(tmp_path / "c.npz", size=8)


def test_tables_of_datasets(tmp_path, hub_cache):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets import Image as ImageFeature

    features = Features(
        {"picture": ImageFeature(), "y": ClassLabel(names=["a", "b"]), "caption": Value("string")}
    )
    rows = {
        "picture": [{"bytes": png(i), "path": None} for i in range(20)],
        "y": [i % 2 for i in range(20)],
        "caption": [f"number {i}" for i in range(20)],
    }
    rows["picture"][4] = {"bytes": png(4)[:100], "path": "four.png"}
    dataset = Dataset.from_dict(rows, features=features)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": dataset, "validation": dataset.select(range(3))}).save_to_disk(
        tmp_path / "both"
    )
    found = [open_images(tmp_path / name, size=8) for name in ("a.parquet", "saved", "both")]
    for images in found:
        assert len(images) == 20
        assert images.label_names == ("a", "b")
        assert images.text(7) == "number 7"
        pixels, labels = images.batch(range(20))
        assert labels is not None
        assert labels.tolist() == [
            0,
            1,
            0,
            1,
            1,
            *[i % 2 for i in range(5, 20)],
        ]  # 5 stands in for 4
        assert torch.equal(pixels, found[0].batch(range(20))[0])
        assert list(images.report.unreadable) == ["row 4 (four.png)"] or list(
            images.report.unreadable
        ) == ["row 4"]
    assert len({images.fingerprint for images in found}) == 1
    assert len(open_images(f"{tmp_path / 'both'}:validation", size=8)) == 3
    assert len(open_images(f"{tmp_path / 'both'}:all", size=8)) == 23
    assert [
        len(open_images(f"{tmp_path / 'a.parquet'}:{s}", size=8)) for s in ("train", "test")
    ] == [18, 2]
    with pytest.raises(ValueError, match="no split 'extra'; it has train, validation"):
        open_images(f"{tmp_path / 'both'}:extra", size=8)


def test_tables_with_class_names_or_without_images(tmp_path, hub_cache):
    from datasets import Dataset

    cells = [{"bytes": png(i), "path": None} for i in range(3)]
    Dataset.from_dict({"image": cells, "label": ["dog", None, "cat"]}).to_parquet(
        tmp_path / "a.parquet"
    )
    images = open_images(tmp_path / "a.parquet", size=8)
    assert images.label_names == ("cat", "dog")
    assert [images.label(i) for i in range(3)] == [1, None, 0]
    Dataset.from_dict({"image": [png(i) for i in range(3)], "label": [0, 1, 2]}).to_parquet(
        tmp_path / "c.parquet"
    )
    assert torch.equal(open_images(tmp_path / "c.parquet", size=8).image(1), images.image(1))
    Dataset.from_dict({"x": [1], "y": [2]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="no column of images; columns: x, y"):
        open_images(tmp_path / "b.parquet", size=8)


def test_folders_of_rows_and_tars(tmp_path, hub_cache):
    import tarfile

    from datasets import Dataset

    cells = [{"bytes": png(i), "path": None} for i in range(4)]
    truth = open_images(
        write(tmp_path / "truth", {f"{i}.png": png(i) for i in range(4)}), size=8
    ).batch(range(4))[0]
    for part in ("train", "test"):
        (tmp_path / "rows" / "data").mkdir(parents=True, exist_ok=True)
        rows = Dataset.from_dict({"image": cells if part == "train" else cells[:1]})
        rows.to_parquet(tmp_path / "rows" / "data" / f"{part}-00000-of-00001.parquet")
    assert torch.equal(open_images(tmp_path / "rows", size=8).batch(range(4))[0], truth)
    assert len(open_images(f"{tmp_path / 'rows'}:test", size=8)) == 1
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(4):
            for suffix, content in (
                ("png", png(i)),
                ("cls", str(i % 2).encode()),
                ("txt", f"no. {i}".encode()),
            ):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    images = open_images(tmp_path / "a.tar", size=8)
    assert torch.equal(images.batch(range(4))[0], truth)
    assert [images.label(i) for i in range(4)] == [0, 1, 0, 1]
    assert images.text(2) == "no. 2"
    # A stray archive beside class folders is no data set of rows.
    write(tmp_path / "classes", {**CLASSES, "backup.tar": b"x"})
    assert len(open_images(tmp_path / "classes", size=8)) == 12


def test_one_truncated_jpeg_among_many(tmp_path):
    for i in range(60):
        Image.open(io.BytesIO(png(i, (40, 40)))).save(tmp_path / f"{i:02d}.jpg")
    path = tmp_path / "33.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    images = open_images(tmp_path, size=16)
    assert len(images) == 60
    pixels, _ = images.batch(range(60))
    assert torch.equal(pixels[33], pixels[34])
    assert list(images.report.unreadable) == ["33.jpg"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no files; give a folder or zip of images"),
        ({"a.txt": "x", "b.csv": "y"}, r"holds 2 files, none of them images \(a.txt, b.csv"),
        (
            {"a.png": "not a picture", "b.jpg": "nor this"},
            r"no image of .* can be read.*a.png \(not an image",
        ),
        ({"a.png": b""}, r"a.png \(no bytes\)"),
    ],
)
def test_folders_and_zips_without_images(tmp_path, files, words):
    folder = write(tmp_path / "set", files)
    folder.mkdir(exist_ok=True)
    for source in (folder, zipped(tmp_path / "set.zip", files)):
        with pytest.raises(ValueError, match=words):
            open_images(source, size=8)


def test_other_bad_input_says_what_to_try(tmp_path):
    folder = write(tmp_path / "set", CLASSES)
    for options, words in [
        ({"size": 0}, "size 0; give the side in pixels"),
        ({"size": -4}, "size -4"),
        ({}, "no size of its own; give one in pixels"),
        ({"size": 8, "channels": 4}, "channels 4; allowed: 1"),
        ({"size": 8, "crop": "plane"}, "unknown crop 'plane'; did you mean plain"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_images(folder, **options)
    write(tmp_path, {"broken.zip": "PK no", "one.png": png(0), "broken.npz": "no"})
    for source, words in [
        (tmp_path / "nowhere", "no data at .*nowhere"),
        ("digit", "did you mean digits"),
        (f"{folder}:tset", "no split 'tset'; did you mean test"),
        (tmp_path / "broken.zip", "not a readable zip"),
        (tmp_path / "broken.npz", "not a readable .npz"),
        (tmp_path / "one.png", r"one\.png is a single file"),
        ("nobody-here/nothing", "nobody-here/nothing"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_images(source, size=8)
    with pytest.raises(ValueError, match="image 12 of a dataset of 12"):
        open_images(folder, size=8).image(12)


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = zipped(tmp_path / "a.zip", {f"{i}.png": png(i, (64, 64)) for i in range(5)})
    data = bytearray(path.read_bytes())
    data[data.index(b"2.png") + 3000] ^= 255
    path.write_bytes(data)
    images = open_images(path, size=8)
    images.batch(range(5))
    assert list(images.report.unreadable) == ["2.png"]
    assert "CRC" in images.report.unreadable["2.png"]


def test_real_flowers(shared):
    images = open_images(shared("data/flowers128.zip"), size=64)
    assert len(images) == 3670
    assert images.label_names == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    test = open_images(f"{shared('data/flowers128.zip')}:test", size=64)
    assert test.name(0) == images.name(9)
    assert torch.equal(test.image(0), images.image(9))
    pixels, labels = images.batch(torch.arange(0, 3670, 100))
    assert labels is not None
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert 30 < pixels.float().std() < 90


def test_real_satellite_tiles_keep_their_test_list(shared):
    path = shared("data/eurosat64.zip")
    train, test = open_images(path, size=64), open_images(f"{path}:test", size=64)
    assert (len(train), len(test), train.num_classes) == (24300, 2700, 10)
    assert not {train.name(i) for i in range(len(train))} & {test.name(i) for i in range(len(test))}
    assert test.image(0).shape == (3, 64, 64)


def test_real_photographs_of_mixed_sizes(shared):
    folder = shared("data/photos")
    images = open_images(folder, size=96)
    pixels, _ = images.batch(range(0, len(images), 8))
    assert not images.report.unreadable
    plain, _ = open_images(folder, size=96, crop="plain").batch(range(0, len(images), 8))
    difference = (pixels.float() - plain.float()).abs().mean()
    assert 0 < difference < 12  # two filters, one image


@pytest.mark.parametrize(("seed", "stream"), [(0, "philox4x64"), (1, "philox4x32")])
def test_drawn_image_numbers_are_flipped_left_to_right(tmp_path, seed, stream):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    dataset = open_images(tmp_path, size=8)
    image_numbers = list(range(100, 140))
    inputs, _ = dataset.batch([0] * len(image_numbers))
    draws = Draws(seed, stream)
    x = dataset.to_model(inputs, draws, image_numbers, True, lambda t: t)
    # A random image equals neither its left-right nor its up-down mirror image.
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    flips = draw_flips(draws, image_numbers).tolist()
    assert 8 < sum(flips) < 32
    for row, is_flipped in zip(x, flips, strict=True):
        assert torch.equal(row, image.flip(-1) if is_flipped else image)
    unflipped = dataset.to_model(inputs, draws, image_numbers, False, lambda t: t)
    assert torch.equal(unflipped, image.expand_as(unflipped))
