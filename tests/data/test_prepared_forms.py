"""The forms of a prepared folder: lossless ones are the raw one, lossy ones say what they are."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from helpers.image_files import PICTURE, write_folder
from helpers.runs import assert_same_tensors, small, weights
from mezzotint.cli import run_command
from mezzotint.data.audit import audit_images
from mezzotint.data.bucketed_dataset import BucketedDataset
from mezzotint.data.content import read_content
from mezzotint.data.image_dataset import open_images, open_source
from mezzotint.data.prepare import prepare_source
from mezzotint.data.prepared_forms import FORMS, get_form
from mezzotint.evaluate.image_source import open_image_source
from mezzotint.tools.describe_data import describe_data
from mezzotint.train.loop import train

SIZE = 32


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """24 pieces of a smooth picture in two classes, some with captions."""
    files: dict[str, bytes | str] = {}
    for i in range(24):
        name = f"{'ab'[i % 2]}/{i:02d}"
        piece = PICTURE.crop((i, 0, i + 40, 44))
        files[f"{name}.png"] = FORMS["webp-lossless"].encode(
            np.asarray(piece).transpose(2, 0, 1).copy()
        )
        if i < 5:
            files[f"{name}.txt"] = f"piece {i}"
    return write_folder(tmp_path_factory.mktemp("forms") / "source", files)


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    """The folder of each form."""
    parent = tmp_path_factory.mktemp("prepared")
    for form in FORMS:
        prepare_source(source, parent / form, SIZE, form=form, progress=False)
    return {form: parent / form for form in FORMS}


def content_of(images) -> str:
    return read_content(images, captions=True).fingerprint


def stored_bytes(folder) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.arrow"))


def test_a_lossless_form_is_the_raw_one(prepared):
    raw, webp = (open_images(prepared[form]) for form in ("raw", "webp-lossless"))
    assert stored_bytes(prepared["webp-lossless"]) < 0.8 * stored_bytes(prepared["raw"])
    every = range(len(raw))
    for a, b in zip(raw.batch(every), webp.batch(every), strict=True):
        assert torch.equal(a, b)
    assert raw.fingerprint == webp.fingerprint
    assert content_of(raw) == content_of(webp)
    assert audit_images(raw) == audit_images(webp)
    assert [raw.text(i) for i in every] == [webp.text(i) for i in every]
    assert raw.text(0) == "piece 0"
    assert raw.report.notes == webp.report.notes == ()


@pytest.mark.parametrize("form", ["webp-lossless", "jpeg-95"])
def test_splits_labels_and_buckets_are_those_of_the_raw_form(prepared, form):
    raw, other = (open_images(f"{prepared[name]}:test") for name in ("raw", form))
    assert len(raw) == len(other) == 2
    assert [raw.name(i) for i in range(2)] == [other.name(i) for i in range(2)]
    assert [raw.label(i) for i in range(2)] == [other.label(i) for i in range(2)]
    shapes = ((16, 16), (12, 20))
    a, b = (BucketedDataset(open_source(str(prepared[n]), None)[0], shapes) for n in ("raw", form))
    assert a.bucket_counts() == b.bucket_counts()
    difference = (a.image(3).float() - b.image(3).float()).abs().max()
    assert difference == 0 if FORMS[form].is_lossless else 0 < difference < 40


def test_a_lossy_form_is_close_smaller_and_named_where_numbers_are_shown(prepared):
    raw, jpeg = (open_images(prepared[form]) for form in ("raw", "jpeg-95"))
    every = range(len(raw))
    error = (raw.batch(every)[0].float() - jpeg.batch(every)[0].float()).square().mean().item()
    assert 0 < error < 255**2 / 10 ** (35 / 10)  # 35 dB
    assert stored_bytes(prepared["jpeg-95"]) < 0.8 * stored_bytes(prepared["raw"])
    assert raw.fingerprint != jpeg.fingerprint
    assert content_of(raw) != content_of(jpeg)
    # The stored bytes identify it, not pixels, which another decoder may round otherwise.
    assert jpeg.checksum(0) != raw.checksum(0)
    assert sum(jpeg.inventory()[1]) < stored_bytes(prepared["jpeg-95"])
    (note,) = jpeg.report.notes
    assert "JPEG of quality 95" in note
    assert json.loads((prepared["jpeg-95"] / "mezzotint.json").read_text())["form"] == "jpeg-95"
    assert describe_data(jpeg)["kind"] == "folder of mezzotint prepare, form jpeg-95"
    metadata = open_image_source(prepared["jpeg-95"]).metadata
    assert metadata["preprocessing"].endswith("stored as jpeg-95")
    assert "stored" not in open_image_source(prepared["webp-lossless"]).metadata["preprocessing"]


@pytest.mark.parametrize("form", FORMS)
def test_grey_images(source, tmp_path, form):
    prepare_source(source, tmp_path / "out", 16, channels=1, form=form, progress=False)
    pixels = open_images(tmp_path / "out", channels=1).image(3)
    expected = open_images(source, size=16, channels=1).image(3)
    assert pixels.shape == (1, 16, 16)
    difference = (pixels.float() - expected.float()).abs().max()
    assert difference == 0 if FORMS[form].is_lossless else difference < 40


def test_another_library_reads_the_files(prepared):
    import datasets

    rows = datasets.load_from_disk(str(prepared["webp-lossless"]))
    rows = rows.rename_column("pixels", "image").cast_column("image", datasets.Image())
    raw = open_images(prepared["raw"])
    pixels = np.asarray(rows[7]["image"]).transpose(2, 0, 1)
    assert np.array_equal(pixels, raw.image(7).numpy())


@pytest.mark.parametrize("form", ["webp-lossless", "jpeg-95"])
def test_a_damaged_image_is_replaced_and_named(prepared, tmp_path, form):
    """Its bytes become zeros in the file, whose table stays whole."""
    source = open_images(prepared[form]).source
    first = source._stored(4).tobytes()
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in prepared[form].iterdir():
        content = path.read_bytes()
        assert content.count(first) == (path.suffix == ".arrow")
        (folder / path.name).write_bytes(content.replace(first, bytes(len(first))))
    images = open_images(folder)
    pixels, _ = images.batch([3, 4])
    assert torch.equal(pixels[1], images.image(5))
    assert list(images.report.unreadable) == [images.name(4)]


def test_a_table_whose_rows_reach_beyond_their_bytes_is_refused(prepared, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for path in prepared["webp-lossless"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    arrow = folder / "data-00000.arrow"
    with pa.ipc.open_stream(arrow) as reader:
        table = reader.read_all()
    ends = np.frombuffer(table.column("pixels").chunks[0].buffers()[1], np.int32)[: len(table) + 1]
    content, odd = arrow.read_bytes(), ends.copy()
    odd[-1] += 1_000_000
    assert content.count(ends.tobytes()) == 1
    arrow.write_bytes(content.replace(ends.tobytes(), odd.tobytes()))
    with pytest.raises(ValueError, match="is damaged: rows reach beyond their bytes; prepare it"):
        open_images(folder)


def test_images_of_another_size_than_the_card_says_are_refused(prepared, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for path in prepared["jpeg-95"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    card = json.loads((folder / "mezzotint.json").read_text())
    for facts, words in [
        ({"size": 16}, "its card has another size"),
        ({"form": "gif"}, "unknown form 'gif'"),
        ({"form": "raw"}, "its card has another size"),
        ({"form": 5}, "form"),
    ]:
        (folder / "mezzotint.json").write_text(json.dumps({**card, **facts}))
        with pytest.raises(ValueError, match=words):
            open_images(folder)


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_lossless_form_bit_for_bit(tmp_path):
    for form in ("raw", "webp-lossless"):
        prepare_source("shapes:count=40", tmp_path / form, 8, form=form, progress=False)
    fields = ["model.channels=3", "images=32", "samples.count=0", "save.every_images=16"]
    raw, webp = (f"data.source={tmp_path / form}" for form in ("raw", "webp-lossless"))
    train(small(raw, *fields), tmp_path / "whole", quiet=True)
    train(small(raw, *fields, "images=16"), tmp_path / "moved", quiet=True)
    train(small(webp, *fields), tmp_path / "moved", quiet=True)
    assert_same_tensors(weights(tmp_path / "whole"), weights(tmp_path / "moved"))


def test_the_command(source, tmp_path, capsys):
    run_command("prepare", str(source), str(tmp_path / "out"), "--size", "16", "--form", "jpeg-95")
    assert "JPEG of quality 95" in str(open_images(tmp_path / "out").report)
    with pytest.raises(ValueError, match=r"--form jpeg-95 stores images, --codec taesd latents"):
        run_command(
            *("prepare", str(source), str(tmp_path / "no"), "--size", "16"),
            *("--form", "jpeg-95", "--codec", "taesd"),
        )
    assert not (tmp_path / "no").exists()
    with pytest.raises(ValueError, match=r"unknown form 'webp'.*webp-lossless"):
        get_form("webp")


def test_raw_pixels_are_views_and_compressed_ones_pillow_images(prepared):
    raw = open_images(prepared["raw"]).source.read(0)
    assert isinstance(raw, np.ndarray)
    assert not raw.flags.owndata
    assert isinstance(open_images(prepared["jpeg-95"]).source.read(0), Image.Image)
