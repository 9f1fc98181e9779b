"""Features of many images in pieces: shared over ranks, kept on disk, taken up where an interruption left them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mezzotint.core.distributed import all_ranks, gather_to_rank0, rank, world_size
from mezzotint.evaluate.features import NETWORK_BATCH, FeatureSet, compute_features
from mezzotint.evaluate.image_source import ImageSource, read_npz

PIECE_IMAGES = 512  # at most
PIECES = 64  # at least, where that leaves whole network batches, so that many ranks have work

Features = dict[str, Tensor]


def piece_images(n: int) -> int:
    """Images in a piece of n; a function of n alone, so that other ranks can take up what is there."""
    return min(PIECE_IMAGES, NETWORK_BATCH * max(1, n // (PIECES * NETWORK_BATCH)))


def extract_features(
    source: ImageSource,
    sets: Sequence[FeatureSet],
    folder: str | Path | None = None,
    show: bool = False,
) -> Features | None:
    """Features of every image of `source`, each (n, dims) float32 in the images' order, on rank 0; None on the others.

    Piece i of `piece_images` images is done by rank i modulo the number of ranks. As an image's features depend on
    nothing but the image, the result is bitwise the same for any number of ranks, interrupted or not.

    Args:
        folder: keep finished pieces there and take up those found, which needs `source.identity`; all ranks must see
            it. None: keep everything in memory.
        show: a progress bar, on rank 0.

    Errors: ValueError for bad images; `ranks.EvaluationFailed` on every rank when there are several.
    """
    if source.n < 2:
        raise ValueError(f"{source.name} has {source.n} images; at least two are needed")
    each = piece_images(source.n)
    pieces = [(first, min(source.n, first + each)) for first in range(0, source.n, each)]
    store = all_ranks(lambda: None if folder is None else _store(Path(folder), source, sets))
    mine = all_ranks(lambda: _work(source, sets, pieces[rank() :: world_size()], store, show))
    if store is not None:
        return all_ranks(
            lambda: _joined([_read(store, p, sets) for p in pieces]) if rank() == 0 else None
        )
    everything = gather_to_rank0(mine)
    if everything is None:
        return None
    found = {p: features for part in everything for p, features in part.items()}
    return _joined([found[p] for p in pieces])


def _work(
    source: ImageSource,
    sets: Sequence[FeatureSet],
    pieces: Sequence[tuple[int, int]],
    store: Path | None,
    show: bool,
) -> dict[tuple[int, int], Features]:
    """Features of these pieces by piece; empty where they went to `store`."""
    done: dict[tuple[int, int], Features] = {}
    with _progress(source, sum(b - a for a, b in pieces), show and rank() == 0) as advance:
        for piece in pieces:
            if store is None or not _file(store, piece).is_file():
                found = compute_features(sets, source.batches(*piece))
                if len(found[sets[0].name]) != piece[1] - piece[0]:
                    raise ValueError(
                        f"{source.name} gave {len(found[sets[0].name])} images for numbers {piece}"
                    )
                if store is None:
                    done[piece] = found
                else:
                    _write(store, piece, found)
            advance(piece[1] - piece[0])
    return done


@contextmanager
def _progress(source: ImageSource, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    if not show:
        yield lambda count: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(f"features of {source.name}", total=total)
        yield lambda count: bar.advance(task, count)


def _store(folder: Path, source: ImageSource, sets: Sequence[FeatureSet]) -> Path:
    if source.identity is None:
        raise ValueError(
            f"{source.name} has no identity, so its pieces could not be told from another's; give no folder"
        )
    key = json.dumps([source.identity, source.n, piece_images(source.n), *(s.hash for s in sets)])
    store = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    store.mkdir(parents=True, exist_ok=True)
    return store


def _file(store: Path, piece: tuple[int, int]) -> Path:
    return store / f"{piece[0]:08d}-{piece[1]:08d}.npz"


def _write(store: Path, piece: tuple[int, int], found: Features) -> None:
    part = store / f"{_file(store, piece).name}.{rank()}.part"
    with open(part, "wb") as file:
        np.savez(file, **{name: rows.numpy() for name, rows in found.items()})  # pyright: ignore[reportArgumentType]
    part.replace(_file(store, piece))


def _read(store: Path, piece: tuple[int, int], sets: Sequence[FeatureSet]) -> Features:
    arrays = read_npz(_file(store, piece), [s.name for s in sets])
    return {name: torch.from_numpy(rows) for name, rows in arrays.items()}


def _joined(parts: Sequence[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
