"""Work on many items in threads, with results in the order of the items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
AHEAD = 4  # items in flight for each thread


def map_in_order(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """Yield `work(item)` of every item, in order; at most AHEAD * threads items are in flight."""
    with ThreadPoolExecutor(threads) as pool:
        in_flight: deque[Future[B]] = deque()
        for item in items:
            in_flight.append(pool.submit(work, item))
            if len(in_flight) > AHEAD * threads:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
