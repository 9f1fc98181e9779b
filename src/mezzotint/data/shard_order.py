"""The order of images that lie in shards: a function of (seed, epoch), with few shards open.

An epoch permutes the shards and lays their images end to end. The row of n images is cut into
`lanes` parts of equal length, which are read side by side: of every batch, each lane gives the same
places. Within a lane, images are permuted in blocks of `shuffle_images`, so that a lane needs only
the shards of one block at a time.

A rank reads the places of its share of the batch, and therefore few lanes. The order does not
depend on the number of ranks, so a run may continue with another number. The position in the order
is the number of images seen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from mezzotint.core.rng import philox

LEAST_LANES = 8  # of a run that begins on few ranks, so that a batch mixes shards
BLOCKS = 1 << 40  # keys of blocks a lane may have


@dataclass(frozen=True, eq=False)
class ShardOrder:
    """The order of `counts.sum()` images in `len(counts)` shards.

    Sample number k of a run is place k % n of epoch k // n. Images are numbered shard by shard.

    counts: images of each shard, int64 (shards,), all positive.
    batch: images a step over all ranks; it decides which places belong to which lane.
    lanes: a divisor of `batch`.
    shuffle_images: images of a block.

    Errors: ValueError for a number that is not positive, or lanes that do not divide the batch.
    """

    counts: np.ndarray
    batch: int
    lanes: int
    shuffle_images: int
    seed: int

    def __post_init__(self):
        if not len(self.counts) or self.counts.min() < 1:
            raise ValueError("every shard must hold an image, and there must be a shard")
        if min(self.batch, self.lanes, self.shuffle_images) < 1 or self.batch % self.lanes:
            raise ValueError(
                f"batch {self.batch}, lanes {self.lanes}, shuffle_images {self.shuffle_images}: "
                "all must be positive, and the batch a multiple of the lanes"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Number of the first image of each shard, and of all images, int64 (shards + 1,)."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def indices(self, start: int, count: int) -> np.ndarray:
        """Return the images, int64 (count,), of the sample numbers start ... start + count - 1."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self))
        images = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = np.flatnonzero(epochs == epoch)
            lane, position = self._lane_of(places[chosen])
            images[chosen] = self._images(epoch, lane, position)
        return images

    def blocks(self, start: int, count: int) -> set[tuple[int, int, int]]:
        """Return the blocks, as (epoch, lane, number), that these sample numbers lie in."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self))
        lane, position = self._lane_of(places)
        block = position // self.shuffle_images
        return set(zip(epochs.tolist(), lane.tolist(), block.tolist(), strict=True))

    def next_block(self, block: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the block that the same lane reads after this one."""
        epoch, lane, number = block
        last = number + 1 >= -(-self._lane_size(lane) // self.shuffle_images)
        return (epoch + 1, lane, 0) if last else (epoch, lane, number + 1)

    def shards(self, block: tuple[int, int, int]) -> list[int]:
        """Return the shards that hold the images of a block; none for a lane without images."""
        epoch, lane, number = block
        begin = self._lane_start(lane) + number * self.shuffle_images
        end = min(begin + self.shuffle_images, self._lane_start(lane + 1))
        if end <= begin:
            return []
        shuffled = _shuffle_shards(self, epoch)
        first, last = np.searchsorted(shuffled.ends, [begin, end - 1], side="right")
        return shuffled.order[first : last + 1].tolist()

    def _lane_of(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the lane of each place of an epoch, and the position within the lane."""
        row, column = np.divmod(places, self.batch)
        width = self.batch // self.lanes
        lane = column // width
        return lane, row * width + column % width

    def _lane_start(self, lane: int) -> int:
        """Return where a lane begins in the epoch's row of images; a rest goes to the first."""
        width = self.batch // self.lanes
        rows, rest = divmod(len(self), self.batch)
        return rows * width * lane + min(rest, lane * width)

    def _lane_size(self, lane: int) -> int:
        return self._lane_start(lane + 1) - self._lane_start(lane)

    def _images(self, epoch: int, lane: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the images at these positions of these lanes."""
        number, within = np.divmod(position, self.shuffle_images)
        places = np.empty(len(lane), np.int64)
        for one, block in set(zip(lane.tolist(), number.tolist(), strict=True)):
            chosen = np.flatnonzero((lane == one) & (number == block))
            begin = self._lane_start(one) + block * self.shuffle_images
            size = min(self.shuffle_images, self._lane_start(one + 1) - begin)
            places[chosen] = (
                begin + _shuffle_block(self.seed, epoch, one, block, size)[within[chosen]]
            )
        shuffled = _shuffle_shards(self, epoch)
        at = np.searchsorted(shuffled.ends, places, side="right")
        shard = shuffled.order[at]
        return self.starts[shard] + places - (shuffled.ends[at] - self.counts[shard])


@dataclass(frozen=True, eq=False)
class _Shuffled:
    """The shards of an epoch in order, and where each ends in the epoch's row of images."""

    order: np.ndarray
    ends: np.ndarray


@functools.lru_cache(maxsize=4)
def _shuffle_shards(order: ShardOrder, epoch: int) -> _Shuffled:
    permutation = philox("order", order.seed, epoch).permutation(len(order.counts))
    return _Shuffled(permutation, np.cumsum(order.counts[permutation], dtype=np.int64))


@functools.lru_cache(maxsize=4096)
def _shuffle_block(seed: int, epoch: int, lane: int, block: int, size: int) -> np.ndarray:
    """Return the permutation of a block, int32; draw 0 of an epoch permutes the shards."""
    draw = 1 + lane * BLOCKS + block
    return philox("order", seed, epoch, draw).permutation(size).astype(np.int32)


def choose_lanes(batch: int, num_shards: int, world: int) -> int:
    """Return the number of lanes for a run that begins on `world` ranks.

    The largest divisor of the batch with at most two lanes a rank, or `LEAST_LANES` in all, and at
    most one a shard: a lane keeps at least two shards in the cache.
    """
    most = max(1, min(num_shards, max(LEAST_LANES, 2 * world)))
    return max(n for n in range(1, min(batch, most) + 1) if batch % n == 0)
