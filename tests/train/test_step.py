"""The draws of a step: which labels and captions are dropped, and what a batch depends on."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import small
from mezzotint.core import rng
from mezzotint.data.image_dataset import open_images
from mezzotint.data.loader import LoadedBatch
from mezzotint.train.step import Batch, make_batch

CLASSES = 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return open_images("digits", size=8, channels=1)


def loaded_batch(first: int, count: int, tokens: int = 3) -> LoadedBatch:
    """Images `first`, `first` + 1, ...; each has a label and a caption of one or more tokens."""
    image_numbers = torch.arange(first, first + count)
    lengths = 1 + image_numbers % tokens
    return LoadedBatch(
        image_numbers,
        torch.zeros(count, 1, 8, 8, dtype=torch.uint8),
        image_numbers % CLASSES,
        torch.ones(count, tokens, 2, dtype=torch.float16),
        torch.arange(tokens) < lengths[:, None],
    )


@pytest.fixture(params=["philox4x64", "philox4x32"])
def stream(request) -> str:
    return request.param


def batch_of(
    digits, loaded: LoadedBatch, label_drop: float, seed: int = 0, stream: str = "auto"
) -> Batch:
    recipe = small(f"label_drop={label_drop}", f"seed={seed}", f"stream={stream}")
    return make_batch(recipe, digits, CLASSES, loaded, CPU)


def condition(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The labels and the text mask of a batch that has both."""
    assert batch.cond.label is not None
    assert batch.cond.text_mask is not None
    return batch.cond.label, batch.cond.text_mask


@pytest.mark.parametrize("seed", [0, 7])
def test_exactly_the_images_drawn_below_label_drop_lose_their_condition(digits, seed, stream):
    loaded = loaded_batch(500, 400)
    assert loaded.labels is not None
    assert loaded.text_mask is not None
    label, text_mask = condition(batch_of(digits, loaded, 0.25, seed, stream))
    draws = rng.Draws(seed, stream)
    dropped = draws.uniform("condition", loaded.image_numbers.tolist()) < 0.25
    assert 0 < dropped.sum() < 400
    assert (label[dropped] == CLASSES).all()  # the null label
    assert torch.equal(label[~dropped], loaded.labels[~dropped])
    assert not text_mask[dropped].any()
    assert torch.equal(text_mask[~dropped], loaded.text_mask[~dropped])


@pytest.mark.parametrize("label_drop", [0.1, 0.5])
def test_the_rate_of_dropped_conditions_is_label_drop(digits, label_drop, stream):
    count = 20_000
    loaded = loaded_batch(0, count)
    label, text_mask = condition(batch_of(digits, loaded, label_drop, stream=stream))
    std = (label_drop * (1 - label_drop) / count) ** 0.5
    for dropped in (label == CLASSES, ~text_mask.any(1)):
        assert abs(dropped.double().mean().item() - label_drop) < 4 * std


@pytest.mark.parametrize(("label_drop", "share"), [(0, 0), (1, 1)])
def test_nothing_or_everything_is_dropped_at_the_ends(digits, label_drop, share):
    label, text_mask = condition(batch_of(digits, loaded_batch(0, 200), label_drop))
    assert (label == CLASSES).double().mean() == share
    assert (~text_mask.any(1)).double().mean() == share


def test_a_network_without_classes_gets_no_labels(digits):
    batch = make_batch(small(), digits, 0, loaded_batch(0, 4), CPU)
    assert batch.cond.label is None


def test_draws_depend_on_the_image_number_and_not_on_the_batch(digits, stream):
    whole = batch_of(digits, loaded_batch(0, 32), 0.5, stream=stream)
    parts = [
        batch_of(digits, loaded_batch(first, 8), 0.5, stream=stream) for first in range(0, 32, 8)
    ]
    for name in ("x", "eps", "u"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    for i in (0, 1):
        assert torch.equal(condition(whole)[i], torch.cat([condition(p)[i] for p in parts]))


def test_a_split_batch_keeps_its_rows_together(digits):
    batch = batch_of(digits, loaded_batch(0, 10), 0.5)
    parts = list(batch.split(4))
    assert [p.image_numbers for p in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for field in ("eps", "u"):
        assert torch.equal(getattr(batch, field), torch.cat([getattr(p, field) for p in parts]))
    for i in (0, 1):
        assert torch.equal(condition(batch)[i], torch.cat([condition(p)[i] for p in parts]))
    (only,) = batch.split(None)
    assert only.image_numbers == batch.image_numbers


@pytest.mark.parametrize("size", [2, 3, 4, 5, 9, 10, 11, None])
@pytest.mark.parametrize("share", [5, 10])
def test_ranks_with_an_image_less_take_as_many_microbatches(digits, share, size):
    """FSDP2 gathers and reduces in each."""
    more, less = (
        [p.image_numbers for p in batch_of(digits, loaded_batch(0, n), 0.5).split(size, share)]
        for n in (share, share - 1)
    )
    assert len(more) == len(less) == -(-share // (size or share))
    for parts, images in ((more, share), (less, share - 1)):
        assert [n for part in parts for n in part] == list(range(images))
        assert all(1 <= len(part) <= (size or share) for part in parts)


@pytest.mark.parametrize("augment", [0.12, 1.0])
def test_the_network_is_told_how_its_images_are_augmented(digits, augment):
    loaded = loaded_batch(40, 60)
    loaded = loaded._replace(inputs=torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8))
    plain, batch = (
        make_batch(small("data.flip=false", f"data.augment={p}"), digits, CLASSES, loaded, CPU)
        for p in (0, augment)
    )
    assert plain.cond.augment is None
    assert batch.cond.augment is not None
    told = batch.cond.augment.any(1)
    assert torch.equal(told, (batch.x != plain.x).flatten(1).any(1))
    assert told.any()
    # All else that is drawn stays as it was.
    assert torch.equal(batch.eps, plain.eps)
    assert torch.equal(batch.u, plain.u)
    parts = list(batch.split(16))
    assert torch.equal(torch.cat([p.cond.augment for p in parts]), batch.cond.augment)
