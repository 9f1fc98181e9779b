"""The built-in sets: real digits, and shapes that are what their captions say."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data.image_dataset import open_images
from mezzotint.data.shapes import (
    CENTRES,
    COLOURS,
    POSITIONS,
    SHAPES,
    list_combinations,
    open_shapes,
)


def test_the_split_of_digits_is_fixed():
    train, test, every = (
        open_images(f"digits:{split}", size=16, channels=1) for split in ("train", "test", "all")
    )
    assert (len(train), len(test), len(every)) == (1500, 297, 1797)
    names = [{images.name(i) for i in range(len(images))} for images in (train, test, every)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == names[2]
    assert train.num_classes == 10
    assert {train.label(i) for i in range(100)} == set(range(10))
    assert (
        train.text(0)
        == f"a handwritten digit {['zero', 'one', 'two', 'three', 'four'][train.label(0)]}"
    )
    # The held-out part is never the one trained on, on any machine: its first members are fixed.
    assert train.fingerprint != test.fingerprint
    assert open_images("digits", size=16, channels=1).fingerprint == train.fingerprint


def test_digits_come_in_any_size():
    for size, channels in ((8, 1), (16, 3), (32, 1)):
        images = open_images(f"digits:{size}", channels=channels)
        assert images.image(0).shape == (channels, size, size)
    raw = open_images("digits:8", channels=1)
    assert {int(v) for v in raw.image(3).unique()} <= {round(k * 255 / 16) for k in range(17)}


def test_captions_read_as_english():
    words = {open_shapes(8, count=400).text(i) for i in range(400)}
    assert "a red circle at the top left" in words
    assert any(word.startswith("an orange") for word in words)
    assert len(words) == len(list_combinations("train"))


def test_train_has_no_test_combination_but_all_their_pairs():
    train, test = list_combinations("train"), list_combinations("test")
    assert not set(train) & set(test)
    assert (
        len(train) + len(test)
        == len(COLOURS) * len(SHAPES) * len(POSITIONS)
        == len(list_combinations("all"))
    )
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(t[a], t[b]) for t in test} <= {(t[a], t[b]) for t in train}


def test_image_i_is_a_function_of_seed_and_i():
    a, b, other = (
        open_shapes(32, count=50),
        open_shapes(32, count=5000),
        open_shapes(32, count=50, seed=1),
    )
    for i in (0, 7, 49):
        assert np.array_equal(a.read(i), b.read(i))
        assert a.attributes(i) == b.attributes(i)
    assert not np.array_equal(a.read(7), other.read(7))
    assert a.identity() != b.identity() != other.identity()


def test_every_block_holds_every_combination_once():
    m = len(list_combinations("train"))
    images = open_shapes(8, count=2 * m)
    for block in (range(m), range(m, 2 * m)):
        assert len({images.attributes(i) for i in block}) == m
    assert [images.attributes(i).shape for i in range(m)] == images.labels[:m].tolist()


def test_images_look_the_same_at_any_size():
    small, large = open_shapes(32, count=20), open_shapes(128, count=20)
    for i in range(20):
        reduced = Image.fromarray(large.read(i).transpose(1, 2, 0)).resize(
            (32, 32), Image.Resampling.BOX
        )
        assert abs(np.asarray(reduced).astype(float) - small.read(i).transpose(1, 2, 0)).mean() < 3


def coverage(pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Measure the shape's position (saturated pixels) and hue in degrees in a (3, h, w) image."""
    high, low = pixels.max(0).astype(float), pixels.min(0).astype(float)
    mask = (high - low) / np.maximum(high, 1) > 0.6
    mean = pixels[:, mask].mean(1) / 255
    return mask, colorsys.rgb_to_hsv(*mean)[0] * 360


def test_pixels_agree_with_the_caption():
    size, count = 64, 300
    images = open_shapes(size, split="all", count=count)
    templates: dict[int, list[np.ndarray]] = {}
    for i in range(count):
        truth, (mask, hue) = images.attributes(i), coverage(images.read(i))
        distance = [min(abs(hue - h), 360 - abs(hue - h)) for h in COLOURS.values()]
        assert int(np.argmin(distance)) == truth.colour
        rows, columns = np.nonzero(mask)
        middle = [(side.min() + side.max() + 1) / 2 / size for side in (rows, columns)]
        row, column = (int(np.argmin([abs(m - c) for c in CENTRES])) for m in middle)
        assert row * 3 + column == truth.position
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        shape = (
            np.asarray(Image.fromarray(box).convert("L").resize((24, 24), Image.Resampling.BOX))
            / 255
        )
        templates.setdefault(truth.shape, []).append(shape)
    # Leave-one-out nearest mean tells the shapes apart.
    means = {shape: np.mean(found, 0) for shape, found in templates.items()}
    assert set(means) == set(range(len(SHAPES)))
    for shape, found in templates.items():
        for one in found:
            assert min(means, key=lambda k: ((means[k] - one) ** 2).sum()) == shape


def test_shapes_stay_inside_and_are_antialiased():
    for i in range(60):
        mask, _ = coverage(open_shapes(64, count=60).read(i))
        assert not mask[0].any()
        assert not mask[-1].any()
        assert not mask[:, 0].any()
        assert not mask[:, -1].any()


@pytest.mark.parametrize(
    "name",
    ["shapes:oval", "shapes:count=x", "digits:count=5", "shapes:64,blue=1", "digits:validation"],
)
def test_unknown_options_are_refused(name):
    with pytest.raises(ValueError, match="allowed: train, test, all"):
        open_images(name, size=64)


def test_sizes_of_builtin_sets():
    images = open_images("shapes:32,test,count=7,seed=3")
    assert (len(images), images.size) == (7, 32)
    assert open_images("shapes:count=5", size=16, channels=1).image(0).shape == (1, 16, 16)
    with pytest.raises(ValueError, match=r"size 32.*size given is 64"):
        open_images("shapes:32", size=64)
    with pytest.raises(ValueError, match="any size"):
        open_images("shapes")
    with pytest.raises(ValueError, match="at least 8"):
        open_images("shapes:4")


def test_batches_of_shapes_carry_labels():
    images = open_images("shapes:16,count=40")
    pixels, labels = images.batch(torch.tensor([3, 3, 9]))
    assert torch.equal(pixels[0], pixels[1])
    assert labels is not None
    assert labels.tolist() == [images.label(3), images.label(3), images.label(9)]
    assert images.label_names == tuple(SHAPES)
