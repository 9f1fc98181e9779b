"""White in grey images of more than 8 bits: one value for a dataset."""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.config import Data
from mezzotint.data.audit import describe_audit
from mezzotint.data.bucketed_dataset import BucketedDataset
from mezzotint.data.image_dataset import open_images, open_source
from mezzotint.data.prepare import prepare_source
from mezzotint.data.transforms import to_mode

RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)


def write(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("suffix", "dtype", "largest", "white"),
    [
        ("png", np.uint16, 250, 255),
        ("png", np.uint16, 1000, 1023),
        ("png", np.uint16, 4001, 4095),
        ("tif", np.uint16, 4095, 4095),
        ("tif", np.uint16, 8000, 16383),
        ("png", np.uint16, 65000, 65535),
        ("tif", np.int32, 255, 255),
        ("tif", np.int32, 65535, 65535),
        ("tif", np.int32, 2**31 - 1, 2**31 - 1),
        ("tif", np.float32, 1.0, 1),
        ("tif", np.float32, 1.05, 1),
        ("tif", np.float32, 255.0, 255),
        ("tif", np.float32, 270.0, 255),
        ("tif", np.float32, 4095.0, 4095),
    ],
)
def test_the_full_scale_is_the_smallest_usual_one(tmp_path, suffix, dtype, largest, white):
    bright, dark = (RAMP * largest).astype(dtype), (RAMP * largest / 3).astype(dtype)
    images = open_images(
        write(tmp_path / "a", {f"a.{suffix}": bright, f"b.{suffix}": dark}), size=32
    )
    for i, array in enumerate((bright, dark)):
        truth = np.clip(np.round(array * (255.0 / white)), 0, 255)
        assert np.array_equal(images.image(i)[0], truth.astype(np.uint8))
    (note,) = images.report.notes
    assert f"full scale {white:g} (" in note
    assert f"the largest value of 2 images is {bright.max():g}" in note


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_both_byte_orders(tmp_path, mode):
    values = (RAMP * 4000).astype("<u2" if mode == "I;16" else ">u2")
    image = Image.frombytes(mode, (32, 32), values.tobytes())
    folder = tmp_path / "a"
    folder.mkdir()
    image.save(folder / "a.tif")
    assert open_images(folder, size=32).image(0).max() == 249


def test_unsigned_32_bits(tmp_path):
    (tmp_path / "a").mkdir()
    values = (RAMP * (2**32 - 1)).astype(np.uint32)
    buffer = io.BytesIO()
    Image.fromarray(values.view(np.int32)).save(buffer, "TIFF")
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert buffer.getvalue().count(signed) == 1
    (tmp_path / "a" / "a.tif").write_bytes(buffer.getvalue().replace(signed, unsigned))
    pixels = open_images(tmp_path / "a", size=32).image(0)[0]
    assert np.array_equal(pixels, np.round(RAMP * 255).astype(np.uint8))


def test_each_kind_has_its_own_scale(tmp_path):
    """The four files of one folder that were black, or bright beside a black neighbour."""
    arrays = {
        "a.tif": RAMP.astype(np.float32),
        "b.tif": (RAMP * 1.05).astype(np.float32),
        "c.tif": (RAMP * 255).round().astype(np.int32),
        "d.png": (RAMP * 4095).astype(np.uint16),
        "e.png": (RAMP * 255).astype(np.uint8),
    }
    images = open_images(write(tmp_path / "a", arrays), size=16)
    assert min(int(images.image(i).max()) for i in range(5)) > 245
    assert len(images.report.notes) == 3
    report = prepare_source(tmp_path / "a", tmp_path / "out", 16, progress=False)
    assert "! grey of 16 bits: full scale 4095" in describe_audit(report)


def test_the_scale_is_of_the_set_not_of_the_image(tmp_path):
    arrays = {f"{i:03d}.png": np.full((8, 8), 16 * i, np.uint16) for i in range(256)}
    images = open_images(write(tmp_path / "a", arrays), size=8)
    assert [int(images.image(i).max()) for i in (0, 16, 255)] == [0, 16, 254]  # of 4095
    again = pickle.loads(pickle.dumps(images))  # as a worker process gets it
    assert again.image(16).equal(images.image(16))
    assert open_images(tmp_path / "a", size=8).fingerprint == images.fingerprint


def test_the_user_states_the_scale(tmp_path):
    folder = write(tmp_path / "a", {"a.png": (RAMP * 1000).astype(np.uint16)})
    measured, stated = open_images(folder, size=32), open_images(folder, size=32, full_scale=4095)
    assert (measured.image(0).max(), stated.image(0).max()) == (249, 62)
    assert "full scale 4095, as stated" in str(stated.report)
    assert stated.fingerprint != measured.fingerprint
    assert open_images(folder, size=32, full_scale=500).image(0).max() == 255  # clipped
    buckets = BucketedDataset(open_source(str(folder), 32)[0], ((32, 32),), full_scale=4095)
    assert buckets.image(0).equal(stated.image(0))
    report = prepare_source(folder, tmp_path / "out", 32, full_scale=4095, progress=False)
    assert "as stated" in describe_audit(report)
    assert open_images(tmp_path / "out").image(0).equal(stated.image(0))
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="full scale"):
            open_images(folder, size=32, full_scale=wrong)
        with pytest.raises(ValueError, match="full_scale"):
            Data(full_scale=wrong)


@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 8), -1000, np.int32),
        np.linspace(-100, 100, 64, dtype=np.float32).reshape(8, 8),
        np.full((8, 8), np.nan, np.float32),
        np.full((8, 8), np.inf, np.float32),
    ],
)
def test_other_values_are_unreadable_and_named(tmp_path, array):
    arrays = {"a.tif": (RAMP * 255).astype(array.dtype), "b.tif": array}
    images = open_images(write(tmp_path / "a", arrays), size=8)
    with pytest.raises(ValueError, match=r"b\.tif cannot be read: mode . with"):
        images.image(1)


def test_a_larger_value_than_the_sample_holds_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mezzotint.data.full_scale.SAMPLE", 3)
    arrays = {f"{i}.png": np.full((8, 8), 40000 if i == 3 else 900, np.uint16) for i in range(9)}
    images = open_images(write(tmp_path / "a", arrays), size=8)
    assert images.image(2).max() == 224
    with pytest.raises(ValueError, match=r"3\.png .* outside 0\.\.\.1023.*data\.full_scale=65535"):
        images.image(3)


def test_dark_colour_is_a_concern(tmp_path):
    """Pillow reads colour of 16 bits as 8 bits: 12-bit colour is nearly black."""
    dark, bright = (np.full((8, 8, 3), value, np.uint8) for value in (15, 40))
    folder = write(tmp_path / "a", {"a.png": dark, "b.png": bright})
    report = prepare_source(folder, tmp_path / "out", 8, progress=False)
    assert "! 1 images use less than 1/8 of the range" in describe_audit(report)


def test_strips_of_rows_give_the_same_values(monkeypatch):
    image = Image.fromarray((RAMP * 60000).astype(np.uint16))
    whole = np.asarray(to_mode(image, 1))
    monkeypatch.setattr("mezzotint.data.full_scale.STRIP_PIXELS", 100)
    assert np.array_equal(np.asarray(to_mode(image, 1)), whole)


def test_transparent_and_turned_grey_of_16_bits(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray((RAMP[:16] * 4095).astype(np.uint16)).save(buffer, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    stored = Image.open(buffer, formats=("PNG",))
    turned = np.asarray(to_mode(stored, 1))
    assert turned.shape == (32, 16)
    assert turned[0, 0] > turned[0, -1]
