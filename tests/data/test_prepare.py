"""Prepared folders: what goes in comes out, whole or not at all, with a report; and the audit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.image_files import png, write_folder
from mezzotint.data import prepare as prepare_module
from mezzotint.data.audit import audit_images, describe_audit, list_problems
from mezzotint.data.image_dataset import open_images
from mezzotint.data.prepare import prepare_source


@pytest.fixture
def mixed(tmp_path) -> Path:
    """12 images, several modes and sizes, 2 classes: one duplicate, one damaged, some captions."""
    root = tmp_path / "mixed"
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 255, (20 + 3 * i, 40 - i, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(["RGB", "L", "P", "RGBA", "CMYK"][i % 5])
        image.save(
            root / ("ant" if i < 7 else "bee") / f"é{i}.{'jpg' if image.mode == 'CMYK' else 'png'}"
        )
    (root / "bee" / "twin.png").write_bytes((root / "ant" / "é0.png").read_bytes())
    (root / "bee" / "broken.png").write_bytes((root / "ant" / "é0.png").read_bytes()[:200])
    (root / "ant" / "é0.txt").write_text("one ant")
    return root


def everything(images) -> tuple[torch.Tensor, torch.Tensor]:
    return images.batch(range(len(images)))


def test_prepared_images_equal_their_source(mixed, tmp_path):
    raw = open_images(mixed, size=16)
    report = prepare_source(mixed, tmp_path / "out", 16, progress=False)
    prepared = open_images(tmp_path / "out")
    assert (len(raw), len(prepared), report["images"]) == (12, 11, 11)
    assert prepared.size == 16
    sound = [i for i in range(12) if raw.readable(i) == i]
    for x, y in zip(raw.batch(sound), everything(prepared), strict=True):
        assert torch.equal(x, y)
    assert [prepared.name(i) for i in range(11)] == [raw.name(i) for i in sound]
    assert [prepared.text(i) for i in range(11)] == [raw.text(i) for i in sound]
    assert prepared.text(0) == "one ant"
    assert prepared.label_names == ("ant", "bee")


def test_the_report(mixed, tmp_path):
    report = prepare_source(mixed, tmp_path / "out", 32, progress=False)
    assert json.loads((tmp_path / "out" / "report.json").read_text("utf-8")) == report
    assert report["classes"] == {"ant": 7, "bee": 4}
    assert report["modes"] == {"RGB": 3, "L": 2, "P": 2, "RGBA": 2, "CMYK": 2}
    assert report["original_width"] == {"min": 31, "median": 36, "max": 40}
    assert report["original_height"] == {"min": 20, "median": 32, "max": 47}
    assert (
        report["duplicates"]
        == report["duplicates_with_other_labels"]
        == [["ant/é0.png", "bee/twin.png"]]
    )
    assert report["captions"] == 1
    assert report["upscaled"] == 6
    assert list(report["unreadable"]) == ["bee/broken.png"]
    words = describe_audit(report)
    for part in (
        "11 images",
        "ant 7, bee 4",
        "! 1 unreadable: bee/broken.png (OSError",
        "1 duplicates in 1 groups",
    ):
        assert part in words
    assert "6 images are smaller" in words


def test_audit_equals_the_report_of_prepare(mixed, tmp_path):
    assert audit_images(open_images(mixed, size=32)) == prepare_source(
        mixed, tmp_path / "out", 32, progress=False
    )


def test_problems_of_uneven_classes_but_none_of_a_sound_dataset(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("many", 22), ("few", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(
                tmp_path / name / f"{i}.png"
            )
    assert list_problems(audit_images(open_images(tmp_path, size=8))) == [
        "classes are uneven: many has 22 images, few 2"
    ]
    shutil.rmtree(tmp_path / "many")
    assert list_problems(audit_images(open_images(tmp_path, size=8))) == []


def test_grey_and_plain_are_kept(mixed, tmp_path):
    prepare_source(mixed, tmp_path / "out", 16, channels=1, crop="plain", progress=False)
    prepared = open_images(tmp_path / "out", channels=1)
    assert prepared.image(3).shape == (1, 16, 16)
    assert torch.equal(
        prepared.image(0), open_images(mixed, size=16, channels=1, crop="plain").image(0)
    )
    with pytest.raises(ValueError, match="prepared with crop 'plain', not 'adm'"):
        open_images(tmp_path / "out", channels=1, crop="adm")
    assert open_images(tmp_path / "out", size=8).image(0).shape == (3, 8, 8)


def test_datasets_opens_a_prepared_folder(mixed, tmp_path):
    import datasets

    prepare_source(mixed, tmp_path / "out", 16, progress=False)
    rows = datasets.load_from_disk(str(tmp_path / "out"))
    prepared = open_images(tmp_path / "out")
    assert rows.features["label"].names == ["ant", "bee"]
    assert [row["label"] for row in rows] == [prepared.label(i) for i in range(11)]
    assert rows[5]["pixels"] == prepared.image(5).numpy().tobytes()
    assert rows[0]["text"] == "one ant"


def test_many_shards_and_batches_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 3 * 8 * 8 * 7)
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 3 * 8 * 8 * 20)
    prepare_source("shapes:8,count=100", tmp_path / "out", 8, progress=False)
    assert len(list((tmp_path / "out").glob("data-*.arrow"))) == 5
    for x, y in zip(
        everything(open_images(tmp_path / "out")),
        everything(open_images("shapes:8,count=100")),
        strict=True,
    ):
        assert torch.equal(x, y)
    test = open_images(f"{tmp_path / 'out'}:test")
    assert [test.name(i) for i in range(len(test))] == [f"shape {i}" for i in range(9, 100, 10)]
    assert torch.equal(test.image(2), open_images("shapes:8,count=100").image(29))


def test_a_dataset_without_labels(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.new("RGB", (9, 9), (i, i, i)).save(tmp_path / "in" / f"{i}.png")
    prepare_source(tmp_path / "in", tmp_path / "out", 8, progress=False)
    prepared = open_images(tmp_path / "out")
    assert prepared.label_names is None
    assert prepared.batch([0, 1])[1] is None
    assert prepared.label(0) is None


def test_the_same_content_has_the_same_fingerprint(mixed, tmp_path):
    for name in ("a", "b"):
        prepare_source(mixed, tmp_path / name, 16, progress=False)
    (mixed / "ant" / "é0.txt").write_text("another caption")
    prepare_source(mixed, tmp_path / "c", 16, progress=False)
    a, b, c = (open_images(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("existing", ["file", "folder"])
def test_an_existing_folder_is_never_overwritten(mixed, tmp_path, existing):
    out = tmp_path / "out"
    if existing == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        prepare_source(mixed, out, 16, progress=False)
    assert (out if existing == "file" else out / "mine.txt").read_text() == "mine"
    if existing == "file":
        with pytest.raises(OSError, match="out/below cannot be written: Not a directory"):
            prepare_source(mixed, out / "below", 16, progress=False)


@pytest.mark.parametrize("target", ["empty", "absent"])
def test_a_link_leads_to_the_prepared_folder(mixed, tmp_path, target):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "disk" / target)
    prepare_source(mixed, out, 16, progress=False)
    assert out.is_symlink()
    prepared, images = open_images(tmp_path / "disk" / target), open_images(mixed, size=16)
    assert torch.equal(prepared.image(0), images.image(0))
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"empty", target}


def test_a_disk_is_refused_before_anything_is_prepared(mixed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    monkeypatch.setattr(prepare_module, "_write_images", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=r"out is a disk of its own.* new folder inside it"):
        prepare_source(mixed, out, 16, progress=False)
    assert list(out.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"mixed", "out"}


def test_a_failure_leaves_nothing(mixed, tmp_path, monkeypatch):
    parent = tmp_path / "parent"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module._ArrowWriter, "_flush", full)
        with pytest.raises(OSError, match="No space"):
            prepare_source(mixed, parent / "out", 16, progress=False)
    assert list(parent.iterdir()) == []
    prepare_source(mixed, parent / "out", 16, progress=False)
    assert [path.name for path in parent.iterdir()] == ["out"]


def test_a_killed_prepare_leaves_no_folder_and_the_next_removes_its_files(tmp_path):
    code = f"""
import time
from mezzotint.data import image_dataset, prepare
decode = image_dataset.ImageDataset.decode
image_dataset.ImageDataset.decode = lambda self, i: (time.sleep(0.01), decode(self, i))[1]
prepare.BATCH_BYTES = 3 * 64 * 8
prepare.prepare_source("shapes:8,count=100000", {str(tmp_path / "out")!r}, 8, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    for _ in range(600):
        if any(
            path.stat().st_size > 10_000 for path in tmp_path.glob(".out.*.partial/data-*.arrow")
        ):
            break
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    living = tmp_path / f".out.{socket.gethostname().replace('.', '-')}.{os.getppid()}.partial"
    living.mkdir()
    prepare_source("shapes:8,count=20", tmp_path / "out", 8, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "out",
        living.name,
    }  # a living writer's is not touched
    assert len(open_images(tmp_path / "out")) == 20


def test_damage_to_a_prepared_folder_is_reported(mixed, tmp_path):
    prepare_source(mixed, tmp_path / "out", 16, progress=False)
    for name, damage, words in [
        ("cut", lambda d: os.truncate(d / "data-00000.arrow", 900), "is damaged"),
        ("gone", lambda d: (d / "data-00000.arrow").unlink(), "is damaged"),
        (
            "card",
            lambda d: (d / "mezzotint.json").write_text("{"),
            "mezzotint.json",
        ),
        (
            "new",
            lambda d: (d / "mezzotint.json").write_text('{"format": 9}'),
            "format 9",
        ),
        (
            "half",
            lambda d: (d / "mezzotint.json").write_text('{"format": 1, "size": 16}'),
            "has no 'count'",
        ),
    ]:
        copy = tmp_path / name
        shutil.copytree(tmp_path / "out", copy)
        damage(copy)
        with pytest.raises(ValueError, match=words):
            open_images(copy)


OTHER_FACTS = [
    *({"count": value} for value in ("12", 12.5, True, -11, None)),
    *({"size": value} for value in (8, -16, "16", [16])),
    *({"channels": value} for value in (1, 4, None)),
    *({"label_names": value} for value in (5, "ab", ["a"], [1, 2], {"a": 0})),
    *({"fingerprint": []}, {"left_out": "x"}, {"left_out": [1]}, {"crop": {}}),
]


def test_cards_of_prepared_folders_with_other_values_are_refused(tmp_path):
    write_folder(tmp_path / "set", {f"{c}/{i}.png": png(i) for c in "ab" for i in range(2)})
    prepare_source(tmp_path / "set", tmp_path / "out", 16, progress=False)
    card = tmp_path / "out" / "mezzotint.json"
    sound = json.loads(card.read_text())
    for facts in OTHER_FACTS:
        card.write_text(json.dumps({**sound, **facts}))
        with pytest.raises(ValueError, match=r"(is damaged|damaged or foreign).*prepare"):
            open_images(tmp_path / "out")


def test_real_flowers_prepared_are_those_of_the_zip(shared, tmp_path):
    source = f"{shared('data/flowers128.zip')}:test"
    report = prepare_source(source, tmp_path / "out", 64, progress=False)
    assert report["images"] == 367
    assert report["original_width"] == {"min": 128, "median": 128, "max": 128}
    prepared = open_images(tmp_path / "out")
    assert torch.equal(
        prepared.batch(range(0, 367, 50))[0],
        open_images(source, size=64).batch(range(0, 367, 50))[0],
    )
