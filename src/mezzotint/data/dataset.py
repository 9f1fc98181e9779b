"""The interface of a training dataset, and what datasets of uint8 images share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64, UInt8
from torch import Tensor

from mezzotint.core.rng import Draws
from mezzotint.data.caption_embeddings import Captions
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.sources import Source
from mezzotint.data.transforms import UnreadableImage, draw_flips, flip, to_model_range

ENLARGED_SAMPLE = 256

Send = Callable[[Tensor], Tensor]  # moves a tensor to the network's device
Pixels = UInt8[Tensor, "b c h w"]
Moments = Float16[Tensor, "b view 2 c h w"]  # view 0 is the image, 1 its mirror image
Labels = Int64[Tensor, " b"]


@dataclass
class UnreadableReport:
    """The number of images, notes about the source, and the images found unreadable so far."""

    count: int
    unreadable: dict[str, str] = field(default_factory=dict)  # name -> reason
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = [f"{name} ({reason})" for name, reason in list(self.unreadable.items())[:5]]
        more = ["..."] if len(self.unreadable) > len(first) else []
        unreadable = (
            f"{len(self.unreadable)} unreadable: {', '.join(first + more)}"
            if first
            else "none found unreadable so far"
        )
        return "; ".join([f"{self.count:,} images", unreadable, *self.notes])


@runtime_checkable
class Dataset(Protocol):
    """What training reads: images or latents by index, with labels and captions if there are any.

    codec_name: the space of the data, "pixels" or an autoencoder's name. channels: of the network's
    input. fingerprint: changes with the data. caption_embeddings: for networks that read text.
    """

    codec_name: str
    channels: int
    label_names: tuple[str, ...] | None
    num_classes: int
    fingerprint: str
    report: UnreadableReport
    caption_embeddings: Captions | None

    def __len__(self) -> int: ...

    def batch_indices(self, seed: int, start: int, count: int, batch: int) -> Int64[Tensor, " n"]:
        """Return the image indices of the sample numbers start ... start + count - 1 of a run.

        They lie within one batch of `batch` over all ranks.
        """
        ...

    def batch(self, indices: Sequence[int] | Labels) -> tuple[Pixels | Moments, Labels | None]:
        """Return the data of these images and their labels, None for a dataset without labels.

        An unreadable image is replaced by `readable`'s.
        """
        ...

    def to_model(
        self, inputs: Tensor, draws: Draws, image_numbers: list[int], mirror: bool, send: Send
    ) -> Float[Tensor, "b c h w"]:
        """Return the network's inputs from what `batch` returned.

        Args:
            draws: the random numbers of the run.
            image_numbers: sample numbers in the run, which key all randomness.
            mirror: mirror half of the image numbers left to right.
            send: moves a tensor to the network's device.
        """
        ...

    def label(self, i: int) -> int | None:
        """Return the class index of image i, or None."""
        ...

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        ...

    def name(self, i: int) -> str:
        """Return the name of image i in reports: its file name, or its row."""
        ...

    def readable(self, i: int) -> int:
        """Return i, or the index of the image that replaces it because it is unreadable."""
        ...

    def mark_unreadable(self, reasons: dict[int, str]) -> None:
        """Record images that another process found unreadable: index -> reason."""
        ...

    def unreadable(self) -> dict[int, str]:
        """Return the images found unreadable so far: index -> reason."""
        ...

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return names and stored bytes of all images, see `Source.inventory`."""
        ...

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of image i as stored; may raise `UnreadableImage` or OSError."""
        ...

    def relabel(self, names: tuple[str, ...]) -> None:
        """Number the classes as in `names`, which holds the name of every class."""
        ...

    def count_unlabelled(self) -> int:
        """Return the number of images without a label in a dataset that has labels, else 0."""
        ...

    def describe_enlarged(self) -> str | None:
        """Return a sentence about images smaller than the network's, which are enlarged, or None.

        At most ENLARGED_SAMPLE images are looked at.
        """
        ...


class PixelDataset:
    """What datasets of uint8 images share; a subclass decodes images and chooses replacements.

    An unreadable image is named in `report`, and `batch` returns another one in its place, always
    the same. So the number of images, and the data order with it, does not depend on damage.
    """

    codec_name: str = "pixels"

    def __init__(self, source: Source, channels: int, fingerprint: str, notes: Iterable[str]):
        self.source, self.channels, self.fingerprint = source, channels, fingerprint
        self.labels = source.labels
        self.label_names: tuple[str, ...] | None = source.label_names
        self.num_classes = len(source.label_names or ())
        self.report = UnreadableReport(len(source), notes=tuple(notes))
        self.caption_embeddings: Captions | None = None
        self._unreadable: dict[int, str] = {}

    def _decode_pixels(self, i: int) -> UInt8[np.ndarray, "c h w"]:
        raise NotImplementedError

    def _replacements(self, i: int) -> Iterable[int]:
        """Return i and then the indices to try in its place, in order."""
        raise NotImplementedError

    def _read_pixels(self, i: int) -> UInt8[np.ndarray, "c h w"]:
        if not 0 <= i < len(self):
            raise ValueError(f"image {i} of a dataset of {len(self)}")
        if i in self._unreadable:
            raise UnreadableImage(self._unreadable[i])
        try:
            return self._decode_pixels(i)
        except UnreadableImage as reason:
            self.mark_unreadable({i: str(reason)})
            raise

    def __len__(self) -> int:
        return len(self.source)

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        """Return image i; ValueError with its name and the reason if it cannot be read."""
        try:
            return torch.from_numpy(self._read_pixels(i).copy())
        except UnreadableImage as reason:
            raise ValueError(f"{self.name(i)} cannot be read: {reason}") from reason

    def label(self, i: int) -> int | None:
        """Return the class index of image i, or None."""
        labels = self.labels
        return None if labels is None or labels[i] == NO_LABEL else int(labels[i])

    def name(self, i: int) -> str:
        """Return the name of image i in reports: its file name, or its row."""
        return self.source.name(i)

    def readable(self, i: int) -> int:
        """Return i, or the index of the next readable image, cyclically."""
        for j in self._replacements(i):
            try:
                self._read_pixels(j)
                return j
            except UnreadableImage:
                continue
        raise ValueError(f"{self.name(i)} and all that follow cannot be read: {self.report}")

    def batch(self, indices: Sequence[int] | Labels) -> tuple[Pixels, Labels | None]:
        """Return images and labels, None for a dataset without labels; see `Dataset`."""
        images, used = [], []
        for i in map(int, indices):
            try:
                image = self._read_pixels(i)
            except UnreadableImage:
                i = self.readable(i)
                image = self._read_pixels(i)
            images.append(image)
            used.append(i)
        labels = None if self.labels is None else torch.from_numpy(self.labels[used])
        return torch.from_numpy(np.stack(images)), labels

    def to_model(
        self, inputs: Pixels, draws: Draws, image_numbers: list[int], mirror: bool, send: Send
    ) -> Float[Tensor, "b c h w"]:
        """Return images in [-1, 1]; with `mirror`, half of the image numbers are mirrored."""
        images = send(inputs)  # as bytes: what follows is done on the network's device
        if mirror:
            images = flip(images, draw_flips(draws, image_numbers))
        return to_model_range(images)

    def mark_unreadable(self, reasons: dict[int, str]) -> None:
        """Record images that another process found unreadable: index -> reason."""
        for i, reason in reasons.items():
            self._unreadable[i] = self.report.unreadable[self.name(i)] = reason

    def unreadable(self) -> dict[int, str]:
        """Return the images found unreadable so far: index -> reason."""
        return dict(self._unreadable)

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return names and stored bytes of all images, see `Source.inventory`."""
        return self.source.inventory()

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of image i as stored."""
        return self.source.checksum(i)

    def relabel(self, names: tuple[str, ...]) -> None:
        """Number the classes as in `names`, which holds the name of every class."""
        self.labels = renumber(self.labels, self.label_names, names)
        self.label_names, self.num_classes = names, len(names)

    def count_unlabelled(self) -> int:
        """Return the number of images without a label in a dataset that has labels, else 0."""
        return 0 if self.labels is None else int((self.labels == NO_LABEL).sum())

    def describe_enlarged(self) -> str | None:
        """Return a sentence about images smaller than the network's, which are enlarged, or None.

        Of a large dataset, evenly spaced images are looked at.
        """
        looked = np.linspace(0, len(self) - 1, min(len(self), ENLARGED_SAMPLE)).astype(int).tolist()
        sizes = [(self.stored_size(i), self._target_size(i)) for i in looked]
        small = [pair for pair in sizes if pair[0] and any(map(operator.lt, *pair))]
        if not small:
            return None
        (height, width), (target_height, target_width) = small[0]
        among = "" if len(looked) == len(self) else " looked at"
        return (
            f"{len(small):,} of {len(looked):,} images{among} are smaller than {target_height} x "
            f"{target_width} pixels (e.g. {height} x {width}) and are enlarged"
        )

    def _target_size(self, i: int) -> tuple[int, int]:
        """Return height and width of image i in the dataset."""
        raise NotImplementedError

    def stored_size(self, i: int) -> tuple[int, ...]:
        """Return height and width of image i as stored; () if it is unreadable."""
        try:
            stored = self.source.read(i)
        except UnreadableImage:
            return ()
        return stored.shape[1:] if isinstance(stored, np.ndarray) else stored.size[::-1]


def renumber(
    labels: np.ndarray | None, old: tuple[str, ...] | None, new: tuple[str, ...]
) -> np.ndarray | None:
    """Return labels whose class indices into `old` have become indices into `new`, by name."""
    if labels is None or old is None or old == new:
        return labels
    index = np.array([*(new.index(name) for name in old), NO_LABEL], dtype=np.int64)
    return index[labels]  # NO_LABEL is the last entry
