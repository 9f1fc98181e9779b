"""Aspect-ratio buckets: no image is lost, every batch has one shape, portraits are rotated."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from helpers.data import open_recipe_data
from mezzotint import config
from mezzotint.data.bucketed_dataset import BucketedDataset, cover_crop
from mezzotint.data.image_dataset import open_source
from mezzotint.data.loader import load_batches
from mezzotint.recipes import recipe_for
from mezzotint.train.loop import train

SHAPES = ((16, 16), (12, 20), (20, 12))


def write_images(folder, sizes):
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png"
        )
    return folder


@pytest.fixture
def mixed(tmp_path):
    """Eleven images: 5 nearly square, 4 wide, 2 tall."""
    square, wide, tall = [(30, 31)] * 5, [(20, 35)] * 4, [(40, 20)] * 2
    return write_images(tmp_path / "mixed", [*square, *wide, *tall])


def opened(folder, shapes=SHAPES, **options) -> BucketedDataset:
    return BucketedDataset(open_source(str(folder), 16)[0], shapes, **options)


def test_images_go_to_the_bucket_of_the_nearest_aspect_ratio(mixed):
    images = opened(mixed)
    assert images.bucket_counts() == [5, 4, 2]
    assert [images.image(i).shape[1:] for i in (0, 5, 9)] == [(16, 16), (12, 20), (20, 12)]
    assert "buckets: 16x16 5, 12x20 4, 20x12 2" in str(images.report)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 3))
def test_every_epoch_shows_every_picture_and_every_batch_has_one_shape(buckets, batch, seed):
    images = object.__new__(BucketedDataset)  # the order needs the buckets alone
    images.shapes, images.bucket = SHAPES, np.array(buckets)
    per_epoch = sum(-(-n // batch) for n in images.bucket_counts())
    for epoch in range(2):
        shown: Counter[int] = Counter()
        for k in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            chosen = images.batch_indices(seed, k * batch, batch, batch).tolist()
            assert len({buckets[i] for i in chosen}) == 1
            shown.update(chosen)
        assert set(shown) == set(range(len(buckets)))  # none lost
        for b in set(buckets):  # and repeated no more than it takes to fill the bucket's last batch
            extra = sum(shown[i] - 1 for i in range(len(buckets)) if buckets[i] == b)
            assert extra < batch


def test_resuming_and_ranks_see_the_same_batches(mixed):
    images = opened(mixed)

    def take(n, **options):
        stream = load_batches(images, **{"seed": 1, "start_image": 0, "batch": 4, **options})
        found = list(itertools.islice(stream, n))
        stream.close()
        return found

    whole = take(9)
    assert {tuple(b.inputs.shape[2:]) for b in whole} == set(SHAPES)
    for a, b in zip(whole[5:], take(4, start_image=20), strict=True):
        assert torch.equal(a.inputs, b.inputs)
    for a, *parts in zip(whole, *(take(9, rank=rank, world=2) for rank in (0, 1)), strict=True):
        assert torch.equal(a.inputs, torch.cat([part.inputs for part in parts]))
        assert torch.equal(a.image_numbers, torch.cat([part.image_numbers for part in parts]))


def test_portraits_are_rotated_and_their_captions_flagged(tmp_path):
    folder = write_images(tmp_path / "in", [(20, 32), (32, 20), (40, 64)])
    for i in range(2):
        (folder / f"{i:02d}.txt").write_text("a tree")
    images = opened(folder, ((20, 32),), portrait=True)
    assert [images.text(i) for i in range(3)] == ["a tree", "a tree, portrait mode", None]
    with Image.open(folder / "01.png") as stored:
        turned = np.asarray(stored.transpose(Image.Transpose.ROTATE_90))
    assert np.array_equal(images.image(1).numpy(), turned.transpose(2, 0, 1))
    assert opened(folder, ((20, 32),)).text(1) == "a tree"


def test_exif_orientation_decides_the_bucket(tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 24)).save(
        tmp_path / "in" / "a.jpg", exif=exif
    )  # shown 24 wide and 40 high
    assert opened(tmp_path / "in").bucket_counts() == [0, 0, 1]


def test_an_unreadable_image_is_replaced_within_its_bucket(mixed):
    images = opened(mixed)
    bad = mixed / "06.png"
    bad.write_bytes(bad.read_bytes()[:120])
    images = opened(mixed)
    bucket = int(images.bucket[6])
    fellow = images.readable(6)
    assert images.bucket[fellow] == bucket
    assert fellow != 6
    fellows = np.flatnonzero(images.bucket == bucket).tolist()
    shown, _ = images.batch(fellows)
    assert torch.equal(shown[fellows.index(6)], images.image(fellow))
    assert "06.png" in images.report.unreadable
    with pytest.raises(ValueError, match="several shapes"):
        images.batch([0, 9])


def test_cover_crop_is_the_central_part():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (16, 1)))
    assert np.array_equal(np.asarray(cover_crop(ramp, 16, 32)), np.asarray(ramp)[:, 16:48])
    assert cover_crop(Image.new("L", (301, 77)), 20, 12).size == (12, 20)


def test_wrong_shapes_are_refused(mixed):
    with pytest.raises(ValueError, match="give heights and widths"):
        opened(mixed, ())
    with pytest.raises(ValueError, match="repeat"):
        opened(mixed, ((16, 16), (16, 16)))
    with pytest.raises(ValueError, match="not within one batch"):
        opened(mixed).batch_indices(0, 3, 4, 4)


def recipe(source, *changes):
    own = [
        f"data.source={str(source)!r}", "data.buckets=[[16,16],[12,20],[20,12]]", "model.size=16",
        "model.width=8", "model.emb_dim=16", "model.multipliers=[1,2]", "model.blocks=[1]",
        "model.depth=1", "model.heads=2", "images=16", "model.num_classes=0", "batch=4",
        "log_every_images=8", "samples.every_images=16", "samples.count=2", "samples.steps=2",
        "save.every_images=16", "engine.precision=float32", "data.flip=true",
    ]  # fmt: skip
    return config.override(recipe_for("uvit-tiny"), [*own, *changes])


def test_a_network_trains_on_buckets(mixed, tmp_path):
    assert (
        train(recipe(mixed), tmp_path / "run", quiet=True) / "model" / "model.safetensors"
    ).is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.buckets=[]", "data.portrait=true"], r"data\.buckets=\[\[384,640\]\]"),
        (["data.codec=taesd"], r"latents; leave data\.buckets out"),
    ],
)
def test_recipes_without_fitting_buckets_are_refused(mixed, changes, words):
    with pytest.raises(ValueError, match=words):
        open_recipe_data(recipe(mixed, *changes))


def test_unreadable_images_never_fill_a_bucket_of_their_own(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.png").write_bytes(b"damaged")
    for name in ("w.png", "x.png", "y.png"):
        Image.new("RGB", (32, 16), "red").save(tmp_path / name)
    Image.new("RGB", (16, 32)).save(tmp_path / "z.png")
    source, _ = open_source(str(tmp_path), 16)
    images = BucketedDataset(source, ((16, 16), (16, 32), (32, 16)))
    assert images.bucket_counts() == [0, 43, 1]
    indices = images.batch_indices(0, 0, 8, 8)
    assert images.batch(indices)[0].shape == (8, 3, 16, 32)
    assert len(images.report.unreadable) >= 1
    for name in ("w.png", "x.png", "y.png", "z.png"):
        (tmp_path / name).unlink()
    source, _ = open_source(str(tmp_path), 16)
    with pytest.raises(ValueError, match=r"no image can be read, 00\.png"):
        BucketedDataset(source, ((16, 16),))
