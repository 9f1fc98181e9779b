"""Sample many images into files: over ranks, resumable, with a card that records how.

Image i depends on its own seed alone: its label, its noise and every random draw. So any rank can
make any image, and a command that was killed makes what is missing when it runs again.
"""

from __future__ import annotations

import errno
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from mezzotint.core.distributed import (
    World,
    all_ranks,
    init_distributed,
    on_rank0,
    shutdown_distributed,
)
from mezzotint.core.files import format_bytes, is_special
from mezzotint.core.progress import ProgressBar
from mezzotint.sampling.job import SamplingJob, check_network, check_sampler
from mezzotint.sampling.writers import make_writer


def generate_images(
    job: SamplingJob,
    out: str | Path,
    num_images: int,
    first_seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Sample images of seeds first_seed ... first_seed + num_images - 1 into `out`.

    The same call again makes what is missing. Under torchrun every rank makes a share; all ranks
    must see `out`.

    Args:
        out: see `writers.make_writer`.

    Errors: ValueError for an `out` that exists or was begun with other settings. OSError if the
        disk is or becomes too full; finished images stay. An error on one rank ends all of them.
    """
    if num_images < 1 or first_seed < 0:
        raise ValueError(
            f"num_images {num_images} must be at least 1, seed {first_seed} at least 0"
        )
    world = init_distributed()
    try:
        seeds = range(first_seed, first_seed + num_images)
        _generate(job, Path(out), seeds, world, overwrite, quiet)
    finally:
        shutdown_distributed()
    return Path(out)


def _generate(
    job: SamplingJob, out: Path, seeds: range, world: World, overwrite: bool, quiet: bool
) -> None:
    describe = job.describe_image if job.prompts else None
    writer = make_writer(out, job.model.info.labels, job.codec is None, describe, job.sizes())

    def open_writer() -> list[Sequence[int]]:
        check_sampler(job)
        check_network(job)
        writer.open(job.card(len(seeds), seeds.start), overwrite)
        missing = writer.missing(seeds)
        _check_free_space(out, writer.bytes_needed(seeds, len(missing), _bytes_per_image(job)))
        return batches_by_size(job, missing)

    def write(batch: Sequence[int], images: Tensor) -> None:
        labels, start = job.labels(batch), 0
        with _explain_full_disk(out):
            for run in consecutive_batches(batch, len(batch)):
                part = slice(start, start + len(run))
                writer.write(run, images[part], None if labels is None else labels[part])
                start = part.stop

    def close_writer() -> None:
        with _explain_full_disk(out):
            writer.close(seeds, job.labels(seeds))

    batches = on_rank0(open_writer, world)
    done, show = len(seeds) - sum(map(len, batches)), world.is_rank0 and not quiet
    with (
        ProgressBar("sampling", len(seeds), done, show=show) as bar,
        BackgroundWriter(write) as background,
    ):

        def draw_batch(shares: Sequence[Sequence[int]]) -> None:
            if world.rank < len(shares):
                batch = shares[world.rank]
                background.put(batch, job.draw(batch))

        # One batch per rank, then all wait for each other: an error on one rank ends all of them.
        for start in range(0, len(batches), world.size):
            shares = batches[start : start + world.size]
            all_ranks(functools.partial(draw_batch, shares), world)
            done += sum(map(len, shares))
            bar.update(done, line=done == len(seeds))
        all_ranks(background.wait, world)
    on_rank0(close_writer, world)


class BackgroundWriter:
    """Writes batches in a thread, one at a time and in order, while the network computes the next.

    Use it as a context. At its end the last batch is written, also where the network failed.
    """

    def __init__(self, write: Callable[[Sequence[int], Tensor], None]):
        self.write = write
        self.pool = ThreadPoolExecutor(1, "image-writer")
        self.pending: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(wait=True)

    def put(self, batch: Sequence[int], images: Tensor) -> None:
        """Wait until the batch before is written, then start to write this one.

        Errors: those of the batch before.
        """
        self.wait()
        self.pending = self.pool.submit(self.write, batch, images)

    def wait(self) -> None:
        """Wait until everything is written; raise the error of writing it, once."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def batches_by_size(job: SamplingJob, seeds: Sequence[int]) -> list[Sequence[int]]:
    """Return rising seeds as batches of images of one size each."""
    if len(job.sizes()) == 1:
        return [*consecutive_batches(seeds, job.settings.batch)]
    groups: dict[tuple[int, int], list[int]] = {}
    for seed in seeds:
        groups.setdefault(job.size(seed), []).append(seed)
    size = job.settings.batch
    return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]


def consecutive_batches(seeds: Sequence[int], batch: int) -> list[range]:
    """Return rising seeds as ranges of consecutive ones, each at most `batch` long."""
    runs: list[range] = []
    for seed in seeds:
        if runs and runs[-1].stop == seed and len(runs[-1]) < batch:
            runs[-1] = range(runs[-1].start, seed + 1)
        else:
            runs.append(range(seed, seed + 1))
    return runs


@contextmanager
def _explain_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left while writing {out}; finished images stay. Free some space, then run "
            "the same command again",
        ) from error


def _bytes_per_image(job: SamplingJob) -> int:
    config = job.model.info.config
    height, width = max(job.sizes(), key=math.prod)
    if job.decoder is None:
        return 4 * config.channels * height * width
    channels = config.channels if job.codec == "pixels" else 3
    return channels * height * width * job.decoder.factor**2


def _check_free_space(out: Path, needed: int) -> None:
    place = Path().absolute() if is_special(out) else out.absolute()
    parent = next(p for p in [place, *place.parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{out} needs up to {format_bytes(needed)} and {format_bytes(free)} are free; "
            "choose another --out",
        )
