"""One image of any mode to uint8 pixels; crops; the model's range."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mezzotint.data.transforms import (
    UnreadableImage,
    adm_crop,
    flip,
    plain_crop,
    to_mode,
    to_model_range,
    to_pixels,
    to_uint8,
)

RAMP = np.linspace(0, 255, 32, dtype=np.uint8)[None].repeat(24, 0)  # 24 x 32, brighter to the right
RGB = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], -1)


def saved(image: Image.Image, format: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_model_range_and_uint8_are_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    assert to_model_range(every).min() == -1
    assert to_model_range(every).max() == 1
    assert torch.equal(to_uint8(to_model_range(every)), every)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_round_and_truncate():
    x = to_model_range(torch.tensor([100], dtype=torch.uint8)) + 0.7 / 127.5
    assert to_uint8(x).item() == 101
    assert to_uint8(x, "truncate").item() == 100
    with pytest.raises(ValueError, match="unknown rule 'floor'; known: round, truncate"):
        to_uint8(x, "floor")


def test_flip_mirrors_only_masked_images():
    x = torch.arange(12, dtype=torch.uint8).reshape(2, 1, 2, 3)
    y = flip(x, torch.tensor([True, False]))
    assert torch.equal(y[0], x[0].flip(-1))
    assert torch.equal(y[1], x[1])


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "PA"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode, channels):
    image = Image.fromarray(RAMP) if mode in ("I", "F") else Image.fromarray(RGB)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    if mode == "I":
        image = Image.fromarray(RAMP.astype(np.int32) * 257)
    pixels = to_pixels(image, 16, channels, "adm")
    assert pixels.dtype == np.uint8
    assert pixels.shape == (channels, 16, 16)
    truth = RAMP if mode in ("I", "F") else np.asarray(Image.fromarray(RGB).convert("L"))
    grey = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).convert("L")).astype(
        float
    )
    wanted = np.asarray(adm_crop(Image.fromarray(truth), 16)).astype(float)
    if mode not in ("1", "P", "PA"):  # dithered or of few colours
        assert abs(grey - wanted).max() <= 4


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(dtype):
    deep = np.linspace(0, 65535, 32).astype(dtype)[None].repeat(32, 0)
    image = Image.fromarray(deep)
    image = saved(image, "PNG") if dtype == np.uint16 else image
    pixels = to_pixels(image, 32, 1, "adm")[0, 0]
    assert abs(pixels.astype(float) - np.linspace(0, 255, 32)).max() <= 0.51


def test_transparency_becomes_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (255, 0, 0, 255)
    for image in (Image.fromarray(rgba), saved(Image.fromarray(rgba).convert("LA"), "PNG")):
        pixels = to_pixels(image, 8, 3, "adm")
        assert (pixels[:, :, :4] == 255).all()
        assert pixels[1:, :, 4:].max() < 100
    palette = Image.fromarray(np.tile(np.array([0, 1], np.uint8), (8, 4)), "L").convert("P")
    palette.info["transparency"] = 0
    assert (to_pixels(palette, 8, 3, "adm")[:, :, ::2] == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_is_composited_in_strips(monkeypatch, mode, channels):
    alpha = Image.fromarray(np.ascontiguousarray(RAMP.T[:24, :24])).resize((32, 24))
    image = Image.fromarray(RGB)
    image.putalpha(alpha)
    if mode == "P":
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = bytes(range(0, 256, 16))
    else:
        image = image.convert(mode)
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    monkeypatch.setattr("mezzotint.data.transforms.STRIP_PIXELS", 70)
    expected = np.asarray(whole.convert({1: "L", 3: "RGB"}[channels]))
    assert np.array_equal(np.asarray(to_mode(image, channels)), expected)


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image.n_frames == 2
    assert to_pixels(image, 8, 3, "adm")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8, :8] = 255  # white corner at the top left, as it should be seen
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Transpose that stores it as EXIF then says to undo
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(picture)
    image = image.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else image
    pixels = to_pixels(saved(image, "PNG", exif=exif), 16, 3, "adm")
    assert np.array_equal(pixels, picture.transpose(2, 0, 1))


def test_damaged_images_are_unreadable_with_a_reason():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(
        buffer, "JPEG"
    )
    with pytest.raises(UnreadableImage, match="truncated"):
        to_mode(Image.open(io.BytesIO(buffer.getvalue()[:800])), 3)
    with pytest.raises(UnreadableImage, match="non-finite"):
        to_mode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), 3)
    with pytest.raises(UnreadableImage, match="outside"):
        to_mode(Image.fromarray(np.full((4, 4), -1, np.int32)), 3)
    with pytest.raises(UnreadableImage, match="plain"):
        adm_crop(Image.new("RGB", (40000, 1)), 256)


def adm_written_out(image: Image.Image, size: int) -> np.ndarray:
    """The crop as an image of three named steps, from the words of the spec."""
    halvings = 0
    while min(image.width >> halvings, image.height >> halvings) >= 2 * size:
        halvings += 1
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    short = min(image.size)
    image = image.resize(
        [round(side * size / short) for side in image.size], Image.Resampling.BICUBIC
    )
    array = np.asarray(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([1, 7, 16, 64]))
def test_crops_of_any_size_and_aspect(width, height, size):
    pixels = np.random.default_rng(width * height).integers(
        0, 255, (height, width, 3), dtype=np.uint8
    )
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(adm_crop(image, size)), adm_written_out(image, size))
    assert plain_crop(image, size).size == (size, size)


def test_an_image_of_the_right_size_is_unchanged():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    for crop in (adm_crop, plain_crop):
        assert np.array_equal(np.asarray(crop(image, 16)), np.asarray(image))


def test_both_crops_keep_aspect_ratio_and_centre():
    # A white disc in the middle of a wide black image stays a centred disc.
    y, x = np.mgrid[:120, :320]
    disc = Image.fromarray((255 * ((x - 159.5) ** 2 + (y - 59.5) ** 2 < 40**2)).astype(np.uint8))
    for crop in ("adm", "plain"):
        mass = to_pixels(disc, 30, 1, crop)[0].astype(float)
        rows, columns = (
            (mass.sum(1) * np.arange(30)).sum() / mass.sum(),
            (mass.sum(0) * np.arange(30)).sum() / mass.sum(),
        )
        assert abs(rows - 14.5) < 0.1
        assert abs(columns - 14.5) < 0.1
        assert abs(mass.sum() / 255 - np.pi * 10**2) < 6


def test_the_crops_differ_and_both_antialias():
    stripes = np.tile(np.array([0, 255], np.uint8), (128, 64))
    for crop in ("adm", "plain"):
        assert abs(to_pixels(Image.fromarray(stripes), 16, 1, crop).astype(float) - 127.5).max() < 8
    noise = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    )
    assert not np.array_equal(to_pixels(noise, 32, 3, "adm"), to_pixels(noise, 32, 3, "plain"))
