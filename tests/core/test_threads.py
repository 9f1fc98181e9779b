"""Work in threads: results in order, and no more begun than is needed soon."""

from __future__ import annotations

import threading
import time

import pytest

from mezzotint.core.threads import AHEAD, map_in_order


def test_results_are_in_the_order_of_the_items():
    def work(i: int) -> int:
        time.sleep(0.001 * (i % 3))  # later items are done first
        return 2 * i

    assert list(map_in_order(work, range(40), 4)) == list(range(0, 80, 2))
    assert list(map_in_order(work, [], 4)) == []


def test_few_items_are_taken_ahead():
    taken, lock = [], threading.Lock()

    def items():
        for i in range(100):
            with lock:
                taken.append(i)
            yield i

    results = map_in_order(lambda i: i, items(), 2)
    assert next(results) == 0
    assert len(taken) <= 2 * AHEAD + 1


def test_an_error_comes_in_its_place():
    def work(i: int) -> int:
        if i == 3:
            raise ValueError("the third")
        return i

    results = map_in_order(work, range(9), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the third"):
        next(results)
