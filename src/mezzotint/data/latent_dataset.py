"""Latents to train on: `LatentDataset` reads them from a folder, `EncodedDataset` encodes images.

Both round the moments to float16, so that training is bitwise the same from either.

A folder of `mezzotint.data.encode_latents` holds pieces, each complete or absent: `piece-N.npy`,
float16 (images, 2, 2, channels, side, side), whose axes of length two are (image, mirror image) and
(mean, log-variance); `piece-N.json` with names, labels, captions and sums; `plan.json`, the codec
and the images; and, when all pieces are there, `labels.npy` and `latents.json`.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from mezzotint.core.files import expand_user, read_json
from mezzotint.core.json_values import check_fields
from mezzotint.core.npz_files import load_npy
from mezzotint.core.rng import Draws
from mezzotint.data.autoencoder import Codec, check_codec_fits, draw_latents, open_codec
from mezzotint.data.caption_embeddings import Captions
from mezzotint.data.columns import Columns
from mezzotint.data.dataset import (
    Dataset,
    Labels,
    Moments,
    Send,
    UnreadableReport,
    renumber,
)
from mezzotint.data.image_dataset import (
    LATENTS,
    ImageDataset,
    check_no_columns,
    check_split,
    open_images,
    split_source,
)
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.shuffle import shuffled_indices
from mezzotint.data.sources import hash_parts, split_indices
from mezzotint.data.transforms import draw_flips, to_model_range

PLAN = "plan.json"
LABELS = "labels.npy"
ADVICE = "prepare the folder again"


def encode_moments(codec: Codec, pixels: Tensor, mirror: bool) -> Tensor:
    """Return the moments, float16 (views, 2, channels, h, w), of one uint8 image.

    Args:
        mirror: encode the mirror image too, as the second view.

    Errors: ValueError for moments that are not finite in float16.
    """
    x = to_model_range(pixels)
    views = torch.stack([x, x.flip(-1)] if mirror else [x])
    moments = torch.stack(codec.encode_moments(views), 1).to("cpu", torch.float16)
    mean, logvar = moments.unbind(1)
    # A deterministic codec's log-variance is -inf.
    if not mean.isfinite().all() or logvar.isnan().any() or (logvar == math.inf).any():
        raise ValueError(f"codec {codec.name} gives latents that are not finite in float16")
    return moments


def sample_latents(
    moments: Moments, draws: Draws, image_numbers: list[int], mirror: bool, send: Send
) -> Float[Tensor, "b c h w"]:
    """Draw a latent for each image number; with `mirror`, half of them from the mirror image."""
    rows = torch.arange(len(moments))
    view = draw_flips(draws, image_numbers).long() if mirror else torch.zeros_like(rows)
    chosen = moments[rows, view]
    noise = draws.normal("latent", image_numbers, tuple(chosen.shape[2:]))
    mean, logvar = send(chosen).unbind(1)
    return draw_latents(mean, logvar, send(noise))


@final
class EncodedDataset:
    """Images encoded to moments at every read."""

    def __init__(self, images: ImageDataset, codec: Codec, mirror: bool):
        self.images, self.codec, self.mirror = images, codec, mirror
        self.codec_name: str = codec.name
        self.size, self.channels = images.size // codec.factor, codec.channels
        self.label_names, self.num_classes = images.label_names, images.num_classes
        self.fingerprint = hash_parts([images.fingerprint, codec.hash])
        self.report = images.report
        self.caption_embeddings: Captions | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch_indices(self, seed: int, start: int, count: int, batch: int) -> Int64[Tensor, " n"]:
        """Return the image indices of the sample numbers start ... start + count - 1 of a run."""
        return self.images.batch_indices(seed, start, count, batch)

    def batch(self, indices: Sequence[int] | Labels) -> tuple[Moments, Labels | None]:
        """Return moments and labels; the mirror view is there only if the dataset has `mirror`."""
        pixels, labels = self.images.batch(indices)
        return torch.stack([encode_moments(self.codec, x, self.mirror) for x in pixels]), labels

    def to_model(
        self, inputs: Moments, draws: Draws, image_numbers: list[int], mirror: bool, send: Send
    ) -> Float[Tensor, "b c h w"]:
        """Return latents, see `sample_latents`."""
        return sample_latents(inputs, draws, image_numbers, mirror, send)

    def label(self, i: int) -> int | None:
        """Return the class index of image i, or None."""
        return self.images.label(i)

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        return self.images.text(i)

    def name(self, i: int) -> str:
        """Return the name of image i in reports."""
        return self.images.name(i)

    def readable(self, i: int) -> int:
        """Return i, or the index of the image that replaces it."""
        return self.images.readable(i)

    def mark_unreadable(self, reasons: dict[int, str]) -> None:
        """Record images that another process found unreadable: index -> reason."""
        self.images.mark_unreadable(reasons)

    def unreadable(self) -> dict[int, str]:
        """Return the images found unreadable so far: index -> reason."""
        return self.images.unreadable()

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return names and stored bytes of the images, see `Source.inventory`."""
        return self.images.inventory()

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of image i as stored."""
        return self.images.checksum(i)

    def relabel(self, names: tuple[str, ...]) -> None:
        """Number the classes as in `names`, which holds the name of every class."""
        self.images.relabel(names)
        self.label_names, self.num_classes = names, len(names)

    def count_unlabelled(self) -> int:
        """Return the number of images without a label in a dataset that has labels, else 0."""
        return self.images.count_unlabelled()

    def describe_enlarged(self) -> str | None:
        """Return a sentence about images smaller than those that are encoded, or None."""
        return self.images.describe_enlarged()


CARD_KINDS = {
    **dict.fromkeys(("size", "factor", "channels", "count"), int),
    **dict.fromkeys(("codec", "codec_hash", "fingerprint"), str),
    "label_names": list[str] | None,
    "statistics": dict,
    "notes": list[str],
    "pieces": list[int],
}


@final
class LatentDataset:
    """A folder of latents, or its split "train" or "test" (every tenth).

    codec_name, codec_hash: of the codec that encoded it. size: cells per side.

    Errors: ValueError for a folder that is incomplete, damaged, or of another format.
    """

    def __init__(self, folder: Path, split: str | None = None):
        self.folder = folder.resolve()
        card = read_json(self.folder / LATENTS, ADVICE)
        if card.get("format") != 1:
            raise ValueError(f"{folder} is of format {card.get('format')}, not 1; {ADVICE}")
        try:
            check_fields(card, CARD_KINDS)
            # All images of a piece may have been unreadable.
            if min(card["factor"], card["count"]) < 1 or min(card["pieces"]) < 0:
                raise ValueError("a number is not positive")
            if sum(card["pieces"]) != card["count"]:
                raise ValueError("its pieces do not have 'count' images")
        except ValueError as error:
            raise ValueError(f"{folder / LATENTS} is damaged: {error}; {ADVICE}") from None
        self.codec_name: str = card["codec"]
        self.codec_hash: str = card["codec_hash"]
        self.size, self.channels = card["size"] // card["factor"], card["channels"]
        names = card["label_names"]
        self.label_names: tuple[str, ...] | None = tuple(names) if names else None
        self.num_classes = len(self.label_names or ())
        self.statistics: dict[str, Any] = card["statistics"]
        self.rows = split_indices(card["count"], split or "all", None)
        self.fingerprint = hash_parts([card["fingerprint"], self.rows.tobytes()])
        self.report = UnreadableReport(len(self.rows), notes=tuple(card["notes"]))
        self.caption_embeddings: Captions | None = None
        self._starts = np.cumsum([0, *card["pieces"]])
        self._labels = _read_labels(self.folder, card["count"], self.num_classes)[self.rows]
        for k in range(len(card["pieces"])):
            if not all(piece_path(self.folder, k, suffix).is_file() for suffix in ("npy", "json")):
                raise ValueError(f"{folder} is damaged: piece {k} is missing; {ADVICE}")

    def __len__(self) -> int:
        return len(self.rows)

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the piece of image i and its row there."""
        if not 0 <= i < len(self):
            raise ValueError(f"image {i} of a dataset of {len(self)}")
        row = int(self.rows[i])
        piece = int(np.searchsorted(self._starts, row, side="right")) - 1
        return piece, row - int(self._starts[piece])

    def _read_cell(self, column: str, i: int) -> Any:
        piece, row = self._locate(i)
        return _read_facts(str(self.folder), piece, self.fingerprint)[column][row]

    def moments(self, i: int) -> Float16[Tensor, "2 2 c h w"]:
        """Return the moments of image i: (image and mirror image, mean and log-variance, ...)."""
        piece, row = self._locate(i)
        moments = _map_moments(str(self.folder), piece, self.fingerprint)[row].copy()
        if np.isnan(moments).any():
            raise ValueError(f"the latents of {self.name(i)} in {self.folder} hold NaN; {ADVICE}")
        return torch.from_numpy(moments)

    def batch_indices(self, seed: int, start: int, count: int, batch: int) -> Int64[Tensor, " n"]:
        """Return the image indices of the sample numbers start ... start + count - 1 of a run."""
        return shuffled_indices(seed, start, count, len(self))

    def batch(self, indices: Sequence[int] | Labels) -> tuple[Moments, Labels | None]:
        """Return moments of both views, and labels, None for a dataset without labels."""
        rows = [int(i) for i in indices]
        labels = None if self.label_names is None else torch.from_numpy(self._labels[rows])
        return torch.stack([self.moments(i) for i in rows]), labels

    def to_model(
        self, inputs: Moments, draws: Draws, image_numbers: list[int], mirror: bool, send: Send
    ) -> Float[Tensor, "b c h w"]:
        """Return latents, see `sample_latents`."""
        return sample_latents(inputs, draws, image_numbers, mirror, send)

    def label(self, i: int) -> int | None:
        """Return the class index of image i, or None."""
        return None if self._labels[i] == NO_LABEL else int(self._labels[i])

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        return self._read_cell("text", i)

    def name(self, i: int) -> str:
        """Return the name of image i in its source."""
        return self._read_cell("name", i)

    # Unreadable images were left out when the folder was prepared.

    def readable(self, i: int) -> int:
        """Return i."""
        return i

    def mark_unreadable(self, reasons: dict[int, str]) -> None:
        """Do nothing."""

    def unreadable(self) -> dict[int, str]:
        """Return no image."""
        return {}

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return the names in the source, and the bytes of the moments."""
        names = [
            name
            for piece in range(len(self._starts) - 1)
            for name in _read_facts(str(self.folder), piece, self.fingerprint)["name"]
        ]
        num_bytes = 2 * 2 * 2 * self.channels * self.size**2  # see `encode_latents`
        return [names[row] for row in self.rows], np.full(len(self), num_bytes, np.int64)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the moments."""
        return zlib.crc32(self.moments(i).numpy().tobytes())

    def relabel(self, names: tuple[str, ...]) -> None:
        """Number the classes as in `names`, which holds the name of every class."""
        labels = renumber(self._labels, self.label_names, names)
        assert labels is not None, "a folder of latents has labels, if only NO_LABEL"
        self._labels = labels
        self.label_names, self.num_classes = names, len(names)

    def count_unlabelled(self) -> int:
        """Return the number of images without a label in a dataset that has labels, else 0."""
        return 0 if self.label_names is None else int((self._labels == NO_LABEL).sum())

    def describe_enlarged(self) -> None:
        """Return None: `prepare` said so when the images were encoded."""


def piece_path(folder: Path, piece: int, suffix: str) -> Path:
    """Return the path of one of the two files of a piece."""
    return folder / f"piece-{piece:06d}.{suffix}"


# `key` is the fingerprint: a folder prepared again must not be read from the cache.
@functools.lru_cache(maxsize=4096)
def _map_moments(folder: str, piece: int, key: str) -> np.ndarray:
    try:
        return load_npy(piece_path(Path(folder), piece, "npy"), mmap=True)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder} is damaged: piece {piece}: {error}; {ADVICE}") from None


@functools.lru_cache(maxsize=16)
def _read_facts(folder: str, piece: int, key: str) -> dict[str, Any]:
    facts = read_json(piece_path(Path(folder), piece, "json"), ADVICE)
    try:
        check_fields(facts, {"name": list[str], "text": list[str | None]})
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: piece {piece}: {error}; {ADVICE}") from None
    return facts


def _read_labels(folder: Path, count: int, num_classes: int) -> np.ndarray:
    try:
        labels = load_npy(folder / LABELS)
        if labels.dtype != np.int64 or labels.shape != (count,):
            raise ValueError(f"it holds {labels.dtype} {labels.shape}, not int64 ({count},)")
        low, high = int(labels.min()), int(labels.max())
        if low < NO_LABEL or high >= max(num_classes, 1):
            raise ValueError(f"it holds the classes {low} to {high} of {num_classes}")
        return labels
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder} is damaged: {LABELS}: {error}; {ADVICE}") from None


def open_dataset(
    source: str,
    *,
    size: int,
    channels: int,
    crop: str,
    codec_name: str = "pixels",
    columns: Columns | None = None,
    mirror: bool = False,
    device: torch.device | str = "cpu",
    full_scale: int | None = None,
) -> Dataset:
    """Open the training data of a network of `size` x `size` x `channels` input.

    Args:
        source: a folder of latents, or anything that `open_images` takes. For a latent network, the
            latter's images are encoded at every read.
        size, channels: of the network's input, in cells or pixels.
        crop: see `open_images`.
        columns: see `open_images`.
        codec_name: name of the codec whose latents the network takes.
        mirror: whether training mirrors images.
        device: where images are encoded.
        full_scale: see `open_images`.

    Errors: ValueError where the network does not take the source's latents, or its pixels.
    """
    base, split = split_source(source)
    folder = expand_user(base)
    if (folder / PLAN).is_file() and not (folder / LATENTS).is_file():
        raise ValueError(
            f"{folder} is not complete; run the same prepare command again to finish it"
        )
    if not (folder / LATENTS).is_file():
        if codec_name == "pixels":
            return open_images(
                source,
                size=size,
                channels=channels,
                crop=crop,
                columns=columns,
                full_scale=full_scale,
            )
        codec = open_codec(codec_name, device)
        check_codec_fits(codec, channels, "the network")
        images = open_images(
            source, size=size * codec.factor, crop=crop, columns=columns, full_scale=full_scale
        )
        return EncodedDataset(images, codec, mirror)
    check_no_columns(base, columns)
    latents = LatentDataset(folder, check_split(base, split or None))
    if codec_name == "pixels":
        raise ValueError(
            f"{source} holds latents of {latents.codec_name}, but the network works on pixels; "
            "train on the images, or choose a latent preset (mezzotint info)"
        )
    if (latents.channels, latents.size) != (channels, size):
        raise ValueError(
            f"{source} holds latents of {latents.channels} channels and "
            f"{latents.size}x{latents.size} cells, the network takes {channels} and {size}x{size}; "
            f"set model.size={latents.size} model.channels={latents.channels}, or prepare at "
            "another --size"
        )
    return latents


def describe_latents(latents: LatentDataset) -> str:
    """Return number, resolution and statistics as a few lines of text."""
    s = latents.statistics
    shape = f"{latents.channels}x{latents.size}x{latents.size}"
    by_channel = ", ".join(f"{m:+.3f} ± {d:.3f}" for m, d in zip(s["mean"], s["std"], strict=True))
    lines = [
        f"{len(latents):,} latents of {shape}, codec {latents.codec_name}",
        f"mean and standard deviation by channel: {by_channel}; "
        f"overall {s['overall_std']:.3f}, expected about 1",
    ]
    return "\n".join(lines + [f"! {note}" for note in latents.report.notes])
