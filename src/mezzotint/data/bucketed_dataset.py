"""Aspect-ratio buckets: pictures of any shape, each resized to the nearest of a few shapes, in batches of one shape.

Every picture is in exactly one bucket and is shown in every epoch. A bucket whose pictures do not fill its last batch
is filled up with pictures of its own that come round again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import final

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import ExifTags, Image
from torch import Tensor

from mezzotint.core.rng import philox
from mezzotint.data.caption_embeddings import CaptionEmbeddings
from mezzotint.data.image_dataset import MAX_REPLACEMENTS, Send, UnreadableReport
from mezzotint.data.sources import NO_LABEL, Source, hash_parts
from mezzotint.data.transforms import (
    MAX_INTERMEDIATE_PIXELS,
    UnreadableImage,
    draw_flips,
    flip,
    to_mode,
    to_model_range,
)

PORTRAIT = "portrait mode"  # the flag of a rotated picture's caption; the paper's own words are not known ([M])
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

Shape = tuple[int, int]  # height, width


@final
class BucketedDataset:
    """Pictures by index in a few shapes: the surface of `Images`, where a batch holds one bucket's pictures alone.

    Args:
        shapes: heights and widths, e.g. ((384, 640),) or ((64, 64), (48, 80), (80, 48)).
        portrait: turn pictures taller than wide a quarter to the left and add "portrait mode" to their caption, as
            simple diffusion's 384x640 model does (specs/simple-diffusion.md section 6, [M]).
    """

    def __init__(
        self, source: Source, shapes: Sequence[Shape], *, channels: int = 3, portrait: bool = False
    ):
        if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise ValueError(
                f"shapes {shapes}: give heights and widths, e.g. data.buckets=[[384,640]]"
            )
        if len(set(shapes)) < len(shapes):
            raise ValueError(f"shapes {shapes} repeat; give each once")
        self.source, self.shapes, self.channels, self.portrait = (
            source,
            tuple(shapes),
            channels,
            portrait,
        )
        self.label_names = source.label_names
        self.num_classes = len(source.label_names or ())
        self.words: CaptionEmbeddings | None = None
        sizes = _sizes(source)
        self.turned = np.array([portrait and h > w for h, w in sizes])
        seen = [
            (w, h) if turned else (h, w) for turned, (h, w) in zip(self.turned, sizes, strict=True)
        ]
        self.bucket = np.array([self._nearest(h, w) for h, w in seen])
        self.fingerprint = hash_parts(
            [source.identity(), f"{self.shapes} {channels} {portrait}", self.bucket.tobytes()]
        )
        counts = ", ".join(
            f"{h}x{w} {n:,}" for (h, w), n in zip(shapes, self.counts(), strict=True)
        )
        self.report = UnreadableReport(len(source), notes=(*source.notes, f"buckets: {counts}"))
        self._unreadable: dict[int, str] = {}

    def _nearest(self, height: int, width: int) -> int:
        """The bucket whose aspect ratio is nearest, by the logarithm."""
        apart = [abs(math.log(width / height) - math.log(w / h)) for h, w in self.shapes]
        return apart.index(min(apart))

    def __len__(self) -> int:
        return len(self.source)

    def counts(self) -> list[int]:
        """Pictures in each bucket."""
        return np.bincount(self.bucket, minlength=len(self.shapes)).tolist()

    def indices(self, seed: int, start: int, count: int, batch: int) -> Int64[Tensor, " count"]:
        """Pictures of the sample numbers start ... start + count - 1, which lie within one batch of `batch`.

        A function of (seed, epoch): each bucket is permuted and filled up to whole batches, then batches are permuted.
        """
        whole, first = divmod(start, batch)
        if first + count > batch:
            raise ValueError(
                f"samples {start}...{start + count - 1} are not within one batch of {batch}"
            )
        per_epoch = sum(-(-n // batch) for n in self.counts())
        epoch, number = divmod(whole, per_epoch)
        plan = _plan(self.bucket.tobytes(), seed, epoch, batch)
        return torch.from_numpy(plan[number, first : first + count].copy())

    def label(self, i: int) -> int | None:
        """Class index of sample i, or None."""
        labels = self.source.labels
        return None if labels is None or labels[i] == NO_LABEL else int(labels[i])

    def text(self, i: int) -> str | None:
        """Caption of sample i, flagged if the picture is turned, or None."""
        text = self.source.text(i)
        return f"{text}, {PORTRAIT}" if text and self.turned[i] else text

    def name(self, i: int) -> str:
        """What reports call sample i."""
        return self.source.name(i)

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        """Sample i in its bucket's shape; may raise `Unreadable`."""
        stored = self.source.read(i)
        if isinstance(stored, np.ndarray):
            grey = stored.shape[0] == 1
            stored = Image.fromarray(
                stored[0] if grey else np.ascontiguousarray(stored.transpose(1, 2, 0))
            )
        picture = to_mode(stored, self.channels)
        if self.turned[i]:
            picture = picture.transpose(Image.Transpose.ROTATE_90)
        array = np.asarray(cover_crop(picture, *self.shapes[self.bucket[i]]))
        return torch.from_numpy(
            array[None].copy() if self.channels == 1 else array.transpose(2, 0, 1).copy()
        )

    def readable(self, i: int) -> int:
        """i, or the next readable picture of the same bucket, cyclically."""
        fellows = np.flatnonzero(self.bucket == self.bucket[i])
        at = int(np.searchsorted(fellows, i))
        for k in range(min(MAX_REPLACEMENTS, len(fellows))):
            j = int(fellows[(at + k) % len(fellows)])
            if j in self._unreadable:
                continue
            try:
                self.image(j)
                return j
            except UnreadableImage as reason:
                self.mark_unreadable({j: str(reason)})
        raise ValueError(f"{self.name(i)} and its bucket cannot be read: {self.report}")

    def batch(
        self, indices: Sequence[int] | Int64[Tensor, " b"]
    ) -> tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"] | None]:
        """Pictures of one bucket and their labels; unreadable ones replaced."""
        chosen = [int(i) for i in indices]
        if len({int(self.bucket[i]) for i in chosen}) > 1:
            raise ValueError(
                "a batch of pictures of several shapes; take the indices from `indices`"
            )
        pictures: list[Tensor] = []
        used: list[int] = []
        for i in chosen:
            try:
                if i in self._unreadable:
                    raise UnreadableImage(self._unreadable[i])
                pictures.append(self.image(i))
                used.append(i)
            except UnreadableImage as reason:
                self.mark_unreadable({i: str(reason)})
                used.append(self.readable(i))
                pictures.append(self.image(used[-1]))
        labels = self.source.labels
        return torch.stack(pictures), None if labels is None else torch.from_numpy(labels[used])

    def to_model(
        self,
        loaded: UInt8[Tensor, "b c h w"],
        seed: int,
        numbers: list[int],
        mirror: bool,
        send: Send,
    ) -> Float[Tensor, "b c h w"]:
        """See `Images.to_model`."""
        return to_model_range(send(flip(loaded, draw_flips(seed, numbers)) if mirror else loaded))

    def mark_unreadable(self, found: dict[int, str]) -> None:
        """See `Images.mark_unreadable`."""
        for i, reason in found.items():
            self._unreadable[i] = self.report.unreadable[self.name(i)] = reason

    def unreadable(self) -> dict[int, str]:
        """See `Images.unreadable`."""
        return dict(self._unreadable)


@functools.lru_cache(maxsize=4)
def _plan(bucket: bytes, seed: int, epoch: int, batch: int) -> np.ndarray:
    """(batches, batch) picture indices of one epoch, from the int64 bucket of every picture."""
    of_picture, batches = np.frombuffer(bucket, np.int64), []
    rng = philox("order", seed, epoch)
    for b in range(int(of_picture.max()) + 1):
        members = rng.permutation(np.flatnonzero(of_picture == b))
        if len(members):
            batches.append(
                np.resize(members, (-(-len(members) // batch), batch))
            )  # repeats from the start
    return rng.permutation(np.concatenate(batches))


def _sizes(source: Source) -> list[Shape]:
    """(height, width) of every picture as it is seen, from its header; (1, 1) for what cannot be opened."""

    def one(i: int) -> Shape:
        try:
            stored = source.read(i)
            if isinstance(stored, np.ndarray):
                return stored.shape[1], stored.shape[2]
            turned = stored.getexif().get(ExifTags.Base.Orientation) in TURNED
            return (stored.width, stored.height) if turned else (stored.height, stored.width)
        except Exception:  # decoders raise anything; reading it for a batch will say what
            return 1, 1

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(len(source)), chunksize=64))


def cover_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """`adm_crop` for any shape: halve with BOX, bicubic until both sides are reached, central crop."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size[0] * size[1] > MAX_INTERMEDIATE_PIXELS:
        raise UnreadableImage(
            f"sides {image.width} x {image.height} are too unequal for {height} x {width}"
        )
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
