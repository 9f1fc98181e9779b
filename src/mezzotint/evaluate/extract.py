"""Values per image, computed in pieces on all ranks and resumable; features of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.core.distributed import all_ranks, gather_to_rank0, get_rank, get_world_size
from mezzotint.core.npz_files import read_npz, write_npz
from mezzotint.core.progress import ProgressBar
from mezzotint.evaluate.features import NETWORK_BATCH, FeatureSet, compute_features
from mezzotint.evaluate.image_source import ImageSource

MAX_PIECE_IMAGES = 512
MIN_PIECES = 64  # so that many ranks have work, as long as a piece fills a network batch

Features = dict[str, Tensor]
Piece = tuple[int, int]  # first image, last image + 1


def piece_images(num_images: int) -> int:
    """Return the images per piece, for any number of ranks the same, so that any can resume."""
    batches = max(1, num_images // (MIN_PIECES * NETWORK_BATCH))
    return min(MAX_PIECE_IMAGES, NETWORK_BATCH * batches)


def extract_features(
    source: ImageSource,
    sets: Sequence[FeatureSet],
    folder: str | Path | None = None,
    show: bool = False,
) -> Features | None:
    """Return features of every image of `source` on rank 0, None on the others.

    Each is (num_images, dims) float32, in the order of the images. An image's features depend on
    that image alone, so the result is bitwise the same for any number of ranks, interrupted or not.

    Args:
        folder: store finished pieces there and reuse those found. Needs `source.identity`, and all
            ranks must see the folder. None: keep everything in memory.
        show: show progress on rank 0.

    Errors: ValueError for bad images; `RankFailed` on the other ranks.
    """
    if source.num_images < 2:
        raise ValueError(f"{source.name} has {source.num_images} images; at least two are needed")

    def compute(start: int, stop: int) -> Features:
        features = compute_features(sets, source.batches(start, stop))
        count = len(features[sets[0].name])
        if count != stop - start:
            raise ValueError(
                f"{source.name} gave {count} images for indices {start} ... {stop - 1}"
            )
        return features

    def key() -> str:
        if source.identity is None:
            raise ValueError(
                f"{source.name} has no identity, so its pieces cannot be told from those of other "
                "images; give no folder"
            )
        count = source.num_images
        return json.dumps([source.identity, count, piece_images(count), *(s.hash for s in sets)])

    names = [s.name for s in sets]
    title = f"features of {source.name}"
    return compute_by_piece(compute, names, source.num_images, title, folder, key, show)


def with_resolution(source: ImageSource) -> ImageSource:
    """Return the source with its resolution, that of the first two images where it is unknown."""
    if source.resolution is not None or source.num_images < 2:
        return source
    images = next(iter(source.batches(0, 2)))
    _, channels, height, width = images.shape
    return dataclasses.replace(source, resolution=(height, width), channels=channels)


def compute_by_piece(
    compute: Callable[[int, int], Features],
    names: Sequence[str],
    num_images: int,
    title: str,
    folder: str | Path | None,
    key: Callable[[], str],
    show: bool,
) -> Features | None:
    """Return `compute` of all images on rank 0, row by row; None on the other ranks.

    Rank r computes every world-size-th piece from the r-th on. All ranks call this together.

    Args:
        compute: (start, stop) -> tensors by name, a row for each image start ... stop - 1; it must
            not communicate.
        names: of the tensors.
        title: of the progress on rank 0, if `show`.
        folder: store finished pieces there and reuse those found; all ranks must see it. None:
            keep everything in memory.
        key: text that identifies the values among those of other images or settings.

    Errors: those of `compute`; `RankFailed` on the other ranks.
    """
    size = piece_images(num_images)
    starts = range(0, num_images, size)
    pieces = [(start, min(num_images, start + size)) for start in starts]
    own = pieces[get_rank() :: get_world_size()]
    store = all_ranks(lambda: None if folder is None else _open_store(Path(folder), key()))

    def compute_own() -> dict[Piece, Features]:
        """Compute this rank's pieces; with a store, write them to it and return none."""
        computed: dict[Piece, Features] = {}
        total = sum(stop - start for start, stop in own)
        with ProgressBar(title, total, show=show and get_rank() == 0) as bar:
            for start, stop in own:
                path = None if store is None else _piece_path(store, (start, stop))
                if path is None:
                    computed[start, stop] = compute(start, stop)
                elif not path.is_file():
                    values = compute(start, stop)
                    write_npz(path, {name: rows.numpy() for name, rows in values.items()})
                bar.advance(stop - start)
        return computed

    computed = all_ranks(compute_own)
    if store is not None:
        is_rank0 = get_rank() == 0
        return all_ranks(lambda: _read_pieces(store, pieces, names) if is_rank0 else None)
    gathered = gather_to_rank0(computed)
    if gathered is None:
        return None
    by_piece = {piece: values for part in gathered for piece, values in part.items()}
    return _concatenate([by_piece[piece] for piece in pieces])


def _open_store(folder: Path, key: str) -> Path:
    """Make the folder for the pieces of a key."""
    store = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    store.mkdir(parents=True, exist_ok=True)
    return store


def _piece_path(store: Path, piece: Piece) -> Path:
    return store / f"{piece[0]:08d}-{piece[1]:08d}.npz"


def _read_pieces(store: Path, pieces: Sequence[Piece], names: Sequence[str]) -> Features:
    arrays = [read_npz(_piece_path(store, piece), names) for piece in pieces]
    return _concatenate([{k: torch.from_numpy(v) for k, v in part.items()} for part in arrays])


def _concatenate(parts: Sequence[Features]) -> Features:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
