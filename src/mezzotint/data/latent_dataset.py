"""Latents to train on: `LatentImages` reads a folder of `mezzotint.data.encode_latents`, `EncodedImages` makes them anew at
every read. Both round the moments to float16, so that training is bit for bit the same from either.

A folder of latents holds pieces, each complete or absent: `piece-N.npy` float16 (images, 2, 2, channels, side, side),
the axes of length two being picture and mirrored picture, mean and log-variance; `piece-N.json` with names, labels,
captions and sums; `plan.json`, what is being encoded by which codec; and, when all pieces are there, `labels.npy` and
`latents.json`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from mezzotint.core import rng
from mezzotint.core.files import read_json
from mezzotint.data.autoencoder import Codec, check_codec_fits, draw_latents, open_codec
from mezzotint.data.bucketed_dataset import BucketedDataset
from mezzotint.data.caption_embeddings import CaptionEmbeddings
from mezzotint.data.image_dataset import (
    LATENTS,
    ImageDataset,
    Send,
    UnreadableReport,
    check_split,
    open_images,
    split_suffix,
)
from mezzotint.data.sources import NO_LABEL, hash_parts, split_indices
from mezzotint.data.transforms import draw_flips, to_model_range

PLAN = "plan.json"
LABELS = "labels.npy"

Moments = Float16[Tensor, "b view 2 c h w"]  # view 0 is the picture, 1 its mirror image


def encode_moments(space: Codec, pixels: Tensor, mirror: bool) -> Tensor:
    """Moments float16 (views, 2, channels, h, w) of one uint8 picture; the mirror is the mirrored picture's encoding.

    Errors: ValueError for moments that are not numbers or beyond float16.
    """
    x = to_model_range(pixels)
    views = torch.stack([x, x.flip(-1)] if mirror else [x])
    moments = torch.stack(space.encode_moments(views), 1).to("cpu", torch.float16)
    if (
        not torch.isfinite(moments[:, 0]).all()
        or torch.isnan(moments[:, 1]).any()
        or (moments[:, 1] == math.inf).any()
    ):
        raise ValueError(f"codec {space.name} made latents that are not finite in float16")
    return moments


def sample_latents(
    moments: Moments, seed: int, numbers: list[int], mirror: bool, send: Send
) -> Float[Tensor, "b c h w"]:
    """Latents drawn anew for each image number; with `mirror`, half of the numbers show the mirrored picture."""
    view = (
        draw_flips(seed, numbers).long() if mirror else torch.zeros(len(moments), dtype=torch.long)
    )
    chosen = moments[torch.arange(len(moments)), view]
    noise = rng.normal("latent", seed, numbers, tuple(chosen.shape[2:]))
    mean, logvar = send(chosen).unbind(1)
    return draw_latents(mean, logvar, send(noise))


@final
class EncodedDataset:
    """Pictures as moments, encoded at every read: the surface of `Images`, for networks that work on latents."""

    def __init__(self, images: ImageDataset, space: Codec, mirror: bool):
        self.images, self.codec, self.mirror = images, space, mirror
        self.size, self.channels = images.size // space.factor, space.channels
        self.label_names, self.num_classes = images.label_names, images.num_classes
        self.fingerprint = hash_parts([images.fingerprint, space.hash])
        self.report = images.report
        self.words: CaptionEmbeddings | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self, indices: Sequence[int] | Int64[Tensor, " b"]
    ) -> tuple[Moments, Int64[Tensor, " b"] | None]:
        """Moments, without the mirror (view 1) where none was asked for, and labels; see `Images.batch`."""
        pixels, labels = self.images.batch(indices)
        return torch.stack([encode_moments(self.codec, one, self.mirror) for one in pixels]), labels

    def to_model(
        self, loaded: Moments, seed: int, numbers: list[int], mirror: bool, send: Send
    ) -> Float[Tensor, "b c h w"]:
        """See `latents_of`."""
        return sample_latents(loaded, seed, numbers, mirror, send)

    def label(self, i: int) -> int | None:
        """Class index of sample i, or None."""
        return self.images.label(i)

    def text(self, i: int) -> str | None:
        """Caption of sample i, or None."""
        return self.images.text(i)

    def name(self, i: int) -> str:
        """What reports call sample i."""
        return self.images.name(i)

    def readable(self, i: int) -> int:
        """See `Images.readable`."""
        return self.images.readable(i)

    def mark_unreadable(self, found: dict[int, str]) -> None:
        """See `Images.mark_unreadable`."""
        self.images.mark_unreadable(found)

    def unreadable(self) -> dict[int, str]:
        """See `Images.unreadable`."""
        return self.images.unreadable()


@final
class LatentDataset:
    """A folder of latents, or its part "train" or "test" (every tenth): the surface of `Images`.

    codec, codec_hash: what encoded it. size: cells per side. Errors: ValueError for a folder that is incomplete,
    damaged, or of another format.
    """

    def __init__(self, folder: Path, split: str | None = None):
        self.folder = folder.resolve()
        card = read_json(self.folder / LATENTS, "prepare the folder again")
        if card.get("format") != 1:
            raise ValueError(f"{folder} is of format {card.get('format')}, not 1; prepare it again")
        self.codec, self.codec_hash = card["codec"], card["codec_hash"]
        self.size, self.channels = card["size"] // card["factor"], card["channels"]
        self.label_names = tuple(card["label_names"]) if card["label_names"] else None
        self.num_classes = len(self.label_names or ())
        self.statistics: dict[str, Any] = card["statistics"]
        self.rows = split_indices(card["count"], split or "all", None)
        self.fingerprint = hash_parts([card["fingerprint"], self.rows.tobytes()])
        self.report = UnreadableReport(len(self.rows), notes=tuple(card["notes"]))
        self.words: CaptionEmbeddings | None = None
        self._starts = np.cumsum([0, *card["pieces"]])
        self._labels = _labels(self.folder)[self.rows]
        for k in range(len(card["pieces"])):
            if (
                not piece_path(self.folder, k, "npy").is_file()
                or not piece_path(self.folder, k, "json").is_file()
            ):
                raise ValueError(f"{folder} is damaged: piece {k} is gone; prepare it again")

    def __len__(self) -> int:
        return len(self.rows)

    def _place(self, i: int) -> tuple[int, int]:
        """Piece and row within it."""
        if not 0 <= i < len(self):
            raise ValueError(f"sample {i} of a set of {len(self)}")
        row = int(self.rows[i])
        piece = int(np.searchsorted(self._starts, row, side="right")) - 1
        return piece, row - int(self._starts[piece])

    def moments(self, i: int) -> Float16[Tensor, "2 2 c h w"]:
        """Of sample i: (picture and mirror, mean and log-variance, c, h, w)."""
        piece, row = self._place(i)
        stored = _moments(str(self.folder), piece, self.fingerprint)[row].copy()
        if np.isnan(stored).any():
            raise ValueError(
                f"the latents of {self.name(i)} in {self.folder} are not numbers; prepare the folder again"
            )
        return torch.from_numpy(stored)

    def batch(
        self, indices: Sequence[int] | Int64[Tensor, " b"]
    ) -> tuple[Moments, Int64[Tensor, " b"] | None]:
        """Moments of both views, and labels (None for a set without)."""
        chosen = [int(i) for i in indices]
        labels = None if self.label_names is None else torch.from_numpy(self._labels[chosen])
        return torch.stack([self.moments(i) for i in chosen]), labels

    def to_model(
        self, loaded: Moments, seed: int, numbers: list[int], mirror: bool, send: Send
    ) -> Float[Tensor, "b c h w"]:
        """See `latents_of`."""
        return sample_latents(loaded, seed, numbers, mirror, send)

    def label(self, i: int) -> int | None:
        """Class index of sample i, or None."""
        return None if self._labels[i] == NO_LABEL else int(self._labels[i])

    def _cell(self, column: str, i: int) -> Any:
        piece, row = self._place(i)
        return _facts(str(self.folder), piece, self.fingerprint)[column][row]

    def text(self, i: int) -> str | None:
        """Caption of sample i, or None."""
        return self._cell("text", i)

    def name(self, i: int) -> str:
        """The name it had where it came from."""
        return self._cell("name", i)

    def readable(self, i: int) -> int:
        """i: what could not be read was left out when the set was made."""
        return i

    def mark_unreadable(self, found: dict[int, str]) -> None:
        """Nothing: every row is readable."""

    def unreadable(self) -> dict[int, str]:
        """Nothing."""
        return {}


Dataset = (
    ImageDataset | BucketedDataset | LatentDataset | EncodedDataset
)  # what the loop reads; all have the same surface


def codec_of(images: Dataset) -> str:
    """The name of the codec in whose space a set is: "pixels" or an autoencoder's."""
    if isinstance(images, (ImageDataset, BucketedDataset)):
        return "pixels"
    return images.codec if isinstance(images, LatentDataset) else images.codec.name


def piece_path(folder: Path, piece: int, suffix: str) -> Path:
    """One of the two files of a piece."""
    return folder / f"piece-{piece:06d}.{suffix}"


# `key` tells apart what was prepared again at the same place.
@functools.lru_cache(maxsize=4096)
def _moments(folder: str, piece: int, key: str) -> np.ndarray:
    try:
        return np.load(piece_path(Path(folder), piece, "npy"), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder} is damaged: piece {piece}: {error}; prepare it again") from None


@functools.lru_cache(maxsize=16)
def _facts(folder: str, piece: int, key: str) -> dict[str, Any]:
    return read_json(piece_path(Path(folder), piece, "json"), "prepare the folder again")


def _labels(folder: Path) -> np.ndarray:
    try:
        return np.load(folder / LABELS, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder} is damaged: {LABELS}: {error}; prepare it again") from None


def open_dataset(
    source: str,
    *,
    size: int,
    channels: int,
    crop: str,
    space: str = "pixels",
    mirror: bool = False,
    device: torch.device | str = "cpu",
) -> Dataset:
    """What a network of `size` x `size` x `channels` input trains on.

    Args:
        source: a folder of latents, or anything `open_images` takes; latents of the latter are then made at every read.
        size, channels: of the network's input, cells or pixels.
        crop: see `open_images`.
        space: name of the codec the network works in.
        mirror: whether mirrored pictures will be asked for.
        device: where pictures are encoded.

    Errors: ValueError where the source is latents and the network's space is not theirs, and the reverse.
    """
    base, split = (source, "") if os.path.isdir(source) else split_suffix(source)
    folder = Path(base).expanduser()
    if (folder / PLAN).is_file() and not (folder / LATENTS).is_file():
        raise ValueError(
            f"{folder} is not complete: the same prepare command again goes on where it was stopped"
        )
    if not (folder / LATENTS).is_file():
        if space == "pixels":
            return open_images(source, size=size, channels=channels, crop=crop)
        made = open_codec(space, device)
        check_codec_fits(made, channels, "the network")
        pictures = open_images(source, size=size * made.factor, channels=3, crop=crop)
        return EncodedDataset(pictures, made, mirror)
    latents = LatentDataset(folder, check_split(base, split or None))
    if space == "pixels":
        raise ValueError(
            f"{source} holds latents of {latents.codec}, but the network works on pixels; train on the pictures, or "
            "choose a latent preset (mezzotint info)"
        )
    if (latents.channels, latents.size) != (channels, size):
        raise ValueError(
            f"{source} holds latents of {latents.channels} channels and {latents.size}x{latents.size} cells, the "
            f"network takes {channels} and {size}x{size}; set model.size={latents.size} "
            f"model.channels={latents.channels}, or prepare at another --size"
        )
    return latents


def describe_latents(latents: LatentDataset) -> str:
    """Number, resolution and statistics in a few lines."""
    s = latents.statistics
    by_channel = ", ".join(f"{m:+.3f} ± {d:.3f}" for m, d in zip(s["mean"], s["std"], strict=True))
    lines = [
        f"{len(latents):,} latents of {latents.channels}x{latents.size}x{latents.size}, codec {latents.codec}",
        f"mean and standard deviation by channel: {by_channel}; overall {s['overall_std']:.3f}, expected about 1",
    ]
    return "\n".join(lines + [f"! {note}" for note in latents.report.notes])
