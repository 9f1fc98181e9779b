"""Batches of a run from any sample number on, decoded ahead of the training loop by threads or processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float16, Int64, UInt8
from torch import Tensor

from mezzotint.data.bucketed_dataset import BucketedDataset
from mezzotint.data.latent_dataset import Dataset
from mezzotint.data.shuffle import shuffled_indices


class LoadedBatch(NamedTuple):
    """One rank's part of a batch.

    numbers: sample numbers in the run, counted from 0 over all epochs; what the draws of noise and level are keyed by.
    pixels: what the set's `batch` gives and its `to_model` takes: uint8 pixels, or float16 moments of latents.
    labels: class indices, None for a set without labels.
    text, text_mask: embedded captions and where they hold words, None for a set without.
    """

    numbers: Int64[Tensor, " b"]
    pixels: UInt8[Tensor, "b c h w"] | Float16[Tensor, "b view 2 c h w"]
    labels: Int64[Tensor, " b"] | None
    text: Float16[Tensor, "b t d"] | None = None
    text_mask: Bool[Tensor, "b t"] | None = None


def load_batches(
    images: Dataset,
    *,
    seed: int,
    start_image: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 1,
    processes: bool = False,
) -> Iterator[LoadedBatch]:
    """Endless batches from sample number `start_image` on; what they hold depends on neither `workers` nor `processes`.

    Args:
        images: the set; what a worker finds unreadable is noted in its report.
        seed: of the data order, see `mezzotint.data.shuffle`.
        start_image: images seen so far by the run, all ranks together.
        batch: images per step over all ranks; a multiple of `world`.
        rank: this process's number, 0...world-1; it gets the contiguous slice `rank` of every batch.
        world: number of ranks.
        workers: how many load at once; each is at most two batches ahead.
        processes: use spawned processes instead of threads; worth it where decoding is slower than the training step
            and holds Python's lock. Memory kept by the set is then kept once per worker.

    Raises:
        RuntimeError: a worker process died.
    """
    if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
        least = max(1, round(batch / max(world, 1))) * max(world, 1)
        raise ValueError(
            f"batch {batch} cannot be shared by rank {rank} of {world} ranks evenly; try batch {least}"
        )
    if workers < 1:
        raise ValueError(f"workers {workers}; at least 1 loads ahead of the loop")
    if start_image < 0:
        raise ValueError(f"start_image {start_image} is negative")
    share = batch // world
    return _ahead(
        images,
        partial(_numbers, images, seed, start_image + rank * share, batch, share),
        workers,
        processes,
    )


def _numbers(
    images: Dataset, seed: int, start: int, batch: int, share: int, step: int
) -> tuple[Tensor, Tensor]:
    """Sample numbers of this rank's part of batch number `step`, and the pictures they show."""
    first = start + step * batch
    if isinstance(images, BucketedDataset):
        return torch.arange(first, first + share), images.indices(seed, first, share, batch)
    return torch.arange(first, first + share), shuffled_indices(seed, first, share, len(images))


def _ahead(
    images: Dataset, plan: Callable[[int], tuple[Tensor, Tensor]], workers: int, processes: bool
) -> Iterator[LoadedBatch]:
    """Load steps 0, 1, ... with `workers`, twice as many in flight, and hand them out in order."""
    pool, load = _pool(images, workers, processes)
    cuda = torch.cuda.is_available()

    def tensor(
        array: np.ndarray,
    ) -> Tensor:  # only pinned memory is copied to a GPU without waiting
        return torch.from_numpy(array).pin_memory() if cuda else torch.from_numpy(array)

    flying: deque[tuple[Tensor, Future[Loaded]]] = deque()
    step = 0
    try:
        while True:
            while len(flying) < 2 * workers:
                numbers, chosen = plan(step)
                flying.append((numbers, pool.submit(load, chosen.tolist())))
                step += 1
            numbers, future = flying.popleft()
            arrays, unreadable = future.result()
            images.mark_unreadable(unreadable)
            pixels, *others = arrays
            yield LoadedBatch(
                numbers,
                tensor(pixels),
                *(None if array is None else tensor(array) for array in others),
            )
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a data worker process died (killed, or out of memory?); the run so far is sound: start it again with the "
            "same command, with fewer workers or with threads if this repeats"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# Arrays, since tensors would cross processes in shared memory, which containers keep small.
Loaded = tuple[
    list[Any], dict[int, str]
]  # the fields of `Batch` after `numbers`; unreadable samples


def _pool(
    images: Dataset, workers: int, processes: bool
) -> tuple[Executor, Callable[[list[int]], Loaded]]:
    if not processes:
        return ThreadPoolExecutor(workers, thread_name_prefix="mezzotint-data"), partial(
            _load, images
        )
    # Spawned, not forked: a fork of a process with CUDA or OpenMP threads may hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_adopt, initargs=(images,)
    ), _load_adopted


def _load(images: Dataset, chosen: list[int]) -> Loaded:
    fields: list[Tensor | None] = list(images.batch(chosen))
    unreadable = images.unreadable()
    if images.words is not None:  # a caption goes with the picture that is shown
        fields += images.words.batch([images.readable(i) if i in unreadable else i for i in chosen])
    return [None if t is None else t.numpy() for t in fields], unreadable


_adopted: list[Dataset] = []  # of a worker process


def _adopt(images: Dataset) -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _adopted[:] = [images]


def _leave_with_parent() -> None:
    """End this worker when the process it works for is gone, killed perhaps: it would wait for orders for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker was started by someone"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _load_adopted(chosen: list[int]) -> Loaded:
    return _load(_adopted[0], chosen)
