"""Training data in shards, at an address or on a shared disk: `ShardedDataset`.

Images are numbered shard by shard. Shards are fetched into a cache: those of each lane's next block
ahead, others when a batch first needs an image of them, see `mezzotint.data.shard_order`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mezzotint.core.rng import Draws
from mezzotint.data.caption_embeddings import Captions
from mezzotint.data.columns import Columns
from mezzotint.data.dataset import (
    Labels,
    Moments,
    Pixels,
    Send,
    UnreadableReport,
)
from mezzotint.data.full_scale import measure_full_scale
from mezzotint.data.image_dataset import decode_stored, split_source
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.latent_dataset import sample_latents
from mezzotint.data.shard_cache import ShardCache, UnreadableShardError
from mezzotint.data.shard_fetcher import ShardFetcher
from mezzotint.data.shard_index import ShardIndex, check_network_fits, open_index
from mezzotint.data.shard_order import ShardOrder
from mezzotint.data.shard_source import ShardSource, open_shard
from mezzotint.data.sources import hash_parts
from mezzotint.data.transforms import UnreadableImage, draw_flips, flip, to_model_range

LOOKED_AT = 16  # images whose size is compared with the network's

Missing = Literal["stop", "skip"]


class ShardError(OSError):
    """A shard that training needs cannot be read."""


@final
class ShardedDataset:
    """Images or latents in shards, see the module and `mezzotint.data.dataset.Dataset`.

    `set_order` must be called before `batch_indices`.
    """

    def __init__(
        self,
        index: ShardIndex,
        cache: ShardCache,
        *,
        size: int,
        channels: int,
        crop: str,
        missing: Missing = "stop",
        full_scale: int | None = None,
    ):
        """See `open_shards`."""
        self.index, self.cache = index, cache
        self.size, self.channels, self.crop, self.missing = size, channels, crop, missing
        self.label_names: tuple[str, ...] | None = index.label_names
        self.num_classes = len(index.label_names or ())
        self.codec_name: str = index.card.codec if index.card else "pixels"
        self.caption_embeddings: Captions | None = None
        self.counts = index.counts
        self.starts = np.concatenate([[0], np.cumsum(index.counts, dtype=np.int64)])
        self.report = UnreadableReport(len(self), notes=index.notes)
        self.fingerprint = hash_parts([index.fingerprint, f"{size} {channels} {crop}"])
        self._unreadable: dict[int, str] = {}
        self._lost: dict[int, str] = {}  # shard -> why it is left out
        self._order: ShardOrder | None = None
        self._lanes, self._shuffle_images = 1, 1
        self._reset()
        first = self._first_source()
        self.full_scale = measure_full_scale(first.read, min(len(first), LOOKED_AT), full_scale)

    @property
    def is_latent(self) -> bool:
        """Return whether the rows are moments of latents."""
        return self.index.card is not None and self.index.card.kind == "latents"

    @property
    def has_captions(self) -> bool:
        """Return whether the shards have a column of captions."""
        return self.index.card is not None or bool(self.index.columns.get("caption"))

    def _reset(self) -> None:
        """Make what a process has of its own: open shards, and threads that fetch others."""
        self._lock = threading.Lock()
        self._open: OrderedDict[int, ShardSource] = OrderedDict()
        index, cache = self.index, self.cache
        self._fetcher = ShardFetcher(lambda shard: index.fetch(shard, cache), 8 * self._lanes)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_open", "_fetcher", "_order")
        return {k: v for k, v in self.__dict__.items() if k not in own} | {"_order": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    # --- order -----------------------------------------------------------------------------------

    def set_order(self, lanes: int, shuffle_images: int) -> None:
        """Choose lanes and block size of the order, see `ShardOrder`."""
        self._lanes, self._shuffle_images, self._order = lanes, shuffle_images, None
        self._reset()

    def batch_indices(self, seed: int, start: int, count: int, batch: int) -> Int64[Tensor, " n"]:
        """Return the image indices of the sample numbers start ... start + count - 1 of a run.

        Their lanes' next blocks are fetched in the background.
        """
        order = self._order
        if order is None or (order.seed, order.batch) != (seed, batch):
            order = ShardOrder(self.counts, batch, self._lanes, self._shuffle_images, seed)
            self._order = order
        for block in order.blocks(start, count):
            for one in (block, order.next_block(block)):
                self._fetcher.fetch(one, order.shards)
        return torch.from_numpy(order.indices(start, count))

    def bytes_needed(self, world: int, local_ranks: int) -> int:
        """Return about how much of the cache the ranks of one machine use at once.

        That is the block of each of their lanes and the next one, and a shard that is fetched.
        """
        sizes = np.array([file.num_bytes for file in self.index.files])
        # A rank's share of the batch may begin and end within a lane.
        lanes = min(self._lanes, local_ranks * (-(-self._lanes // world) + 1))
        shards = 2 * lanes * (self._shuffle_images / float(self.counts.mean()) + 1)
        return int(min(sizes.sum(), shards * sizes.mean()) + 2 * sizes.max())

    # --- reading ---------------------------------------------------------------------------------

    def _locate(self, i: int) -> tuple[int, int]:
        """Return the shard of image i and its row there."""
        if not 0 <= i < len(self):
            raise ValueError(f"image {i} of a dataset of {len(self)}")
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        return shard, i - int(self.starts[shard])

    def _source(self, shard: int) -> ShardSource:
        """Return an open shard.

        Errors: `UnreadableImage` where it cannot be read and may be left out, else `ShardError`.
        """
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        if shard in self._lost:  # the store is not asked again for each of its images
            raise UnreadableImage(self._lost[shard])
        try:
            source = open_shard(self.index, shard, self.cache, self.label_names)
        except UnreadableShardError as reason:
            lost = f"shard {self.index.name(shard)}, {self.counts[shard]:,} images: {reason}"
            if self.missing == "skip":
                self._lost[shard] = lost
                raise UnreadableImage(lost) from None
            raise ShardError(
                f"{self.index.address}: {lost}. Bring it back and repeat the command, or train "
                "without such shards: add data.shards.missing=skip"
            ) from None
        with self._lock:
            self._open[shard] = source
            while len(self._open) > 64 + 4 * self._lanes:
                self._open.popitem(last=False)
        return source

    def _first_source(self) -> ShardSource:
        """Return the first shard that can be read."""
        reasons = []
        for shard in range(len(self.counts)):
            try:
                return self._source(shard)
            except UnreadableImage as reason:
                reasons.append(str(reason))
        raise ValueError(f"no shard of {self.index.address} can be read: {reasons[0]}")

    def _read(self, i: int) -> np.ndarray:
        """Return pixels (c, h, w) or moments of image i; `UnreadableImage` if it is damaged."""
        if i in self._unreadable:
            raise UnreadableImage(self._unreadable[i])
        shard, row = self._locate(i)
        try:
            stored = self._source(shard).read(row)
            if self.is_latent:
                return np.asarray(stored)
            return decode_stored(
                stored, self.size, self.channels, self.crop, self.full_scale
            ).pixels
        except UnreadableImage as reason:
            self.mark_unreadable({i: str(reason)})
            raise

    def _replacements(self, i: int) -> Iterator[int]:
        """Yield i, the other images of its shard in order, and one image of each other shard."""
        shard, row = self._locate(i)
        yield i
        try:
            self._source(shard)
            first, count = int(self.starts[shard]), int(self.counts[shard])
            yield from (first + (row + k) % count for k in range(1, count))
        except UnreadableImage:
            pass
        for k in range(1, len(self.counts)):
            other = (shard + k) % len(self.counts)
            yield int(self.starts[other]) + row % int(self.counts[other])

    def readable(self, i: int) -> int:
        """Return i, or the index of the image that replaces it because it is unreadable."""
        for j in self._replacements(i):
            try:
                self._read(j)
                return j
            except UnreadableImage:
                continue
        raise ValueError(f"{self.name(i)} and all that follow cannot be read: {self.report}")

    def batch(self, indices: Sequence[int] | Labels) -> tuple[Pixels | Moments, Labels | None]:
        """Return images or moments, and labels, None for a dataset without labels."""
        rows, labels = [], []
        for i in map(int, indices):
            try:
                row = self._read(i)
            except UnreadableImage:
                i = self.readable(i)
                row = self._read(i)
            rows.append(row)
            label = self.label(i)
            labels.append(NO_LABEL if label is None else label)
        has_labels = self.label_names is not None
        return torch.from_numpy(np.stack(rows)), torch.tensor(labels) if has_labels else None

    def to_model(
        self, inputs: Pixels | Moments, draws: Draws, image_numbers: list[int], mirror: bool,
        send: Send,
    ) -> Float[Tensor, "b c h w"]:  # fmt: skip
        """Return images in [-1, 1], or latents; with `mirror`, half of them are mirrored."""
        if self.is_latent:
            return sample_latents(inputs, draws, image_numbers, mirror, send)
        images = send(inputs)
        if mirror:
            images = flip(images, draw_flips(draws, image_numbers))
        return to_model_range(images)

    # --- facts -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(self.starts[-1])

    def image(self, i: int) -> Tensor:
        """Return image i or its moments; ValueError with the reason if it cannot be read."""
        try:
            return torch.from_numpy(self._read(i).copy())
        except UnreadableImage as reason:
            raise ValueError(f"{self.name(i)} cannot be read: {reason}") from reason

    def label(self, i: int) -> int | None:
        """Return the class index of image i, or None."""
        shard, row = self._locate(i)
        labels = self._source(shard).labels
        return None if labels is None or labels[row] == NO_LABEL else int(labels[row])

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        shard, row = self._locate(i)
        return self._source(shard).text(row)

    def tokens(self, i: int) -> bytes:
        """Return the stored bytes of the embedded caption of image i; b"" for none."""
        shard, row = self._locate(i)
        read = self._source(shard).tokens
        return b"" if read is None else read(row) or b""

    def name(self, i: int) -> str:
        """Return the shard and the row of image i."""
        shard, row = self._locate(i)
        return f"{self.index.name(shard)} row {row}"

    def mark_unreadable(self, reasons: dict[int, str]) -> None:
        """Record images that another process found unreadable: index -> reason."""
        for i, reason in reasons.items():
            self._unreadable[i] = reason
            lost = reason.startswith("shard ")
            self.report.unreadable[reason.partition(",")[0] if lost else self.name(i)] = reason

    def unreadable(self) -> dict[int, str]:
        """Return the images found unreadable so far: index -> reason."""
        return dict(self._unreadable)

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return the names of the shards and their bytes: an inventory of images may not fit."""
        shards = range(len(self.counts))
        sizes = [file.num_bytes for file in self.index.files]
        return [self.index.name(k) for k in shards], np.array(sizes, np.int64)

    def checksum(self, i: int) -> int:
        """Return the checksum of shard i that the index holds, 0 for none."""
        return int(self.index.checksums[i])

    def relabel(self, names: tuple[str, ...]) -> None:
        """Number the classes as in `names`, which holds the name of every class."""
        with self._lock:
            self._open.clear()
        self.label_names, self.num_classes = names, len(names)

    def count_unlabelled(self) -> int:
        """Return the number of images without a label in a dataset that has labels, else 0."""
        return self.index.unlabelled

    def describe_enlarged(self) -> str | None:
        """Return a sentence where images of the first shard are smaller than the network's."""
        first = self._first_source()
        if self.is_latent:
            return None
        rows = np.linspace(0, len(first) - 1, min(len(first), LOOKED_AT)).astype(int).tolist()
        sizes = [size for size in map(first.stored_size, rows) if size and min(size) < self.size]
        if not sizes:
            return None
        height, width = sizes[0]
        return (
            f"{len(sizes)} of {len(rows)} images looked at are smaller than {self.size} x "
            f"{self.size} pixels (e.g. {height} x {width}) and are enlarged"
        )


def open_shards(
    source: str,
    cache: ShardCache,
    *,
    size: int,
    channels: int,
    crop: str = "adm",
    columns: Columns | None = None,
    codec_name: str = "pixels",
    missing: Missing = "stop",
    full_scale: int | None = None,
) -> ShardedDataset:
    """Open the shards of an address for a network of `size` x `size` x `channels` input.

    Args:
        source: an address, or a folder of `mezzotint prepare --shards`; see `open_index`.
        cache: where shards are kept on this machine.
        crop, columns, full_scale: see `mezzotint.data.image_dataset.open_images`.
        codec_name: name of the codec whose latents the network takes.
        missing: what to do about a shard that is missing, cut, changed or damaged: "stop", or
            "skip", which takes other images in place of its own and reports it.

    Errors: ValueError for shards of another space or size than the network's; see `open_index`.
    """
    cache.check(split_source(source)[0])
    index = open_index(source, cache, columns)
    check_network_fits(index, source, size, channels, codec_name)
    return ShardedDataset(
        index,
        cache,
        size=size,
        channels=channels,
        crop=crop,
        missing=missing,
        full_scale=full_scale,
    )
