"""Where many images go: a folder of PNGs, an ADM .npz, a WebDataset .tar, one PNG grid. All of them can be taken up.

Images arrive in runs of consecutive seeds from any rank, and count as there once a file with its final name is. A
process that is killed, or a disk that is full, leaves at most files called *.partial, which the next start removes.
Several machines need a file system that all of them see. Every output carries its card: a folder as card.json, a file
FILE as FILE.json beside it.
"""

from __future__ import annotations

import glob
import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mezzotint.core.files import atomic_open, read_json, write_json
from mezzotint.core.image_grid import make_grid, to_pil

SamplingCard = dict[str, Any]
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time inside archives, so that equal images are equal files
BLOCK = 4096  # bytes; what a file system rounds a file up to


@runtime_checkable
class ImageWriter(Protocol):
    """What `produce` knows of a place for images."""

    def begin(self, card: SamplingCard, overwrite: bool) -> None:
        """Claim the place for images of this card, or raise ValueError; called on rank 0, before anything else."""
        ...

    def missing(self, seeds: range) -> list[int]:
        """Which of these images are not there yet."""
        ...

    def put(self, seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None) -> None:
        """Store images of consecutive seeds, completely or not at all."""
        ...

    def room(self, seeds: range, missing: int, image_bytes: int) -> int:
        """Upper bound of the bytes still to be written, raw images taking `image_bytes`."""
        ...

    def finish(self, seeds: range, labels: Sequence[int] | None) -> None:
        """All are there: make the final file. Called on rank 0."""
        ...


def read_sampling_card(path: Path) -> SamplingCard | None:
    """The card of images written to a file; None where none lies beside it, so that the file is somebody else's."""
    try:
        card = read_json(path.with_name(f"{path.name}.json"))
    except (OSError, ValueError):
        return None
    return card if "mezzotint_samples" in card else None


def differences(old: SamplingCard, new: SamplingCard) -> list[str]:
    """In what two cards differ, but for a number of images that grows."""
    lines = [
        f"{k}: {old.get(k)} there, {new.get(k)} asked"
        for k in {**old, **new}
        if old.get(k) != new.get(k)
    ]
    grows = isinstance(old.get("num_images"), int) and old["num_images"] <= new["num_images"]
    return [line for line in lines if not (grows and line.startswith("num_images: "))]


def _refuse(place: Path, lines: Sequence[str]) -> None:
    listing = "\n".join(f"  {line}" for line in lines)
    raise ValueError(
        f"{place} was begun with other settings:\n{listing}\nAsk for the same, choose another --out, or add --overwrite"
    )


def encode_png(image: Tensor, label: int | None = None) -> bytes:
    """A uint8 image (c, h, w) as PNG, its label as a text field."""
    text = PngInfo()
    if label is not None:
        text.add_text("label", str(label))
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG", pnginfo=text)
    return file.getvalue()


@dataclass(frozen=True)
class FolderWriter:
    """One PNG per image, named by its number, and card.json."""

    path: Path

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.png"

    def begin(self, card: SamplingCard, overwrite: bool) -> None:
        """See `Output`; refuses a folder with files that are not a sampling run's."""
        kept = self.path / "card.json"
        if self.path.is_file():
            raise ValueError(
                f"{self.path} is a file; end --out in .png, .npz or .tar, or name a folder"
            )
        if kept.exists() and (lines := differences(read_json(kept), card)):
            if not overwrite:
                _refuse(self.path, lines)
            for file in self.path.glob("*.png"):
                if file.stem.isdigit():
                    file.unlink()
        elif not kept.exists() and self.path.exists() and any(self.path.iterdir()):
            raise ValueError(
                f"{self.path} holds files that are not a sampling run's; choose another --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in self.path.glob(".*.partial"):
            stale.unlink()
        write_json(kept, card)

    def missing(self, seeds: range) -> list[int]:
        """See `Output`."""
        there = set(os.listdir(self.path))
        return [i for i in seeds if self._file(i).name not in there]

    def put(self, seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None) -> None:
        """See `Output`; each image by itself."""
        for i, (number, image) in enumerate(zip(seeds, images, strict=True)):
            with atomic_open(self._file(number)) as file:
                file.write(encode_png(image, None if labels is None else labels[i]))

    def room(self, seeds: range, missing: int, image_bytes: int) -> int:
        """See `Output`."""
        return missing * (image_bytes + BLOCK)

    def finish(self, seeds: range, labels: Sequence[int] | None) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class ShardedWriter:
    """One file at the end, made of parts kept beside it in .NAME.parts until then.

    write: images with seeds and labels into an open part. merge: parts in order, with all labels, into the open file.
    keep: whether a finished file is refused rather than replaced; one without a card beside it always is.
    """

    path: Path
    write: Callable[[IO[bytes], Sequence[int], Tensor, Sequence[int] | None], None]
    merge: Callable[[IO[bytes], Sequence[Path], Sequence[int] | None], None]
    keep: bool = True

    @property
    def folder(self) -> Path:
        """Of the parts."""
        return self.path.with_name(f".{self.path.name}.parts")

    def _parts(self) -> list[tuple[range, Path]]:
        """The complete parts by number; each file's name is its range."""
        found = []
        for file in self.folder.glob("[0-9]*-[0-9]*"):
            start, stop = file.name.split("-")
            found.append((range(int(start), int(stop)), file))
        return sorted(found, key=lambda part: part[0].start)

    def begin(self, card: SamplingCard, overwrite: bool) -> None:
        """See `Output`; refuses a finished file, and parts of another run."""
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder")
        if (
            self.path.exists()
            and not overwrite
            and (self.keep or read_sampling_card(self.path) is None)
        ):
            raise ValueError(
                f"{self.path} exists already; choose another --out, or add --overwrite"
            )
        kept = self.folder / "card.json"
        if self.folder.exists():
            lines = differences(read_json(kept), card) if kept.exists() else ["no card"]
            if lines and self.keep and kept.exists() and not overwrite:
                _refuse(self.folder, lines)
            if lines:
                shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in [
            *self.folder.glob(".*.partial"),
            *self.path.parent.glob(f".{glob.escape(self.path.name)}.*.partial"),
        ]:
            stale.unlink(missing_ok=True)
        write_json(kept, card)

    def missing(self, seeds: range) -> list[int]:
        """See `Output`."""
        there = {i for part, _ in self._parts() for i in part}
        return [i for i in seeds if i not in there]

    def put(self, seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None) -> None:
        """See `Output`; one part."""
        with atomic_open(self.folder / f"{seeds[0]:09d}-{seeds[-1] + 1:09d}") as file:
            self.write(file, seeds, images, labels)

    def room(self, seeds: range, missing: int, image_bytes: int) -> int:
        """See `Output`: the parts, and the file beside them."""
        return (missing + len(seeds)) * (image_bytes + BLOCK // 2)

    def finish(self, seeds: range, labels: Sequence[int] | None) -> None:
        """See `Output`."""
        parts = self._parts()
        assert [i for part, _ in parts for i in part] == list(seeds)
        with atomic_open(self.path) as file:
            self.merge(file, [path for _, path in parts], labels)
            # The card first: a file with its final name is never without one.
            shutil.copyfile(
                self.folder / "card.json", self.path.with_name(f"{self.path.name}.json")
            )
        shutil.rmtree(self.folder)


def _write_array(
    file: IO[bytes], seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None
) -> None:
    """uint8 images as (b, h, w, c), latents as they are."""
    array = images.permute(0, 2, 3, 1) if images.dtype == torch.uint8 else images
    np.save(file, array.contiguous().numpy())


def _merge_npz(file: IO[bytes], parts: Sequence[Path], labels: Sequence[int] | None) -> None:
    """arr_0 the images and arr_1 the labels, as ADM's evaluator reads them; one part in memory at a time."""
    first = np.load(parts[0], mmap_mode="r")
    count = sum(len(np.load(part, mmap_mode="r")) for part in parts)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape[1:])}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(np.load(part).tobytes())
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(labels, dtype=np.int64))


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _write_tar(
    file: IO[bytes], seeds: Sequence[int], images: Tensor, labels: Sequence[int] | None
) -> None:
    """WebDataset's samples: NUMBER.png, and NUMBER.cls with the class as text."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for i, (number, image) in enumerate(zip(seeds, images, strict=True)):
            _add(archive, f"{number:09d}.png", encode_png(image))
            if labels is not None:
                _add(archive, f"{number:09d}.cls", str(labels[i]).encode())


def _merge_tar(file: IO[bytes], parts: Sequence[Path], labels: Sequence[int] | None) -> None:
    """The members of all parts in order."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for part in parts:
            with tarfile.open(part) as source:
                for member in source:
                    archive.addfile(member, source.extractfile(member))


def _merge_grid(
    names: Sequence[str] | None,
) -> Callable[[IO[bytes], Sequence[Path], Sequence[int] | None], None]:
    def merge(file: IO[bytes], parts: Sequence[Path], labels: Sequence[int] | None) -> None:
        images = torch.from_numpy(np.concatenate([np.load(part) for part in parts])).permute(
            0, 3, 1, 2
        )
        captions = (
            None
            if labels is None
            else [names[i] if names and i < len(names) else str(i) for i in labels]
        )
        make_grid(images, captions=captions).save(file, format="PNG")

    return merge


def make_writer(
    path: Path, label_names: Sequence[str] | None = None, latents: bool = False
) -> ImageWriter:
    """The output that a path's ending names: a folder, .npz, .tar, or .png for one grid with labels under the images.

    Errors: ValueError for other endings, and for latents anywhere but in a .npz.
    """
    if latents and path.suffix != ".npz":
        raise ValueError(f"latents are written as .npz; given {path}")
    if path.suffix == ".npz":
        return ShardedWriter(path, _write_array, _merge_npz)
    if path.suffix == ".tar":
        return ShardedWriter(path, _write_tar, _merge_tar)
    if path.suffix == ".png":
        return ShardedWriter(path, _write_array, _merge_grid(label_names), keep=False)
    if path.suffix:
        raise ValueError(f"{path} is neither a folder nor a .npz, .tar or .png")
    return FolderWriter(path)
