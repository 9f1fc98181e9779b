"""Fetch shards in the background, before a batch needs them."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable

THREADS = 4
Block = tuple[int, int, int]  # of `shard_order.ShardOrder`


class ShardFetcher:
    """Threads that fetch the shards of blocks, each block once.

    Args:
        fetch: fetches a shard, by number; its failure shows when the shard is read.
        remembered: blocks that are not asked for again; more than are in use at once.
    """

    def __init__(self, fetch: Callable[[int], None], remembered: int):
        self.fetch_shard, self.remembered = fetch, remembered
        self._blocks: OrderedDict[Block, None] = OrderedDict()
        self._wanted: queue.SimpleQueue[int | None] | None = None

    def fetch(self, block: Block, shards_of: Callable[[Block], Iterable[int]]) -> None:
        """Fetch the shards of a block, unless that was asked for before; return at once."""
        if block in self._blocks:
            return
        self._blocks[block] = None
        while len(self._blocks) > self.remembered:
            self._blocks.popitem(last=False)
        if self._wanted is None:
            self._wanted = _start_threads(self.fetch_shard)
            weakref.finalize(self, _stop_threads, self._wanted)
        for shard in shards_of(block):
            self._wanted.put(shard)


def _start_threads(fetch: Callable[[int], None]) -> queue.SimpleQueue[int | None]:
    """Return the queue of the shards that the threads fetch, in order."""
    wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()

    def work() -> None:
        while (shard := wanted.get()) is not None:
            # Of any type, e.g. credentials that ended: the read itself reports it.
            with contextlib.suppress(Exception):
                fetch(shard)

    # Daemons: what is fetched ahead must not hold up the end of the process.
    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True, name="mezzotint-shards").start()
    return wanted


def _stop_threads(wanted: queue.SimpleQueue[int | None]) -> None:
    for _ in range(THREADS):
        wanted.put(None)
