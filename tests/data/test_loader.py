"""The data order, and batches that follow it whatever loads them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mezzotint.data.image_dataset import ImageDataset, open_images
from mezzotint.data.loader import LoadedBatch, load_batches
from mezzotint.data.shuffle import shuffled_indices


def take(count: int, stream) -> list[LoadedBatch]:
    found = list(itertools.islice(stream, count))
    stream.close()
    return found


def same(a: list[LoadedBatch], b: list[LoadedBatch]) -> bool:
    return all(
        torch.equal(x, y)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p[:3], q[:3], strict=True)
    )


@pytest.fixture
def dataset(tmp_path) -> ImageDataset:
    """23 random images in two classes, two of them damaged."""
    rng = np.random.default_rng(0)
    for i in range(23):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png"
        )
    for name in ("a/04.png", "b/21.png"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:300])
    return open_images(tmp_path, size=16)


def permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    return shuffled_indices(seed, epoch * n, n, n)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), st.integers(0, 5), st.integers(1, 200))
def test_an_epoch_visits_every_image_once(seed, epoch, n):
    assert torch.equal(permutation(seed, epoch, n).sort().values, torch.arange(n))


def test_epochs_and_seeds_differ():
    assert not torch.equal(permutation(0, 0, 100), permutation(0, 1, 100))
    assert not torch.equal(permutation(0, 0, 100), permutation(1, 0, 100))


def test_a_caller_cannot_change_the_cached_order():
    permutation(0, 0, 100).zero_()
    assert permutation(0, 0, 100).any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.integers(0, 90), st.integers(1, 40))
def test_any_range_is_a_slice_of_the_whole_order(start, count, n):
    whole = torch.cat([permutation(3, epoch, n) for epoch in range((start + count) // n + 1)])
    assert torch.equal(shuffled_indices(3, start, count, n), whole[start : start + count])


def test_resuming_at_an_image_number_gives_the_same_batches(dataset):
    whole = take(12, load_batches(dataset, seed=5, start_image=0, batch=6))
    rest = take(7, load_batches(dataset, seed=5, start_image=30, batch=6))
    assert same(whole[5:], rest)
    assert rest[0].image_numbers.tolist() == list(range(30, 36))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_ranks_share_each_batch_in_order(dataset, world):
    whole = take(9, load_batches(dataset, seed=1, start_image=12, batch=6))
    parts = [
        take(9, load_batches(dataset, seed=1, start_image=12, batch=6, rank=r, world=world))
        for r in range(world)
    ]
    joined = [
        LoadedBatch(*(torch.cat(f) for f in zip(*(part[:3] for part in step), strict=True)))
        for step in zip(*parts, strict=True)
    ]
    assert same(whole, joined)


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_threads_changes_nothing(dataset, workers):
    one = take(20, load_batches(dataset, seed=2, start_image=7, batch=8))
    assert same(
        one, take(20, load_batches(dataset, seed=2, start_image=7, batch=8, workers=workers))
    )


def test_an_unreadable_image_is_replaced_by_the_next_and_named(dataset):
    pixels, labels = dataset.batch(range(23))
    names = [dataset.name(i) for i in range(23)]
    bad = [names.index(name) for name in ("a/04.png", "b/21.png")]
    assert set(dataset.report.unreadable) == {"a/04.png", "b/21.png"}
    assert "truncated" in str(dataset.report)
    assert "2 unreadable: " in str(dataset.report)
    for i in bad:
        replacement = dataset.readable(i)
        assert replacement == (i + 1) % 23
        assert torch.equal(pixels[i], dataset.image(replacement))
        assert labels is not None
        assert labels[i] == dataset.label(replacement)
        with pytest.raises(ValueError, match=r"\.png cannot be read: .*truncated"):
            dataset.image(i)


def test_processes_give_the_batches_of_threads_and_report_unreadable_images(dataset, tmp_path):
    threads = take(9, load_batches(dataset, seed=2, start_image=0, batch=4))
    fresh = open_images(tmp_path, size=16)
    assert not fresh.report.unreadable
    assert same(
        threads, take(9, load_batches(fresh, seed=2, start_image=0, batch=4, processes=True))
    )
    assert set(fresh.report.unreadable) == {"a/04.png", "b/21.png"}


def test_a_killed_worker_is_a_clear_error(dataset):
    stream = load_batches(dataset, seed=2, start_image=0, batch=4, processes=True)
    next(stream)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"worker process died.*same command"):
        take(50, stream)


def test_an_error_in_a_worker_thread_is_raised(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = open_images(tmp_path, size=8, keep_in_memory=False)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.png .*cannot be read"):
        next(load_batches(images, seed=0, start_image=0, batch=2))


def test_a_dataset_pickles_without_its_pixels(dataset):
    dataset.batch(range(23))
    data = pickle.dumps(dataset)
    assert len(data) < 10_000
    again = pickle.loads(data)
    assert torch.equal(again.batch(range(23))[0], dataset.batch(range(23))[0])
    assert again.fingerprint == dataset.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 2, "world": 3}, "batch 2 .*ranks, 3.*batch=3, or start at most 2"),
        ({"batch": 0}, "batch 0"),
        ({"batch": 4, "world": 2, "rank": 2}, "rank 2 of 2"),
        ({"batch": 4, "workers": 0}, "workers 0"),
        ({"batch": 4, "start_image": -1}, "start_image -1"),
    ],
)
def test_impossible_batches_are_refused_at_once(dataset, options, words):
    with pytest.raises(ValueError, match=words):
        load_batches(dataset, **{"seed": 0, "start_image": 0, **options})


def test_a_closed_stream_leaves_no_worker(dataset):
    take(2, load_batches(dataset, seed=2, start_image=0, batch=4, processes=True))
    assert not multiprocessing.active_children()
