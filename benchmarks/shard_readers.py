"""Compare the libraries that read shards: order, resume, change of ranks, rate, damage.

    pip install datasets s3fs torchdata webdataset litdata megatron-energon  # in an environment
    OMP_NUM_THREADS=1 python benchmarks/shard_readers.py --source eurosat64.zip --rclone rclone \\
        --out benchmarks/results/shard-readers.json

Every measurement runs in a process of its own. Rates are of one worker process over an epoch of the
stored bytes, not decoded, from the disk and from a local S3 server; processor time counts the
process, its workers and the programs that they start. The other measurements use 3,200 images of
EuroSAT, sorted by class, in 32 shards, and batches of 64 over all ranks.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import RESULTS, one_thread, write
from shard_libraries import LIBRARIES, Settings
from shard_sets import BUCKET, ImageSet, Row, eurosat, photographs, serve, write_set
from shard_upkeep import NOT_RUN, STORES, describe_library

Batches = list[list[int]]
STEPS = 20  # steps before an interruption, of 50
SECONDS = 90.0  # that a measurement may take
ENERGON = "megatron.energon"
SMALL, UNEVEN = [100] * 32, [100, 50] * 16 + [30]


def in_process(work: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Return what `work` returns in a forked process, or raise the text of its error."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_send, args=(work, theirs))
    process.start()
    theirs.close()
    try:
        answer = ours.recv() if ours.poll(seconds) else f"no end after {seconds:g} s"
    except EOFError:
        answer = "the process died"
    with suppress(ProcessLookupError):  # its workers, which may outlive it
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer[0]


def _send(work: Callable[[], Any], out: Connection) -> None:
    os.setsid()
    try:
        out.send((work(),))
    except BaseException as error:  # every library raises its own
        # A worker's error ends with its own line.
        line = next((n for n in reversed(str(error).splitlines()) if n.strip()), "")
        out.send(
            line[:200]
            if "Original Traceback" in str(error)
            else f"{type(error).__name__}: {line[:180]}"
        )
    out.close()
    os._exit(0)


def numbers(batches: Batches) -> list[int]:
    """Return the images of all batches in order."""
    return list(chain.from_iterable(batches))


def read(library: str, settings: Settings, state: Any = None, steps: int | None = None) -> Any:
    """Return (batches, classes of each batch, state) after `steps`, or to the end of the epoch.

    A state is bytes, as in a checkpoint.
    """
    shutil.rmtree(settings.cache, ignore_errors=True)
    settings.cache.mkdir(parents=True)
    reader = LIBRARIES[library](settings)
    batches, classes = [], []
    for batch in islice(reader.batches(pickle.loads(state) if state else None), steps):
        batches.append([number for number, _, _ in batch])
        classes.append(len({label for _, label, _ in batch}))
    return batches, classes, pickle.dumps(reader.state())


@functools.cache
def read_epoch(library: str, settings: Settings) -> tuple[Batches, list[int]]:
    """Return the batches of an epoch on one rank, and the classes of each."""
    return in_process(partial(read, library, settings))[:2]


def read_ranks(
    library: str, settings: Settings, world: int, states: list[bytes] | None = None
) -> list[Batches]:
    """Return the batches of every rank, which takes its state of `states`, from the first step."""
    ranks = []
    for rank in range(world):
        mine = replace(settings, rank=rank, world=world)
        state = states[rank] if states else None
        ranks.append(in_process(partial(read, library, mine, state))[0])
    return ranks


def read_rest(library: str, settings: Settings, world: int, states: list[bytes]) -> list[Batches]:
    """Return what `world` ranks read after `states`."""
    states = in_process(partial(LIBRARIES[library].change_ranks, states, world))
    return read_ranks(library, settings, world, states)


def count_epoch(total: int, ranks: list[Batches]) -> dict[str, int]:
    """Return how many images of an epoch were not read, and how many more than once."""
    seen = Counter(number for rank in ranks for number in numbers(rank))
    return {
        "missing": total - len(seen),
        "repeated": sum(count > 1 for count in seen.values()),
    }


def measure_order(library: str, settings: Settings) -> dict[str, Any]:
    """Return what the order depends on, and how well it mixes the classes."""
    whole, classes = read_epoch(library, settings)
    same = partial(_same_order, library, numbers(whole))
    result: dict[str, Any] = {
        "same seed, same order": same(settings),
        "another seed, another order": not same(replace(settings, seed=7)),
        "same order with 1 and 2 workers": same(replace(settings, workers=2)),
        "classes in a batch": sum(classes) / len(classes),
    }
    for world in (2, 4):
        ranks = read_ranks(library, settings, world)
        first = [set(numbers(rank[:10])) for rank in ranks]
        result[f"same first 10 batches with {world} ranks"] = set().union(*first) == set(
            numbers(whole[:10])
        )
        result[f"epoch on {world} ranks"] = count_epoch(settings.images.total, ranks)
    return result


def _same_order(library: str, expected: list[int], settings: Settings) -> bool:
    return numbers(in_process(partial(read, library, settings))[0]) == expected


def measure_resume(library: str, settings: Settings) -> dict[str, Any]:
    """Return whether a run that stops twice reads the epoch as one that does not."""
    whole, _ = read_epoch(library, settings)
    parts: Batches = []
    state = None
    for steps in (STEPS, STEPS // 2, None):
        batches, _, state = in_process(partial(read, library, settings, state, steps))
        parts += batches
        if steps == STEPS:
            size = len(state)
    return {
        "resumes exactly": parts == whole,
        **count_epoch(settings.images.total, [parts]),
        "bytes of a rank's state": size,
    }


def measure_ranks(library: str, settings: Settings) -> dict[str, Any]:
    """Return what becomes of an epoch that two ranks begin and another number of ranks ends.

    A rank has one worker; or there are four workers in all, before and after.
    """
    result = {}
    for total in (None, 4):
        begun, states = [], []
        for rank in range(2):
            workers = total // 2 if total else 1
            mine = replace(settings, rank=rank, world=2, workers=workers)
            batches, _, state = in_process(partial(read, library, mine, None, STEPS))
            begun.append(batches)
            states.append(state)
        for world in (1, 4):
            mine = replace(settings, workers=total // world if total else 1)
            rest = attempt(partial(read_rest, library, mine, world, states))
            name = f"2 ranks, then {world}" + (", 4 workers in all" if total else "")
            counts = (
                rest if isinstance(rest, str) else count_epoch(settings.images.total, begun + rest)
            )
            result[name] = counts
    return result


def attempt(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or the text of its error."""
    try:
        return work()
    except RuntimeError as error:
        return str(error)


def measure_damage(library: str, settings: Settings) -> dict[str, Any]:
    """Return what a missing, a cut and an altered shard do to an epoch."""
    result = {}
    for kind in ("missing", "cut", "altered"):
        folder = settings.images.folder.with_name(f"{settings.images.name}-{kind}")
        shutil.copytree(settings.images.folder, folder, dirs_exist_ok=True)
        damaged = replace(settings, images=replace(settings.images, folder=folder))
        for path in folder.glob("*/*"):
            if path.stem.endswith(("-00016", "-0-16")):
                _damage(path, kind)
        found = attempt(partial(in_process, partial(read, library, damaged), 40))
        result[kind] = found if isinstance(found, str) else f"{len(numbers(found[0])):,} images"
        shutil.rmtree(folder)
    return result


def _damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    path.unlink()
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    if kind == "altered":
        data[len(data) // 2 : len(data) // 2 + 16] = bytes(16)
        path.write_bytes(data)


def measure_uneven(library: str, settings: Settings) -> dict[str, Any]:
    """Return the images of each of two ranks where shards hold unequal numbers of them."""
    ranks = read_ranks(library, settings, 2)
    images = [len(numbers(rank)) for rank in ranks]
    return {"images of each rank": images, **count_epoch(settings.images.total, ranks)}


def measure_rate(library: str, settings: Settings) -> dict[str, float]:
    """Return images per second of wall and of processor time over an epoch."""
    start, spent = time.perf_counter(), _processor_seconds()
    batches, _, _ = read(library, settings)
    seconds, images = time.perf_counter() - start, len(numbers(batches))
    gc.collect()  # ends the workers
    for process in multiprocessing.active_children():
        process.join(5)
    return {"wall": images / seconds, "processor": images / (_processor_seconds() - spent)}


def _processor_seconds() -> float:
    """Return the processor time of this process and of those that it started and that ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, kinds))


def measure_restart(library: str, settings: Settings) -> dict[str, float]:
    """Return the processor seconds to the first batch, at the start and within an epoch."""
    steps = settings.images.total // settings.batch
    seconds = {}
    state = None
    for share in (0, 10, 90):
        if share:
            state = in_process(partial(read, library, settings, None, steps * share // 100))[2]
        seconds[f"{share} %"] = in_process(partial(_seconds_to_batch, library, settings, state))
    return seconds


def _seconds_to_batch(library: str, settings: Settings, state: Any) -> float:
    start = _processor_seconds()
    read(library, settings, state, 1)
    return _processor_seconds() - start


def measure_rates(sets: list[ImageSet], settings: Settings, rounds: int) -> list[dict[str, Any]]:
    """Return a row for every library, set and place; libraries take turns."""
    rows = [
        {"library": library, "images": images.name, "place": "S3" if images.endpoint else "disk"}
        for images in sets
        for library in LIBRARIES
    ]
    for _ in range(rounds):
        for row, images in zip(rows, (i for i in sets for _ in LIBRARIES), strict=True):
            mine = replace(settings, images=images, workers=1)
            found = attempt(partial(in_process, partial(measure_rate, row["library"], mine)))
            row.setdefault("rounds", []).append(found)
            print(row["library"], images.name, row["place"], found, flush=True)
    return rows


def write_sets(source: Path, folder: Path) -> dict[str, ImageSet]:
    """Write the four sets of images."""
    small = list(eurosat(source, 8))[: sum(SMALL)]
    large = list(eurosat(source, 3))
    sets: dict[str, tuple[list[Row], list[int]]] = {
        "small": (small, SMALL),
        "uneven": (small[: sum(UNEVEN)], UNEVEN),
        "eurosat-64": (large, [len(large) // 9] * 9),
        "jpeg-256": (list(photographs(2000)), [250] * 8),
    }
    return {
        name: in_process(partial(write_set, name, rows, counts, folder), 240)
        for name, (rows, counts) in sets.items()
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="zip archive of EuroSAT")
    parser.add_argument("--rclone", type=Path, required=True, help="program that serves S3")
    parser.add_argument("--only", nargs="*", help="libraries to measure")
    parser.add_argument("--works", nargs="*", help="measurements to make, such as ranks")
    parser.add_argument("--port", type=int, default=9124)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "shard-readers.json")
    arguments = parser.parse_args()
    for name in set(LIBRARIES) - set(arguments.only or LIBRARIES):
        del LIBRARIES[name]
    one_thread()
    for module in ("datasets", "torchdata.stateful_dataloader", "webdataset", "litdata", ENERGON):
        importlib.import_module(module)  # once, for all processes
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the sets, serve them, and measure every library; keep what others measured before."""
    sets = write_sets(arguments.source, folder / BUCKET)
    server, endpoint = serve(folder, arguments.rclone, arguments.port)
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    libraries, rates = found.get("libraries", {}), found.get("rates", [])
    content = {
        "sets": {s.name: {"images": s.total, "shards": len(s.counts)} for s in sets.values()},
        "libraries": libraries,
        "rates": rates,
        "upkeep": {name: describe_library(name) for name in STORES},
        "not_run": NOT_RUN,
    }
    try:
        settings = Settings(sets["small"], folder / "cache", workers=1, buffer=500)
        large = [sets["eurosat-64"], sets["jpeg-256"]]
        stored = [replace(images, endpoint=endpoint) for images in large]
        for library in LIBRARIES:
            # Without a worker, its processor time is that of the process.
            restart = replace(settings, images=stored[1], buffer=1000, workers=0)
            uneven = replace(settings, images=sets["uneven"])
            works = {
                "order": partial(measure_order, library, settings),
                "resume": partial(measure_resume, library, settings),
                "ranks": partial(measure_ranks, library, settings),
                "uneven": partial(measure_uneven, library, uneven),
                "damage": partial(measure_damage, library, settings),
                "processor seconds to the first batch": partial(measure_restart, library, restart),
            }
            chosen = arguments.works or works
            done = libraries.setdefault(library, {})
            done |= {name: attempt(works[name]) for name in works if name in chosen}
            print(library, libraries[library], flush=True)
            write(arguments.out, "cpu", **content)
        if arguments.rounds:
            wide = replace(settings, buffer=1000)
            rates[:] = measure_rates([*large, *stored], wide, arguments.rounds)
            write(arguments.out, "cpu", **content)
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
