"""Aspect-ratio buckets: images of any shape, each resized to the nearest of a few shapes.

A batch holds images of one shape. Every image is in exactly one bucket and appears in every epoch.
A bucket that does not fill its last batch fills it with images of its own, repeated from its start.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import final

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from mezzotint.core.rng import philox
from mezzotint.data.dataset import Labels, PixelDataset, Pixels
from mezzotint.data.decode import MAX_PIXELS, UnreadableImage, reserve_pixels
from mezzotint.data.full_scale import measure_full_scale
from mezzotint.data.sources import Source, hash_parts
from mezzotint.data.transforms import orientation_of, to_array, to_mode, to_pillow

PORTRAIT = (
    "portrait mode"  # added to a rotated image's caption; the paper's words are unknown ([M])
)
ROTATED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height

Shape = tuple[int, int]  # height, width


@final
class BucketedDataset(PixelDataset):
    """Images by index in a few shapes; a batch holds images of one bucket.

    Args:
        shapes: heights and widths, e.g. ((384, 640),) or ((64, 64), (48, 80), (80, 48)).
        portrait: rotate images taller than wide a quarter to the left and add "portrait mode" to
            their captions, as simple diffusion's 384x640 model does (specs/simple-diffusion.md
            section 6, [M]).
        full_scale: see `open_images`.
    """

    def __init__(
        self,
        source: Source,
        shapes: Sequence[Shape],
        *,
        channels: int = 3,
        portrait: bool = False,
        full_scale: int | None = None,
    ):
        if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise ValueError(
                f"shapes {shapes}: give heights and widths, e.g. data.buckets=[[384,640]]"
            )
        if len(set(shapes)) < len(shapes):
            raise ValueError(f"shapes {shapes} repeat; give each once")
        self.shapes, self.portrait = tuple(shapes), portrait
        sizes = _read_sizes(source)
        self.rotated = np.array(
            [portrait and size is not None and size[0] > size[1] for size in sizes]
        )
        nearest = [
            None if size is None else self._nearest_bucket(*(reversed(size) if rotated else size))
            for rotated, size in zip(self.rotated, sizes, strict=True)
        ]
        counted = Counter(bucket for bucket in nearest if bucket is not None)
        if not counted:
            raise ValueError(
                f"no image can be read, {source.name(0)} and all others; check the files"
            )
        # What cannot be read joins the largest bucket, whose images replace it.
        largest = counted.most_common(1)[0][0]
        self.bucket = np.array([largest if bucket is None else bucket for bucket in nearest])
        self._sizes = sizes
        self.full_scale = measure_full_scale(source.read, len(source), full_scale)
        how = f"{self.shapes} {channels} {portrait}{self.full_scale.key}"
        fingerprint = hash_parts([source.identity(), how, self.bucket.tobytes()])
        counts = ", ".join(
            f"{h}x{w} {n:,}" for (h, w), n in zip(shapes, self.bucket_counts(), strict=True)
        )
        notes = (*source.notes, *self.full_scale.notes, f"buckets: {counts}")
        super().__init__(source, channels, fingerprint, notes)

    def _nearest_bucket(self, height: int, width: int) -> int:
        """Return the bucket of the nearest aspect ratio, by its logarithm."""
        distance = [abs(math.log(width / height) - math.log(w / h)) for h, w in self.shapes]
        return distance.index(min(distance))

    def bucket_counts(self) -> list[int]:
        """Return the number of images in each bucket."""
        return np.bincount(self.bucket, minlength=len(self.shapes)).tolist()

    def text(self, i: int) -> str | None:
        """Return the caption of image i, with "portrait mode" added if it is rotated, or None."""
        text = self.source.text(i)
        return f"{text}, {PORTRAIT}" if text and self.rotated[i] else text

    def batch_indices(self, seed: int, start: int, count: int, batch: int) -> Int64[Tensor, " n"]:
        """Return the image indices of the sample numbers start ... start + count - 1 of a run.

        A function of (seed, epoch): each bucket is permuted and filled to whole batches, then the
        batches are permuted.

        Errors: ValueError where the sample numbers are not within one batch of `batch`.
        """
        number, first = divmod(start, batch)
        if first + count > batch:
            raise ValueError(
                f"samples {start}...{start + count - 1} are not within one batch of {batch}"
            )
        batches_per_epoch = sum(-(-n // batch) for n in self.bucket_counts())
        epoch, number = divmod(number, batches_per_epoch)
        plan = _plan_epoch(self.bucket.tobytes(), seed, epoch, batch)
        return torch.from_numpy(plan[number, first : first + count].copy())

    def batch(self, indices: Sequence[int] | Labels) -> tuple[Pixels, Labels | None]:
        """Return images of one bucket and their labels; see `Dataset`."""
        if len({int(self.bucket[int(i)]) for i in indices}) > 1:
            raise ValueError(
                "these images are of several shapes; take a batch's indices from `batch_indices`"
            )
        return super().batch(indices)

    def _target_size(self, i: int) -> tuple[int, int]:
        return self.shapes[self.bucket[i]]

    def stored_size(self, i: int) -> tuple[int, ...]:
        """Return height and width of image i, turned as it is read; () if it is unreadable."""
        size = self._sizes[i]
        if size is None:
            return ()
        return size[::-1] if self.rotated[i] else size

    def _replacements(self, i: int) -> Iterable[int]:
        """Return i and the other images of its bucket, cyclically."""
        members = np.flatnonzero(self.bucket == self.bucket[i])
        return np.roll(members, -int(np.searchsorted(members, i))).tolist()

    def _decode_pixels(self, i: int) -> np.ndarray:
        stored = self.source.read(i)
        image = to_pillow(stored) if isinstance(stored, np.ndarray) else stored
        with reserve_pixels(image):
            image = to_mode(image, self.channels, self.full_scale)
            if self.rotated[i]:
                image = image.transpose(Image.Transpose.ROTATE_90)
            return to_array(cover_crop(image, *self.shapes[self.bucket[i]]))


@functools.lru_cache(maxsize=4)
def _plan_epoch(bucket_bytes: bytes, seed: int, epoch: int, batch: int) -> np.ndarray:
    """Return (batches, batch) image indices of one epoch; `bucket_bytes` are int64, per image."""
    bucket, batches = np.frombuffer(bucket_bytes, np.int64), []
    rng = philox("order", seed, epoch)
    for b in range(int(bucket.max()) + 1):
        members = rng.permutation(np.flatnonzero(bucket == b))
        if len(members):
            # resize repeats from the start
            batches.append(np.resize(members, (-(-len(members) // batch), batch)))
    return rng.permutation(np.concatenate(batches))


def _read_sizes(source: Source) -> list[Shape | None]:
    """Return (height, width) of every image as displayed, from its header; None if unreadable."""

    def read_size(i: int) -> Shape | None:
        try:
            stored = source.read(i)
            if isinstance(stored, np.ndarray):
                return stored.shape[1], stored.shape[2]
            rotated = orientation_of(stored) in ROTATED
            return (stored.width, stored.height) if rotated else (stored.height, stored.width)
        except Exception:  # decoders raise anything; reading it for a batch reports the reason
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(read_size, range(len(source)), chunksize=64))


def cover_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return `adm_crop` for any shape: halve with BOX, bicubic until it covers, centre crop."""
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        raise UnreadableImage(
            f"sides {image.width} x {image.height} are too unequal for {height} x {width}"
        )
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
