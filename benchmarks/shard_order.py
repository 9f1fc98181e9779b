"""Simulate the order of a billion images in 100,000 shards on 4,096 ranks, without any data.

    OMP_NUM_THREADS=1 python benchmarks/shard_order.py --out benchmarks/results/shard-order.json

The full case measures a rank's plan: memory, time, shards that it fetches. A small case of a
million images is counted in full: every image once an epoch, also where 8 ranks become 4 and then
16. Mixing is measured on images sorted by class, against a permutation of all images.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, one_thread, write
from mezzotint.data.shard_order import ShardOrder, choose_lanes

IMAGES, SHARDS, RANKS, PER_RANK, BLOCK = 10**9, 100_000, 4096, 8, 4096
SMALL_IMAGES, SMALL_SHARDS, SMALL_BATCH, CLASSES = 1_000_003, 997, 256, 1000


def shard_counts(images: int, shards: int) -> np.ndarray:
    """Return unequal counts, int64 (shards,), that add up to `images`."""
    rng = np.random.default_rng(0)
    share = rng.uniform(0.5, 1.5, shards)
    counts = np.maximum(1, (share / share.sum() * images).astype(np.int64))
    counts[0] += images - counts.sum()
    return counts


def full_order(seed: int = 0) -> ShardOrder:
    """Return the order of the full case, with the lanes that a run of that size chooses."""
    batch = RANKS * PER_RANK
    return ShardOrder(
        shard_counts(IMAGES, SHARDS), batch, choose_lanes(batch, SHARDS, RANKS), BLOCK, seed
    )


def rank_batch(order: ShardOrder, step: int, rank: int, ranks: int) -> np.ndarray:
    """Return a rank's images of a step."""
    share = order.batch // ranks
    return order.indices(step * order.batch + rank * share, share)


def measure_plan(rank: int = 1234, steps: int = 2000) -> dict[str, float]:
    """Return bytes and seconds of one rank's plan."""
    tracemalloc.start()
    order = full_order()
    start = time.process_time()
    rank_batch(order, 0, rank, RANKS)
    first = time.process_time() - start
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    seconds = []
    for step in range(1, steps + 1):
        start = time.process_time()
        rank_batch(order, step, rank, RANKS)
        seconds.append(time.process_time() - start)
    last_step = len(order) // order.batch
    start = time.process_time()
    rank_batch(order, last_step + 1, rank, RANKS)
    return {
        "bytes held": held,
        "bytes at most": peak,
        "seconds to the first batch": first,
        "seconds per batch, mean": float(np.mean(seconds)),
        "seconds per batch, slowest": max(seconds),
        "seconds to the first batch of another epoch": time.process_time() - start,
    }


def blocks_of(order: ShardOrder, lane: int) -> Iterator[tuple[int, int, int]]:
    """Yield the blocks of a lane in epoch 0."""
    block = (0, lane, 0)
    while block[0] == 0:
        yield block
        block = order.next_block(block)


def measure_fetches(order: ShardOrder) -> dict[str, float]:
    """Return the shards that each rank and each machine of eight ranks fetches in an epoch."""
    lanes_of_rank = order.lanes // RANKS
    ranks = []
    for rank in range(RANKS):
        shards: set[int] = set()
        for lane in range(rank * lanes_of_rank, (rank + 1) * lanes_of_rank):
            for block in blocks_of(order, lane):
                shards.update(order.shards(block))
        ranks.append(shards)
    machines = [set().union(*ranks[i : i + 8]) for i in range(0, RANKS, 8)]
    sizes, readers = [len(s) for s in ranks], Counter(s for shards in ranks for s in shards)
    return {
        "shards of a rank, least": min(sizes),
        "shards of a rank, mean": float(np.mean(sizes)),
        "shards of a rank, most": max(sizes),
        "shards that nobody reads": SHARDS - len(readers),
        "shards that several ranks read": sum(n > 1 for n in readers.values()),
        "fetches per shard, a cache per rank": sum(sizes) / SHARDS,
        "fetches per shard, a cache per 8 ranks": sum(map(len, machines)) / SHARDS,
    }


def measure_rows(order: ShardOrder) -> dict[str, int]:
    """Return the images of the rank with the fewest and the most in the steps of an epoch."""
    steps, rest = divmod(len(order), order.batch)
    shares = [min(PER_RANK, max(0, rest - rank * PER_RANK)) for rank in range(RANKS)]
    whole = steps * PER_RANK
    return {"images of a rank, least": whole + min(shares), "most": whole + max(shares)}


def sample_coverage(order: ShardOrder, lanes: int = 6) -> dict[str, Any]:
    """Read whole lanes of the full case: every image is of the lane's own shards, and once."""
    width, steps = order.batch // order.lanes, -(-len(order) // order.batch)
    chosen = np.random.default_rng(1).choice(order.lanes, lanes, replace=False).tolist()
    seen: list[np.ndarray] = []
    inside = True
    for lane in chosen:
        starts = [step * order.batch + lane * width for step in range(steps)]
        parts = [order.indices(s, min(width, len(order) - s)) for s in starts if s < len(order)]
        images = np.concatenate(parts)
        shards = {shard for block in blocks_of(order, lane) for shard in order.shards(block)}
        of = np.searchsorted(order.starts, images, side="right") - 1
        inside &= set(of.tolist()) == shards
        seen.append(images)
    images = np.concatenate(seen)
    return {
        "lanes": lanes,
        "images": len(images),
        "repeated": len(images) - len(np.unique(images)),
        "only the lane's shards": bool(inside),
    }


def small_order(lanes: int, block: int = BLOCK) -> ShardOrder:
    """Return the order of the small case."""
    return ShardOrder(shard_counts(SMALL_IMAGES, SMALL_SHARDS), SMALL_BATCH, lanes, block, 0)


def count_small() -> dict[str, Any]:
    """Count every image of two epochs, and of one that 8, then 4, then 16 ranks read."""
    order = small_order(32)
    n, last = len(order), -(-len(order) // SMALL_BATCH)
    result: dict[str, Any] = {"images": n, "shards": SMALL_SHARDS, "batch": SMALL_BATCH}
    for epoch in range(2):
        read = np.concatenate(
            [order.indices(epoch * n + s, min(8192, n - s)) for s in range(0, n, 8192)]
        )
        times = np.bincount(read, minlength=n)
        result[f"epoch {epoch}, read once"] = int((times == 1).sum())
        if epoch == 0:
            whole = read
    parts = []
    for ranks, steps in ((8, range(1000)), (4, range(1000, 2500)), (16, range(2500, last))):
        parts += [rank_batch(order, step, rank, ranks) for step in steps for rank in range(ranks)]
    changed = np.concatenate(parts)[:n]
    result["8, 4, 16 ranks, read once"] = int((np.bincount(changed, minlength=n) == 1).sum())
    result["8, 4, 16 ranks, same batches"] = bool((changed == whole).all())
    return result


def measure_mixing(lanes: int, block: int, steps: int = 400) -> dict[str, float]:
    """Return the classes in a batch where images are sorted by class, and neighbours' distance."""
    order = small_order(lanes, block)
    n = len(order)
    chosen = np.random.default_rng(2).choice(n // SMALL_BATCH, steps, replace=False).tolist()
    classes, distances, shards = [], [], []
    for step in chosen:
        images = order.indices(step * SMALL_BATCH, SMALL_BATCH)
        classes.append(len(np.unique(images * CLASSES // n)))
        shards.append(len(np.unique(np.searchsorted(order.starts, images, side="right"))))
        distances.append(np.abs(np.diff(images)).mean() / (n / 3))
    return {
        "lanes": lanes,
        "shuffle_images": block,
        "classes in a batch": float(np.mean(classes)),
        "shards in a batch": float(np.mean(shards)),
        "distance of neighbours, 1 for a permutation": float(np.mean(distances)),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "shard-order.json")
    arguments = parser.parse_args()
    one_thread()
    order = full_order()
    share = (1 - 1 / CLASSES) ** SMALL_BATCH
    result: dict[str, Any] = {
        "images": len(order),
        "shards": SHARDS,
        "ranks": RANKS,
        "batch": order.batch,
        "lanes": order.lanes,
        "shuffle_images": BLOCK,
        "plan": measure_plan(),
        "rows": measure_rows(order),
        "fetches": measure_fetches(order),
        "sampled lanes": sample_coverage(order),
        "small case": count_small(),
        "mixing": [
            measure_mixing(lanes, block) for lanes in (8, 32, 128) for block in (1024, BLOCK, 16384)
        ],
        "classes": CLASSES,
        "classes in a batch of a permutation": CLASSES * (1 - share),
    }
    for name, value in result.items():
        print(name, value)
    write(arguments.out, "cpu", **result)


if __name__ == "__main__":
    main()
