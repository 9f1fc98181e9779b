"""The order of images in shards: coverage, ranks, resume, and how few shards it needs at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mezzotint.data.shard_order import ShardOrder, choose_lanes

SHAPES = [  # shards, batch, lanes, shuffle_images
    (7, 6, 3, 4),
    (50, 32, 8, 100),
    (3, 8, 8, 5),
    (20, 12, 4, 10_000),
    (1, 4, 1, 3),
    (2, 64, 64, 1),
]


def make_order(shards: int, batch: int, lanes: int, shuffle_images: int, seed: int = 3):
    counts = np.random.default_rng(shards).integers(1, 40, shards)
    return ShardOrder(counts, batch, lanes, shuffle_images, seed)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_image_comes_once_an_epoch(shape):
    order = make_order(*shape)
    n = len(order)
    epochs = [order.indices(epoch * n, n) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n))
    assert n < 3 or not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_does_not_depend_on_how_it_is_asked_for(shape):
    order = make_order(*shape)
    n = len(order)
    whole = order.indices(0, 2 * n + 5)
    again = make_order(*shape)
    for step in (1, 3, n - 1 or 1):
        parts = [again.indices(s, min(step, len(whole) - s)) for s in range(0, len(whole), step)]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_order_depends_on_the_seed(shape):
    first, other = (make_order(*shape, seed=seed) for seed in (3, 4))
    assert not np.array_equal(first.indices(0, len(first)), other.indices(0, len(first)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_names_the_shards_of_its_images(shape):
    order = make_order(*shape)
    n = len(order)
    for start in range(0, 2 * n, 7):
        images = order.indices(start, 7)
        shards = set(np.searchsorted(order.starts, images, side="right") - 1)
        named = [order.shards(block) for block in order.blocks(start, 7)]
        assert shards <= set(itertools.chain(*named))


def test_a_change_of_ranks_in_the_middle_of_an_epoch_loses_and_repeats_nothing():
    order = make_order(40, 48, 16, 64)
    seen, image = [], 0
    for world, steps in [(8, 3), (4, 5), (16, 2), (3, 4), (1, 100)]:
        for _ in range(steps):
            share = 48 // world
            parts = [order.indices(image + rank * share, share) for rank in range(world)]
            seen += np.concatenate(parts).tolist()
            image += 48
    n = len(order)
    for epoch in range(len(seen) // n):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_read_different_shards(world):
    counts = np.full(400, 100)
    order = ShardOrder(counts, 64, 8, 200, 0)
    per_rank = []
    for rank in range(world):
        share = 64 // world
        starts = range(rank * share, 40_000 - 64, 64)
        images = np.concatenate([order.indices(s, share) for s in starts])
        per_rank.append(set((images // 100).tolist()))
    # A lane ends within a shard, which the next lane begins with.
    assert sum(map(len, per_rank)) <= 400 + 2 * world
    assert max(map(len, per_rank)) <= 400 / world + 8


def test_few_shards_are_open_at_once():
    order = ShardOrder(np.full(1000, 50), 32, 8, 100, 1)
    for start in range(0, 5000, 32):
        images = order.indices(start, 32)
        assert len(set((images // 50).tolist())) <= 8 * (100 // 50 + 1)


def test_blocks_follow_one_another_through_epochs():
    order = make_order(6, 8, 4, 5)
    n = len(order)
    for lane in range(4):
        visited = [block for s in range(3 * n) for block in order.blocks(s, 1) if block[1] == lane]
        distinct = [block for block, _ in itertools.groupby(visited)]
        for one, following in itertools.pairwise(distinct):
            assert order.next_block(one) == following


def test_images_are_mixed_within_a_block():
    order = ShardOrder(np.full(10, 100), 10, 1, 1000, 0)
    places = order.indices(0, 1000)
    # Neighbours of a random permutation of n are about n/3 apart.
    assert 250 < np.abs(np.diff(places)).mean() < 420


@pytest.mark.parametrize(
    ("batch", "shards", "world", "lanes"),
    [(256, 1000, 1, 8), (256, 1000, 8, 16), (48, 1000, 3, 8), (256, 3, 1, 2), (7, 100, 1, 7),
     (16_384, 100_000, 4096, 8192)],
)  # fmt: skip
def test_lanes_divide_the_batch(batch, shards, world, lanes):
    assert choose_lanes(batch, shards, world) == lanes


@pytest.mark.parametrize("change", [{"lanes": 3}, {"batch": 0}, {"shuffle_images": 0}])
def test_wrong_numbers_are_refused(change):
    numbers = {"batch": 8, "lanes": 4, "shuffle_images": 5} | change
    with pytest.raises(ValueError, match="positive"):
        ShardOrder(np.array([3, 4]), seed=0, **numbers)


@pytest.mark.parametrize("counts", [[], [3, 0, 1]])
def test_empty_shards_are_refused(counts):
    with pytest.raises(ValueError, match="every shard"):
        ShardOrder(np.array(counts, np.int64), 8, 4, 5, 0)
