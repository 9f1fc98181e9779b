"""Any pile of pictures as uint8 tensors of one size, by index: `open_images`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from mezzotint.core.registry import suggest
from mezzotint.data.builtin import open_digits
from mezzotint.data.caption_embeddings import CaptionEmbeddings
from mezzotint.data.shapes import open_shapes
from mezzotint.data.sources import NO_LABEL, SPLITS, FolderStore, Source, ZipStore, hash_parts, image_suffixes, open_files
from mezzotint.data.tables import CARD, PreparedSource, open_npz, open_prepared, open_table
from mezzotint.data.transforms import (
    CROPS,
    UnreadableImage,
    draw_flips,
    flip,
    to_model_range,
    to_pixels,
)

MEMORY_LIMIT_BYTES = 1 << 30  # of decoded pixels kept in memory
MAX_REPLACEMENTS = 1000  # unreadable samples in a row before we call the whole set damaged
BUILTIN = ("digits", "shapes")
LATENTS = "latents.json"  # card of a folder of `mezzotint.data.encode_latents`
ROW_FILES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}  # suffix -> builder of `datasets`


Send = Callable[[Tensor], Tensor]


@dataclass
class UnreadableReport:
    """What a reader should know of a set besides its pictures; `unreadable` grows as pictures are read."""

    count: int
    unreadable: dict[str, str] = field(default_factory=dict)  # name -> reason
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        first = [f"{name} ({reason})" for name, reason in list(self.unreadable.items())[:5]]
        more = ["..."] if len(self.unreadable) > len(first) else []
        bad = (
            f"{len(self.unreadable)} unreadable: {', '.join(first + more)}"
            if first
            else "none found unreadable so far"
        )
        return "; ".join([f"{self.count:,} images", bad, *self.notes])


class DecodedImage(NamedTuple):
    """uint8 (c, h, w) pixels at the size asked for; mode, width and height of the stored picture."""

    pixels: np.ndarray
    mode: str
    width: int
    height: int


@final
class ImageDataset:
    """Pictures by index: uint8 (channels, size, size), with label and caption where the source has them.

    A picture that cannot be read is named in `report`, and in `batch` the next readable one takes its place, always the
    same one; so the number of samples, and with it the data order, does not depend on damage.
    """

    def __init__(
        self, source: Source, *, size: int, channels: int = 3, crop: str = "adm", keep: bool = True
    ):
        """See `open_images`; `keep` holds decoded pixels in memory as far as MEMORY_LIMIT_BYTES reaches."""
        if size < 1:
            raise ValueError(f"size {size}; give the side in pixels, e.g. 64")
        if channels not in (1, 3):
            raise ValueError(f"channels {channels}; allowed: 1 (grey), 3 (RGB)")
        if crop not in CROPS:
            raise ValueError(f"unknown crop {crop!r}; {suggest(crop, CROPS)}")
        self.source, self.size, self.channels, self.crop, self.keep = (
            source,
            size,
            channels,
            crop,
            keep,
        )
        self.label_names = source.label_names
        self.num_classes = len(source.label_names) if source.label_names else 0
        self.fingerprint = hash_parts([source.identity(), f"{size} {channels} {crop}"])
        self.report = UnreadableReport(len(source), notes=source.notes)
        self.words: CaptionEmbeddings | None = (
            None  # embedded captions, for networks that read text
        )
        self._unreadable: dict[int, str] = {}
        self._allocate()

    def _allocate(self) -> None:
        kept = (
            min(len(self), MEMORY_LIMIT_BYTES // (self.channels * self.size**2)) if self.keep else 0
        )
        self._memory = np.empty(
            (kept, self.channels, self.size, self.size), np.uint8
        )  # pages are touched when written
        self._held = np.zeros(kept, bool)

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_held")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._allocate()

    def image(self, i: int) -> UInt8[Tensor, "c h w"]:
        """Sample i; ValueError with name and reason if it cannot be read."""
        try:
            return torch.from_numpy(self._pixels(i).copy())
        except UnreadableImage as reason:
            raise ValueError(f"{self.source.name(i)} cannot be read: {reason}") from reason

    def label(self, i: int) -> int | None:
        """Class index of sample i, or None."""
        labels = self.source.labels
        return None if labels is None or labels[i] == NO_LABEL else int(labels[i])

    def text(self, i: int) -> str | None:
        """Caption of sample i, or None."""
        return self.source.text(i)

    def name(self, i: int) -> str:
        """What reports call sample i: its file name, or its row."""
        return self.source.name(i)

    def readable(self, i: int) -> int:
        """i, or the index of the picture that stands in for it in `batch`: the next readable one, cyclically."""
        for j in (k % len(self) for k in range(i, i + min(MAX_REPLACEMENTS, len(self)))):
            try:
                self._pixels(j)
                return j
            except UnreadableImage:
                continue
        raise ValueError(f"{self.source.name(i)} and all that follow cannot be read: {self.report}")

    def batch(
        self, indices: Sequence[int] | Int64[Tensor, " b"]
    ) -> tuple[UInt8[Tensor, "b c h w"], Int64[Tensor, " b"] | None]:
        """Pictures and labels (None for a set without labels); unreadable ones replaced, see the class."""
        out = np.empty((len(indices), self.channels, self.size, self.size), np.uint8)
        used = np.empty(len(indices), np.int64)
        for row, i in enumerate(indices.tolist() if isinstance(indices, Tensor) else indices):
            try:
                used[row], out[row] = i, self._pixels(i)
            except UnreadableImage:
                used[row] = self.readable(i)
                out[row] = self._pixels(int(used[row]))
        labels = self.source.labels
        return torch.from_numpy(out), None if labels is None else torch.from_numpy(labels[used])

    def to_model(
        self,
        loaded: UInt8[Tensor, "b c h w"],
        seed: int,
        numbers: list[int],
        mirror: bool,
        send: Send,
    ) -> Float[Tensor, "b c h w"]:
        """What `batch` gave as the network's images in -1...1; with `mirror`, half of the image numbers are mirrored.

        send: moves a tensor to the device of the network.
        """
        if mirror:
            loaded = flip(loaded, draw_flips(seed, numbers))
        return to_model_range(send(loaded))

    def mark_unreadable(self, found: dict[int, str]) -> None:
        """Take over what another process found: index -> reason."""
        for i, reason in found.items():
            self._unreadable[i] = self.report.unreadable[self.source.name(i)] = reason

    def unreadable(self) -> dict[int, str]:
        """What was found unreadable so far: index -> reason."""
        return dict(self._unreadable)

    def _pixels(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise ValueError(f"sample {i} of a set of {len(self)}")
        if i < len(self._held) and self._held[i]:
            return self._memory[i]
        if i in self._unreadable:
            raise UnreadableImage(self._unreadable[i])
        try:
            pixels = self.decode(i).pixels
        except UnreadableImage as reason:
            self.mark_unreadable({i: str(reason)})
            raise
        if i < len(self._held):
            self._memory[i] = pixels
            self._held[i] = True  # after the pixels: another thread may look
        return pixels

    def decode(self, i: int) -> DecodedImage:
        """Sample i read anew and as it was stored; may raise `Unreadable`."""
        stored = self.source.read(i)
        if isinstance(stored, np.ndarray):
            mode, original = {1: "L", 3: "RGB"}[stored.shape[0]], (stored.shape[2], stored.shape[1])
            if stored.shape == (self.channels, self.size, self.size):
                return DecodedImage(stored, mode, *original)
            stored = Image.fromarray(
                stored[0] if mode == "L" else np.ascontiguousarray(stored.transpose(1, 2, 0))
            )
        mode, (width, height) = stored.mode, stored.size
        return DecodedImage(
            to_pixels(stored, self.size, self.channels, self.crop), mode, width, height
        )


def open_images(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int = 3,
    crop: str | None = None,
    keep_in_memory: bool = True,
) -> ImageDataset:
    """Open pictures of any modes, sizes and aspect ratios as uint8 (channels, size, size) by index.

    Args:
        source: a folder (class subfolders or flat) or a zip of one; a folder of `prepare`; parquet, Arrow or webdataset
            files (one file, a pattern, or a folder); an .npz; a data set of the hub as OWNER/NAME; "digits"; "shapes",
            with options as in "shapes:count=5000,seed=1". "SOURCE:SPLIT" chooses a part: train, test, all, or a split
            the data set itself names. Without a split: the training part if the source states one, else everything.
            The test part of a source that states none is every tenth image in its order.
        size: side in pixels; None takes that of a prepared folder, of "shapes:64" or "digits:16".
        channels: 1 (grey) or 3 (RGB).
        crop: "adm" (ADM's halving, bicubic, centre crop) or "plain" (one Lanczos step on the central square); None is
            "adm", or whatever a prepared folder of this size was made with.
        keep_in_memory: keep decoded pixels, up to 1 GiB; otherwise decode at every read.
    """
    opened, size = open_source(str(source), size)
    made_with = opened.crop if isinstance(opened, PreparedSource) and opened.shape[1] == size else None
    if crop is not None and made_with not in (None, crop):
        raise ValueError(
            f"{source} was prepared with crop {made_with!r}, not {crop!r}; give None or prepare anew"
        )
    # The operating system keeps memory maps already.
    keep = keep_in_memory and not isinstance(opened, PreparedSource)
    images = ImageDataset(
        opened, size=size, channels=channels, crop=crop or made_with or "adm", keep=keep
    )
    _check_some_readable(images, str(source))
    return images


def open_source(source: str, size: int | None) -> tuple[Source, int]:
    """The source that `source` names and its size in pixels, see `open_images`."""
    base, option = (source, "") if os.path.exists(source) else split_suffix(source)
    if base in BUILTIN:
        return _open_builtin(base, option, size)
    split, path = option or None, Path(base).expanduser()
    if (path / CARD).is_file():
        prepared = open_prepared(path, check_split(base, split))
        return prepared, prepared.shape[1] if size is None else size
    if size is None:
        raise ValueError(f"{source!r} has no size of its own; give one in pixels, e.g. size=64")
    return _open_path(base, path, split), size


def _open_path(base: str, path: Path, split: str | None) -> Source:
    suffix = path.suffix.lower()
    if path.is_dir():
        if (path / LATENTS).is_file():
            raise ValueError(
                f"{base} holds latents, not pictures; give the pictures it was prepared from"
            )
        if _holds_rows(path):
            return open_table(base, split)
        return open_files(FolderStore(path), check_split(base, split))
    if suffix in ROW_FILES and (path.is_file() or "*" in path.name):
        return open_table(base, split, ROW_FILES[suffix])
    if path.is_file() and suffix == ".zip":
        return open_files(ZipStore(path), check_split(base, split))
    if path.is_file() and suffix == ".npz":
        return open_npz(path, check_split(base, split))
    if path.is_file():
        raise ValueError(
            f"{base} is one file; give its folder, a .zip, .npz, {', '.join(ROW_FILES)}"
        )
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        return open_table(base, split)
    raise ValueError(
        f"no data at {base!r}; give a folder of images, a .zip, .npz or parquet file that exists, a hub data set as "
        f"OWNER/NAME, or a built-in set: {suggest(base, BUILTIN)}"
    )


def _holds_rows(folder: Path) -> bool:
    """Whether a folder is a saved data set or holds files of rows, in itself or in `data`, and no images."""
    entries = {
        entry.name: entry.is_dir() for entry in os.scandir(folder) if not entry.name.startswith(".")
    }
    if "state.json" in entries or "dataset_dict.json" in entries:
        return True
    if any(is_folder and name != "data" for name, is_folder in entries.items()):
        return False
    names = [*entries, *(os.listdir(folder / "data") if entries.get("data") else [])]
    suffixes = {Path(name).suffix.lower() for name in names}
    return bool(suffixes & set(ROW_FILES)) and not suffixes & image_suffixes()


def _open_builtin(name: str, option: str, size: int | None) -> tuple[Source, int]:
    """E.g. "digits", "digits:test", "shapes:64", "shapes:test,count=500,seed=1"."""
    split, numbers = "train", {}
    for word in filter(None, option.split(",")):
        key, _, value = word.rpartition("=")
        if word in SPLITS:
            split = word
        elif value.isdigit() and (key or "size") in (
            ("size", "count", "seed") if name == "shapes" else ("size",)
        ):
            numbers[key or "size"] = int(value)
        else:
            allowed = "train, test, all or a size" + (
                ", count=..., seed=..." if name == "shapes" else ""
            )
            raise ValueError(
                f"{name} takes no option {word!r}; allowed: {allowed}, as in '{name}:test,32'"
            )
    own = numbers.pop("size", None)
    if None not in (own, size) and own != size:
        raise ValueError(
            f"{name}:{option} asks for size {own}, the size given is {size}; give one of them"
        )
    side = size if own is None else own
    if side is None:
        raise ValueError(f"{name!r} comes in any size; give one in pixels, e.g. '{name}:32'")
    return (open_digits(split) if name == "digits" else open_shapes(side, split=split, **numbers)), side


def split_suffix(source: str) -> tuple[str, str]:
    """("NAME", "test") of "NAME:test"; (source, "") if nothing that reads as an option follows a colon."""
    match = re.fullmatch(r"(.+):([\w,=.-]+)", source)
    return (source, "") if match is None else (match[1], match[2])


def check_split(what: str, split: str | None) -> str | None:
    """`split` if it is one of train, test, all or absent."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"{what} has no split {split!r}; {suggest(split, SPLITS)}")
    return split


def _check_some_readable(images: ImageDataset, source: str) -> None:
    """A set of which nothing can be read should say so when it is opened: look for one that can, first far apart."""
    spread = np.linspace(0, len(images) - 1, 8).astype(int).tolist()
    for i in [*spread, *range(min(len(images), MAX_REPLACEMENTS))]:
        try:
            images.image(i)
            return
        except ValueError:
            continue
    raise ValueError(f"no image of {source} can be read: {images.report}")
