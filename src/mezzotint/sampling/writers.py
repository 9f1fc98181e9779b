"""Files of sampled images: a folder of PNGs, an ADM .npz, a WebDataset .tar, or one PNG grid.

Images arrive in runs of consecutive seeds, from any rank, and every writer can resume: an image
counts as written once a file with its final name holds it. A killed process or a full disk leaves
at most files called *.partial, which the next start removes. Ranks on several machines need a file
system that all of them see. Every output has a card: card.json in a folder, FILE.json next to FILE.
"""

from __future__ import annotations

import functools
import glob
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mezzotint.core.files import (
    atomic_open,
    atomic_write,
    check_replaceable,
    is_special,
    read_json,
    write_json,
)
from mezzotint.core.image_grid import class_captions, make_grid, to_pil

SamplingCard = dict[str, Any]  # how images were made, as JSON values
WriteShard = Callable[[IO[bytes], Sequence[int], Tensor, Sequence[int] | None], None]
DescribeImage = Callable[[int], dict[str, Any]]  # an image's prompt and settings, by seed
MergeShards = Callable[[IO[bytes], Sequence[Path], Sequence[int] | None], None]

ARCHIVE_TIME = (
    1980,
    1,
    1,
    0,
    0,
    0,
)  # of every archive member, so that equal images are equal files
ENCODERS = min(4, os.cpu_count() or 1)  # threads
METADATA = "metadata.jsonl"  # of a folder of images with prompts
BLOCK_BYTES = 4096  # a file system rounds a file up to this
MAX_CLASS_COLUMNS = 16  # of a grid with one column per class


@runtime_checkable
class ImageWriter(Protocol):
    """A place for images, as `generate_images` uses it."""

    def open(self, card: SamplingCard, overwrite: bool) -> None:
        """Claim the place for images of this card; ValueError if it holds others. Rank 0 only."""
        ...

    def missing(self, seeds: range) -> list[int]:
        """Return the seeds of images that are not written yet."""
        ...

    def write(self, seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None) -> None:
        """Write images of consecutive seeds, all of them or none."""
        ...

    def bytes_needed(self, seeds: range, missing: int, image_bytes: int) -> int:
        """Return an upper bound of the bytes still to be written, `image_bytes` per raw image."""
        ...

    def close(self, seeds: range, labels: Sequence[int] | None) -> None:
        """Make the final file once all images are written. Rank 0 only."""
        ...


def card_path(path: Path) -> Path:
    """Return the path of an output file's card."""
    return path.with_name(f"{path.name}.json")


def write_card(path: Path, card: SamplingCard) -> None:
    """Write an output file's card; a device or pipe has none."""
    if not is_special(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(card_path(path), card)


def read_sampling_card(path: Path) -> SamplingCard | None:
    """Return the card of an output file; None if it has none, so that the file is not ours."""
    try:
        card = read_json(card_path(path))
    except ValueError:
        return None
    return card if "mezzotint_samples" in card else None


def _is_card(path: Path) -> bool:
    return "mezzotint_samples" in read_json(path)


def _holds_only_card_parts(folder: Path) -> bool:
    """Return whether a folder is empty but for what a kill left before it had its first card."""
    return all(file.name.startswith(".card.json.") for file in folder.iterdir())


def _read_own_card(path: Path) -> SamplingCard:
    """Return the card of an output that is begun; ValueError for another program's card.json."""
    card = read_json(path, "remove it to start again")
    if "mezzotint_samples" not in card:
        raise ValueError(f"{path} is not a card of mezzotint sample; choose another --out")
    return card


def differences(old: SamplingCard, new: SamplingCard) -> list[str]:
    """Return the values in which two cards differ, except a number of images that grows."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    count = old.get("num_images")
    if isinstance(count, int) and count <= new["num_images"]:
        keys = [key for key in keys if key != "num_images"]
    return [f"{key}: {old.get(key)} there, {new.get(key)} given" for key in keys]


def _check_same_card(place: Path, lines: Sequence[str]) -> None:
    if lines:
        listing = "\n".join(f"  {line}" for line in lines)
        raise ValueError(
            f"{place} was begun with other settings:\n{listing}\n"
            "Use the same settings, choose another --out, or add --overwrite"
        )


def encode_png(image: Tensor, label: int | None = None) -> bytes:
    """Return a uint8 image (c, h, w) as PNG, with its label as a text field."""
    text = PngInfo()
    if label is not None:
        text.add_text("label", str(label))
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def encode_pngs(images: Tensor, labels: Sequence[int] | None = None) -> Iterator[bytes]:
    """Yield every uint8 image (b, c, h, w) as PNG, in order, encoded by several threads."""
    each = labels if labels is not None else [None] * len(images)
    with ThreadPoolExecutor(ENCODERS, "png") as pool:
        yield from pool.map(encode_png, images, each)


@dataclass(frozen=True)
class FolderWriter:
    """One PNG per image, named by its seed, and card.json; of prompts, metadata.jsonl too.

    metadata.jsonl has a row per image, as `read_prompts` and data sets read it.
    """

    path: Path
    describe: DescribeImage | None = None

    def _image_path(self, seed: int) -> Path:
        return self.path / f"{seed:06d}.png"

    def open(self, card: SamplingCard, overwrite: bool) -> None:
        """See `ImageWriter`; refuses a folder with files that `mezzotint sample` did not write."""
        card_file = self.path / "card.json"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(
                f"{self.path} is a file; end --out in .png, .npz or .tar, or name a folder"
            )
        if card_file.exists():
            lines = differences(_read_own_card(card_file), card)
            if not overwrite:
                _check_same_card(self.path, lines)
            else:
                for file in self.path.glob("*.png"):
                    if file.stem.isdigit():
                        file.unlink()
                (self.path / METADATA).unlink(missing_ok=True)
        elif self.path.exists() and not _holds_only_card_parts(self.path):
            raise ValueError(
                f"{self.path} holds files that mezzotint sample did not write; choose another --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for partial in self.path.glob(".*.partial"):
            partial.unlink()
        write_json(card_file, card)

    def missing(self, seeds: range) -> list[int]:
        """See `ImageWriter`."""
        names = set(os.listdir(self.path))
        return [seed for seed in seeds if self._image_path(seed).name not in names]

    def write(self, seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None) -> None:
        """See `ImageWriter`; each image by itself."""
        for seed, content in zip(seeds, encode_pngs(images, labels), strict=True):
            with atomic_open(self._image_path(seed)) as file:
                file.write(content)

    def bytes_needed(self, seeds: range, missing: int, image_bytes: int) -> int:
        """See `ImageWriter`."""
        return missing * (image_bytes + BLOCK_BYTES)

    def close(self, seeds: range, labels: Sequence[int] | None) -> None:
        """See `ImageWriter`: write the images' prompts; all else is there."""
        if self.describe is not None:
            lines = (
                json.dumps({"file_name": self._image_path(i).name} | self.describe(i))
                for i in seeds
            )
            atomic_write(self.path / METADATA, "".join(f"{line}\n" for line in lines))


@dataclass(frozen=True)
class ShardedWriter:
    """One file, merged at the end from shards that are kept in .NAME.parts until then.

    write_shard: writes images with their seeds and labels into an open shard.
    merge_shards: writes shards, in order, and all labels into the open file.
    keep_finished: refuse to replace a finished file. One without a card next to it is always kept.
    """

    path: Path
    write_shard: WriteShard
    merge_shards: MergeShards
    keep_finished: bool = True

    @property
    def folder(self) -> Path:
        """The folder of the shards; in the current folder for a device or pipe."""
        place = Path(self.path.name) if is_special(self.path) else self.path
        return place.with_name(f".{place.name}.parts")

    def _list_shards(self) -> list[tuple[range, Path]]:
        """Return the complete shards, sorted by seed; a shard's name is its range."""
        shards = []
        for file in self.folder.glob("[0-9]*-[0-9]*"):
            start, stop = file.name.split("-")
            shards.append((range(int(start), int(stop)), file))
        return sorted(shards, key=lambda shard: shard[0].start)

    def open(self, card: SamplingCard, overwrite: bool) -> None:
        """See `ImageWriter`; refuses a finished file, and shards of other settings."""
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder; name a file that does not exist")
        there = read_sampling_card(self.path)
        keep = self.keep_finished or there is None or "edit" in there
        if self.path.exists() and keep and not overwrite and not is_special(self.path):
            raise ValueError(
                f"{self.path} exists already; choose another --out, or add --overwrite"
            )
        if not overwrite and not is_special(self.path):
            check_replaceable(card_path(self.path), _is_card, "a card of samples")
        card_file = self.folder / "card.json"
        if card_file.exists():
            lines = differences(_read_own_card(card_file), card)
            if self.keep_finished and not overwrite:
                _check_same_card(self.folder, lines)
            if lines:
                shutil.rmtree(self.folder)
        elif self.folder.exists():
            if not _holds_only_card_parts(self.folder):
                raise ValueError(
                    f"{self.folder} holds files that mezzotint sample did not write; choose "
                    "another --out"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        partials = self.path.parent.glob(f".{glob.escape(self.path.name)}.*partial")
        for partial in [*self.folder.glob(".*.partial"), *partials]:
            partial.unlink(missing_ok=True)
        write_json(card_file, card)

    def missing(self, seeds: range) -> list[int]:
        """See `ImageWriter`."""
        written = {seed for shard, _ in self._list_shards() for seed in shard}
        return [seed for seed in seeds if seed not in written]

    def write(self, seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None) -> None:
        """See `ImageWriter`; one shard."""
        with atomic_open(self.folder / f"{seeds[0]:09d}-{seeds[-1] + 1:09d}") as file:
            self.write_shard(file, seeds, images, labels)

    def bytes_needed(self, seeds: range, missing: int, image_bytes: int) -> int:
        """See `ImageWriter`: the shards, and the final file next to them."""
        return (missing + len(seeds)) * (image_bytes + BLOCK_BYTES // 2)

    def close(self, seeds: range, labels: Sequence[int] | None) -> None:
        """See `ImageWriter`."""
        shards = self._list_shards()
        assert [seed for shard, _ in shards for seed in shard] == list(seeds)
        with atomic_open(self.path) as file:
            self.merge_shards(file, [path for _, path in shards], labels)
            # The card first: a file with its final name always has one.
            if not is_special(self.path):
                atomic_write(card_path(self.path), (self.folder / "card.json").read_bytes())
        shutil.rmtree(self.folder)


def _write_array(
    file: IO[bytes], seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None
) -> None:
    """Write uint8 images as (b, h, w, c), latents as they are."""
    array = images.permute(0, 2, 3, 1) if images.dtype == torch.uint8 else images
    np.save(file, array.contiguous().numpy())


def _merge_npz(file: IO[bytes], shards: Sequence[Path], labels: Sequence[int] | None) -> None:
    """Write images as arr_0 and labels as arr_1, as ADM's evaluator reads them.

    One shard is in memory at a time.
    """
    first = np.load(shards[0], mmap_mode="r")
    count = sum(len(np.load(shard, mmap_mode="r")) for shard in shards)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape[1:])}

    def open_member(archive: zipfile.ZipFile, name: str) -> Any:
        return archive.open(zipfile.ZipInfo(name, ARCHIVE_TIME), "w", force_zip64=True)

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with open_member(archive, "arr_0.npy") as member:
            np.lib.format.write_array_header_1_0(member, header)
            for shard in shards:
                member.write(np.load(shard).tobytes())
        if labels is not None:
            with open_member(archive, "arr_1.npy") as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))


def _open_tar(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)


def _write_tar(
    file: IO[bytes],
    seeds: Sequence[int],
    images: Tensor,
    labels: Sequence[int] | None,
    describe: DescribeImage | None = None,
) -> None:
    """Write WebDataset's samples: SEED.png, and SEED.cls with the class index as text.

    Of prompts, SEED.json holds what `describe` returns.
    """

    def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))

    with _open_tar(file) as archive:
        for i, (seed, content) in enumerate(zip(seeds, encode_pngs(images), strict=True)):
            add(archive, f"{seed:09d}.png", content)
            if labels is not None:
                add(archive, f"{seed:09d}.cls", str(labels[i]).encode())
            if describe is not None:
                add(archive, f"{seed:09d}.json", json.dumps(describe(seed)).encode())


def _merge_tar(file: IO[bytes], shards: Sequence[Path], labels: Sequence[int] | None) -> None:
    """Write the members of all shards in order."""
    with _open_tar(file) as archive:
        for shard in shards:
            with tarfile.open(shard) as source:
                for member in source:
                    archive.addfile(member, source.extractfile(member))


def _columns_of_classes(labels: Sequence[int] | None) -> int | None:
    """Return the number of classes if one column per class makes a grid no higher than wide.

    None otherwise, for too many classes, and unless the labels take the classes in turn, as those
    of `mezzotint sample` do by default.
    """
    if labels is None:
        return None
    classes = len(set(labels))
    turns = len(labels) // classes
    in_turn = list(labels) == [*labels[:classes]] * turns
    return classes if in_turn and 2 <= turns <= classes <= MAX_CLASS_COLUMNS else None


def _make_grid_merger(names: Sequence[str] | None) -> MergeShards:
    def merge_grid(file: IO[bytes], shards: Sequence[Path], labels: Sequence[int] | None) -> None:
        arrays = np.concatenate([np.load(shard) for shard in shards])
        captions = None if labels is None else class_captions(labels, names)
        images = torch.from_numpy(arrays).permute(0, 3, 1, 2)
        make_grid(images, _columns_of_classes(labels), captions).save(file, format="PNG")

    return merge_grid


def make_writer(
    path: Path,
    label_names: Sequence[str] | None = None,
    latents: bool = False,
    describe: DescribeImage | None = None,
    sizes: Sequence[tuple[int, int]] = (),
) -> ImageWriter:
    """Return the writer that a path's ending names.

    No ending is a folder of PNGs. .npz and .tar hold all images. .png is one grid with labels under
    the images; so does a device or pipe of another name.

    Args:
        describe: of images with prompts: a folder and a .tar keep it for each image.
        sizes: of the images.

    Errors: ValueError for other endings, for latents in anything but a .npz, and for images of
        several sizes in anything but a folder or a .tar.
    """
    suffix = path.suffix.lower()
    if len(sizes) > 1 and suffix not in ("", ".tar"):
        shown = ", ".join(f"{height}x{width}" for height, width in sizes[:4])
        raise ValueError(
            f"images of several sizes ({shown}) do not fit in {path}; name a folder or a .tar"
        )
    if latents and suffix != ".npz":
        raise ValueError(f"latents are written as .npz; given {path}")
    if suffix == ".npz":
        return ShardedWriter(path, _write_array, _merge_npz)
    if suffix == ".tar":
        return ShardedWriter(path, functools.partial(_write_tar, describe=describe), _merge_tar)
    if suffix == ".png" or is_special(path):
        return ShardedWriter(
            path, _write_array, _make_grid_merger(label_names), keep_finished=False
        )
    if suffix:
        raise ValueError(f"{path} is neither a folder nor a .npz, .tar or .png")
    return FolderWriter(path, describe)


def check_edit_output(out: Path, overwrite: bool, gif: Path | None = None) -> None:
    """Check that an edit may write `out`, a .png, and `gif`.

    Errors: ValueError for another ending, and for files that no edit has written.
    """
    if out.suffix.lower() != ".png" and not is_special(out):
        raise ValueError(f"edited images are written as .png; given {out}")
    card = read_sampling_card(out) or {}
    foreign = [out] if out.exists() and "edit" not in card and not is_special(out) else []
    if gif is not None and gif.exists() and card.get("edit") not in ("trajectory", "interpolate"):
        foreign.append(gif)
    if foreign and not overwrite:
        raise ValueError(f"{foreign[0]} exists already; choose another --out, or add --overwrite")
    if not overwrite and not is_special(out):
        check_replaceable(card_path(out), _is_card, "a card of samples")
