"""Images of any source as uint8 tensors of one size, by index: `open_images`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from mezzotint.core.files import expand_user
from mezzotint.core.object_store import is_address
from mezzotint.core.paths import explain_path, is_hub_name, kind_of
from mezzotint.core.registry import suggest
from mezzotint.data.builtin import open_digits
from mezzotint.data.columns import Columns, check_columns
from mezzotint.data.dataset import PixelDataset
from mezzotint.data.full_scale import FullScale, measure_full_scale
from mezzotint.data.npz_source import open_npz
from mezzotint.data.prepared_source import CARD, PreparedSource, open_prepared
from mezzotint.data.row_files import ROW_FILES, check_saved_files, find_row_files, is_webdataset
from mezzotint.data.shapes import open_shapes
from mezzotint.data.shuffle import shuffled_indices
from mezzotint.data.sources import (
    SPLITS,
    Source,
    hash_parts,
    open_files,
)
from mezzotint.data.splits import find_splits, split_kinds
from mezzotint.data.stores import FolderStore, Store, TarStore, find_store
from mezzotint.data.tables import open_table
from mezzotint.data.transforms import CROPS, to_pillow, to_pixels

MEMORY_LIMIT_BYTES = 1 << 30  # of decoded pixels kept in memory
BUILTIN = ("digits", "shapes")
LATENTS = "latents.json"  # card of a folder of `mezzotint.data.encode_latents`


class DecodedImage(NamedTuple):
    """uint8 (c, h, w) pixels at the dataset's size; mode, width and height of the stored image."""

    pixels: np.ndarray
    mode: str
    width: int
    height: int


@final
class ImageDataset(PixelDataset):
    """Images by index as uint8 (channels, size, size), with labels and captions of the source."""

    def __init__(
        self,
        source: Source,
        *,
        size: int,
        channels: int = 3,
        crop: str = "adm",
        keep: bool = True,
        full_scale: int | None = None,
    ):
        """See `open_images`; `keep` holds up to MEMORY_LIMIT_BYTES of decoded pixels in memory."""
        if size < 1:
            raise ValueError(f"size {size}; give the side in pixels, e.g. 64")
        if channels not in (1, 3):
            raise ValueError(f"channels {channels}; allowed: 1 (grey), 3 (RGB)")
        if crop not in CROPS:
            raise ValueError(f"unknown crop {crop!r}; {suggest(crop, CROPS)}")
        self.full_scale = measure_full_scale(source.read, len(source), full_scale)
        how = f"{size} {channels} {crop}{self.full_scale.key}"
        fingerprint = hash_parts([source.identity(), how])
        super().__init__(source, channels, fingerprint, (*source.notes, *self.full_scale.notes))
        self.size, self.crop, self.keep = size, crop, keep
        self._allocate()

    def _allocate(self) -> None:
        image_bytes = self.channels * self.size**2
        kept = min(len(self), MEMORY_LIMIT_BYTES // image_bytes) if self.keep else 0
        # The operating system allocates a page when it is first written.
        self._memory = np.empty((kept, self.channels, self.size, self.size), np.uint8)
        self._in_memory = np.zeros(kept, bool)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_memory", "_in_memory")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._allocate()

    def text(self, i: int) -> str | None:
        """Return the caption of image i, or None."""
        return self.source.text(i)

    def batch_indices(self, seed: int, start: int, count: int, batch: int) -> Int64[Tensor, " n"]:
        """Return the image indices of the sample numbers start ... start + count - 1 of a run."""
        return shuffled_indices(seed, start, count, len(self))

    def _target_size(self, i: int) -> tuple[int, int]:
        return self.size, self.size

    def _replacements(self, i: int) -> Iterable[int]:
        return (k % len(self) for k in range(i, i + len(self)))

    def _decode_pixels(self, i: int) -> np.ndarray:
        if i < len(self._in_memory) and self._in_memory[i]:
            return self._memory[i]
        pixels = self.decode(i).pixels
        if i < len(self._in_memory):
            self._memory[i] = pixels
            self._in_memory[i] = True  # after the pixels: another thread may read
        return pixels

    def decode(self, i: int) -> DecodedImage:
        """Read image i from the source; `UnreadableImage` if it is damaged."""
        stored = self.source.read(i)
        return decode_stored(stored, self.size, self.channels, self.crop, self.full_scale)


def decode_stored(
    stored: Image.Image | np.ndarray, size: int, channels: int, crop: str, full_scale: FullScale
) -> DecodedImage:
    """Return what `Source.read` returned at one size; `UnreadableImage` if it is damaged.

    Pixels of that size and number of channels stay as they are.
    """
    if isinstance(stored, np.ndarray):
        mode, (height, width) = {1: "L", 3: "RGB"}[stored.shape[0]], stored.shape[1:]
        if stored.shape == (channels, size, size):
            return DecodedImage(stored, mode, width, height)
        stored = to_pillow(stored)
    mode, (width, height) = stored.mode, stored.size
    return DecodedImage(to_pixels(stored, size, channels, crop, full_scale), mode, width, height)


def open_images(
    source: str | Path,
    *,
    size: int | None = None,
    channels: int = 3,
    crop: str | None = None,
    columns: Columns | None = None,
    keep_in_memory: bool = True,
    full_scale: int | None = None,
) -> ImageDataset:
    """Open images of any modes, sizes and aspect ratios as uint8 (channels, size, size) by index.

    Args:
        source: a folder (class subfolders or flat), or a zip or tar of one; a folder of `mezzotint
            prepare`; parquet, Arrow or webdataset files (one file, a pattern, or a folder); an
            .npz; a Hugging Face dataset as OWNER/NAME; "digits"; "shapes", with options as in
            "shapes:count=5000,seed=1". "SOURCE:SPLIT" chooses a split: train, test, all, or one
            that the dataset names. Without it: the training split if the source has one, else all
            images; a folder or archive with folders of splits is refused, with their names. The
            test split of a source that has none is every tenth image, in its order.
        size: side in pixels; None takes that of a prepared folder, of "shapes:64" or "digits:16".
        channels: 1 (grey) or 3 (RGB).
        crop: "adm" (ADM's halving, bicubic, centre crop) or "plain" (one Lanczos step on the
            central square); None is "adm", or the crop of a prepared folder of this size.
        columns: of a table, or of a file of labels and captions: "image", "label" and "caption" ->
            names, "" for none. By default they are chosen by name, then by type.
        keep_in_memory: keep decoded pixels, up to 1 GiB; otherwise decode at every read.
        full_scale: the value that is white in grey images of more than 8 bits, e.g. 4095; None
            takes the smallest usual one that holds the largest value of a sample of the dataset.
    """
    opened, size = open_source(str(source), size, columns)
    is_prepared = isinstance(opened, PreparedSource)
    prepared_crop = opened.crop if is_prepared and opened.shape[1] == size else None
    if crop is not None and prepared_crop not in (None, crop):
        raise ValueError(
            f"{source} was prepared with crop {prepared_crop!r}, not {crop!r}; give crop "
            f"{prepared_crop!r} (in a recipe data.crop={prepared_crop}), or prepare the images "
            "again"
        )
    dataset = ImageDataset(
        opened,
        size=size,
        channels=channels,
        crop=crop or prepared_crop or "adm",
        # The system caches memory maps already.
        keep=keep_in_memory and not (is_prepared and opened.form.is_raw),
        full_scale=full_scale,
    )
    _check_some_readable(dataset, str(source))
    return dataset


def open_source(
    source: str, size: int | None, columns: Columns | None = None
) -> tuple[Source, int]:
    """Return the named source and its size in pixels, see `open_images`."""
    check_columns(columns)
    base, option = split_source(source)
    if base in BUILTIN:
        check_no_columns(base, columns)
        return _open_builtin(base, option, size)
    split, path = option or None, expand_user(base)
    if (path / CARD).is_file():
        check_no_columns(base, columns)
        prepared = open_prepared(path, check_split(base, split))
        return prepared, prepared.shape[1] if size is None else size
    if size is None:
        raise ValueError(f"{source!r} has no size of its own; give one in pixels, e.g. size=64")
    return _open_path(base, path, split, columns), size


def check_no_columns(what: str, columns: Columns | None) -> None:
    """Raise ValueError where columns are chosen of data that has none."""
    if columns:
        raise ValueError(
            f"{what} is no table: data.columns chooses nothing in it; leave it out, or give it to "
            "`mezzotint prepare`"
        )


def _open_path(base: str, path: Path, split: str | None, columns: Columns | None) -> Source:
    if is_address(base):
        raise ValueError(
            f"{base} is an address: `mezzotint train PRESET --data {base}` reads its shards, and "
            "--dry-run checks them; here, give images on a disk"
        )
    suffix = path.suffix.lower()
    if (found := find_store(path)) is not None:
        return _open_files_or_rows(base, split, *found, columns)
    if suffix in ROW_FILES and (path.is_file() or "*" in path.name):
        return open_table(str(path), split, ROW_FILES[suffix], columns=columns)
    if path.is_file() and suffix == ".npz":
        check_no_columns(base, columns)
        return open_npz(path, split)
    if path.is_file():
        raise ValueError(
            f"{base} is a single file, {kind_of(base)}; give its folder, a .zip, .npz, "
            f"{', '.join(ROW_FILES)}, .tar.gz or .tgz"
        )
    if split is None and names_split_of_parent(path):
        store = FolderStore(path.parent)
        return _open_files_or_rows(str(path.parent), path.name, store, "", columns)
    if is_hub_name(base):
        return open_table(base, split, columns=columns)
    raise ValueError(
        f"no data at {base!r}: {explain_path(base, 'a data set')}; give a folder of images, a "
        ".zip, .tar, .npz or parquet file, a Hugging Face dataset as OWNER/NAME, or a built-in "
        f"dataset ({suggest(base, BUILTIN)})"
    )


def names_split_of_parent(path: Path) -> bool:
    """Return whether a missing FOLDER/val means a split of FOLDER, e.g. FOLDER/validation.

    FOLDER must have splits: else all below it would be taken for the images of a wrong path.
    """
    if path.exists() or not split_kinds([path.name]) or not path.parent.is_dir():
        return False
    if (path.parent / "dataset_dict.json").is_file():
        return True
    listing = FolderStore(path.parent).listing()
    if (rows := find_row_files(str(path.parent), listing)) is not None:
        return len(rows[1]) > 1
    return bool(find_splits(list(listing.sizes), ""))


def _open_files_or_rows(
    base: str, split: str | None, store: Store, below: str, columns: Columns | None
) -> Source:
    """Open a folder or archive of images, or of files of rows."""
    root = store.root
    if (root / LATENTS).is_file():
        raise ValueError(
            f"{base} holds latents; give the folder of images from which they were prepared"
        )
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        check_saved_files(root, store.listing())
        return open_table(str(root), split, columns=columns)
    listing = store.listing()
    if isinstance(store, TarStore) and is_webdataset(listing.sizes):
        files = {"train": [str(store.plain)]}
        return open_table(base, split, "webdataset", files, columns)
    if isinstance(store, FolderStore) and (rows := find_row_files(base, listing)):
        return open_table(base, split, *rows, columns)
    return open_files(store, split, columns, below=below, listing=listing)


def _open_builtin(name: str, option: str, size: int | None) -> tuple[Source, int]:
    """Open e.g. "digits", "digits:test", "shapes:64", "shapes:test,count=500,seed=1"."""
    split, values = "train", {}
    keys = ("size", "count", "seed") if name == "shapes" else ("size",)
    for word in filter(None, option.split(",")):
        key, _, value = word.rpartition("=")
        if word in SPLITS:
            split = word
        elif value.isdigit() and (key or "size") in keys:
            values[key or "size"] = int(value)
        else:
            more = "".join(f", {key}=..." for key in keys[1:])
            raise ValueError(
                f"{name} has no option {word!r}; allowed: train, test, all or a size{more}, "
                f"as in '{name}:test,32'"
            )
    own_size = values.pop("size", None)
    if None not in (own_size, size) and own_size != size:
        raise ValueError(
            f"{name}:{option} asks for size {own_size}, the size given is {size}; give one of them"
        )
    size = size if own_size is None else own_size
    if size is None:
        raise ValueError(f"{name!r} comes in any size; give one in pixels, e.g. '{name}:32'")
    source = open_digits(split) if name == "digits" else open_shapes(size, split=split, **values)
    return source, size


def split_source(source: str) -> tuple[str, str]:
    """Return ("NAME", "test") for "NAME:test", and (source, "") where no option follows a colon.

    A path that exists is never divided.
    """
    match = re.fullmatch(r"(.+):([^/\\:]+)", source, re.DOTALL)
    if match is None or os.path.lexists(os.path.expanduser(source)):
        return source, ""
    return match[1], match[2]


def check_split(what: str, split: str | None) -> str | None:
    """Return `split`; ValueError unless it is train, test, all or None."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"{what} has no split {split!r}; {suggest(split, SPLITS)}")
    return split


def _check_some_readable(dataset: ImageDataset, source: str) -> None:
    """Raise ValueError if no image can be read: try images far apart first, then all."""
    spread = np.linspace(0, len(dataset) - 1, 8).astype(int).tolist()
    for i in [*spread, *range(len(dataset))]:
        try:
            dataset.image(i)
            return
        except ValueError:
            continue
    raise ValueError(f"no image of {source} can be read: {dataset.report}")
