"""Data loader: starts at any image number, loads ahead in threads or processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mezzotint.data.dataset import Dataset, Labels, Moments, Pixels


class LoadedBatch(NamedTuple):
    """One rank's part of a batch.

    image_numbers: sample numbers in the run, counted from 0 over all epochs; they key the draws of
        noise and level.
    inputs: what the dataset's `batch` returns and its `to_model` takes: uint8 pixels, or float16
        moments of latents.
    labels: class indices, None for a dataset without labels.
    text, text_mask: embedded captions and their mask, None for a dataset without them.
    """

    image_numbers: Int64[Tensor, " b"]
    inputs: Pixels | Moments
    labels: Labels | None
    text: Float[Tensor, "b t d"] | None = None
    text_mask: Bool[Tensor, "b t"] | None = None


# Arrays: tensors would cross processes in shared memory, which is small in containers.
BFLOAT16 = np.dtype("V2")  # two bytes as they are: numpy has no bfloat16
_Loaded = tuple[list[Any], dict[int, str]]  # LoadedBatch after `image_numbers`; unreadable images


def check_batch(batch: int, world: int) -> None:
    """Raise ValueError for a batch with fewer images than ranks."""
    if batch < max(1, world):
        raise ValueError(
            f"batch {batch} has fewer images than there are ranks, {world}; give at least batch="
            f"{max(1, world)}, or start at most {max(1, batch)} ranks"
        )


def share_batch(batch: int, world: int, rank: int) -> slice:
    """Return the images of a batch that a rank gets; ranks differ by one image at most."""
    return slice(batch * rank // world, batch * (rank + 1) // world)


def largest_share(batch: int, world: int) -> int:
    """Return the most images of a batch that one of `world` ranks gets."""
    return -(-batch // world)


def load_batches(
    dataset: Dataset,
    *,
    seed: int,
    start_image: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 1,
    processes: bool = False,
) -> Iterator[LoadedBatch]:
    """Yield batches for ever, from sample number `start_image` on.

    Their content depends on neither `workers` nor `processes`.

    Args:
        dataset: what to load; images that a worker finds unreadable are added to its report.
        seed: of the data order, see `mezzotint.data.shuffle`.
        start_image: images that the run has seen, over all ranks.
        batch: images per step over all ranks; at least `world`.
        rank: number of this process, 0...world-1; it gets its slice of every batch, see
            `share_batch`.
        world: number of ranks.
        workers: how many load at once; each is at most two batches ahead.
        processes: use spawned processes instead of threads. Worth it where decoding holds the GIL
            and is slower than a training step. Each worker then keeps its own decoded images.

    Errors: ChildProcessError, an OSError, when a worker process died.
    """
    if world < 1 or not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} ranks; ranks are numbered from 0")
    check_batch(batch, world)
    if workers < 1:
        raise ValueError(f"workers {workers}; give at least 1")
    if start_image < 0:
        raise ValueError(f"start_image {start_image} is negative")
    own = share_batch(batch, world, rank)
    share = own.stop - own.start
    first = start_image + own.start

    def plan(step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's sample numbers in batch number `step`, and their image indices."""
        start = first + step * batch
        indices = dataset.batch_indices(seed, start, share, batch)
        return torch.arange(start, start + share), indices

    return _prefetch(dataset, plan, workers, processes)


def _prefetch(
    dataset: Dataset, plan: Callable[[int], tuple[Tensor, Tensor]], workers: int, processes: bool
) -> Iterator[LoadedBatch]:
    """Load steps 0, 1, ... with `workers`, twice as many in flight, and yield them in order."""
    pool, load = _start_workers(dataset, workers, processes)

    def to_tensor(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        if array.dtype == BFLOAT16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    in_flight: deque[tuple[Tensor, Future[_Loaded]]] = deque()
    step = 0
    try:
        while True:
            while len(in_flight) < 2 * workers:
                image_numbers, indices = plan(step)
                in_flight.append((image_numbers, pool.submit(load, indices.tolist())))
                step += 1
            image_numbers, future = in_flight.popleft()
            arrays, unreadable = future.result()
            dataset.mark_unreadable(unreadable)
            yield LoadedBatch(image_numbers, *map(to_tensor, arrays))  # pyright: ignore[reportArgumentType]
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a data worker process died (killed, or out of memory?). The run is intact: start it "
            "again with the same command, and with fewer workers or with threads if this repeats"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_workers(
    dataset: Dataset, workers: int, processes: bool
) -> tuple[Executor, Callable[[list[int]], _Loaded]]:
    if not processes:
        threads = ThreadPoolExecutor(workers, thread_name_prefix="mezzotint-data")
        return threads, partial(_load, dataset)
    # Python's tracker of shared resources ignores SIGINT and SIGTERM only; it inherits the rest.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # Spawned, not forked: a fork of a process with CUDA or OpenMP threads may hang.
    pool = ProcessPoolExecutor(
        workers, mp_context=_WorkerContext(), initializer=_init_worker, initargs=(dataset,)
    )
    return pool, _load_in_worker


def _load(dataset: Dataset, indices: list[int]) -> _Loaded:
    fields: list[Tensor | None] = list(dataset.batch(indices))
    unreadable = dataset.unreadable()
    if dataset.caption_embeddings is not None:
        # A replaced image comes with its own caption.
        used = [dataset.readable(i) if i in unreadable else i for i in indices]
        fields += dataset.caption_embeddings.batch(used)
    return [None if t is None else _to_array(t) for t in fields], unreadable


def _to_array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


class _WorkerProcess(SpawnProcess):
    """A process that a broken pool can end, though it ignores SIGTERM."""

    def terminate(self) -> None:
        self.kill()


class _WorkerContext(SpawnContext):
    Process = _WorkerProcess


_worker_dataset: list[Dataset] = []  # of a worker process


def _init_worker(dataset: Dataset) -> None:
    torch.set_num_threads(1)
    # A terminal or a scheduler sends a signal to every process of a run: the parent decides.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_dataset[:] = [dataset]


def _exit_with_parent() -> None:
    """End this worker when its parent is gone, e.g. killed; it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have a parent"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _load_in_worker(indices: list[int]) -> _Loaded:
    return _load(_worker_dataset[0], indices)
