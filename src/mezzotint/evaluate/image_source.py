"""Where the images to be judged come from: a folder, a sample file, prepared data, or a model's samples by seed.

Each is an `ImageSource`: n images by index, so that work can be shared over ranks, interrupted and taken up again.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.core.files import sha256_of_file
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import LATENTS, ImageDataset, open_images, split_suffix
from mezzotint.data.sources import Folder, Zip, open_files
from mezzotint.data.tables import CARD
from mezzotint.sampling.generate_images import CARD_FORMAT, SamplingJob

READ_BATCH = 64  # images decoded at a time


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images by index.

    name: for print. n: how many. resolution: (height, width), None before the first is seen.
    batches: (start, stop) -> tensors (b, channels, h, w), uint8 or float in [0, 1], images start ... stop - 1 in order.
    card: what is known of how they were made (see `card.Protocol`), by field.
    identity: of the content, for resuming; None when pieces must not be kept.
    """

    name: str
    n: int
    resolution: tuple[int, int] | None
    batches: Callable[[int, int], Iterable[Tensor]] = field(repr=False)
    card: dict[str, Any] = field(default_factory=dict)
    identity: str | None = None


def from_dataset(images: ImageDataset, name: str, n: int | None = None) -> ImageSource:
    """Prepared data (`n` spread over the set, all by default), cropped and resized as `images` says."""
    count = len(images) if n is None else n
    if not 0 < count <= len(images):
        raise ValueError(f"{count} images of {name} asked for; it has {len(images)}")

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, READ_BATCH):
            # Sets are often sorted by class, so a part of one is taken evenly.
            numbers = [
                i * len(images) // count for i in range(first, min(stop, first + READ_BATCH))
            ]
            yield images.batch(numbers)[0]

    return ImageSource(
        name=name,
        n=count,
        resolution=(images.size, images.size),
        batches=batches,
        card={
            "preprocessing": f"crop {images.crop} to {images.size} px",
            "uint8_rule": "as stored",
        },
        identity=images.fingerprint if count == len(images) else f"{images.fingerprint} {count}",
    )


def read_metadata(card: dict[str, Any], n: int) -> dict[str, Any]:
    """What a sampling card (`produce.Job.card`) says of n of its images, by field of `card.Protocol`."""
    seeds = f"{card['first']}...{card['first'] + card['n'] - 1}"
    grid = Spec(**card["grid"]) if isinstance(card["grid"], dict) else "of the family"
    return {
        "seeds": seeds if n == card["n"] else f"{n} of {seeds}",
        "label_law": card["label_law"],
        "prompts": _prompts(card.get("prompts")),
        "sampler": f"{Spec(**card['sampler'])} on the grid {grid}",
        "steps": card["steps"],
        "network_calls": card["network_calls_per_image"],
        "guidance": "none" if card["guidance"] is None else json.dumps(card["guidance"]),
        "ema": f"the saved average at {card['model']['training_images']:,} images",
        "uint8_rule": card["uint8_rule"],
        "preprocessing": "none",
    }


def _prompts(said: list[str] | None) -> str:
    """How many prompts, and which, in few words."""
    if not said:
        return "none"
    return (
        f"{len(said)} in turn, SHA-256 {hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"
    )


def _beside(path: Path, n: int) -> dict[str, Any]:
    """`stated` of the card that `mezzotint sample` left at `path`; of images without such a card, what we know."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["mezzotint_samples"] == CARD_FORMAT:
            return read_metadata(card, n)
    except (OSError, ValueError, LookupError, TypeError):  # none, or of something else
        pass
    return {"preprocessing": "none"}


def from_folder(folder: str | Path, channels: int = 3) -> ImageSource:
    """Every picture below a folder or in a .zip, in the order of names, untouched: no resize, no crop.

    The card.json of `mezzotint sample` in that folder is read.

    Errors: ValueError when there are fewer than two, when sizes differ, when a picture has not `channels` channels or
    cannot be read.
    """
    path = Path(folder).expanduser()
    found = open_files(Zip(path) if path.suffix.lower() == ".zip" else Folder(path), "all")
    if len(found) < 2:
        raise ValueError(f"{folder} holds {len(found)} images; at least two are needed")
    modes = {3: ("RGB",), 1: ("L", "1")}[channels]

    first = found.read(0)
    size = (first.height, first.width)

    def pixels(i: int) -> Tensor:
        try:
            picture = found.read(i)
        except ValueError as error:
            raise ValueError(f"{found.name(i)} cannot be read: {error}") from error
        if (picture.height, picture.width) != size:
            raise ValueError(
                f"{found.name(i)} is {picture.width} x {picture.height} pixels, {found.name(0)} "
                f"{size[1]} x {size[0]}; give images of one size (mezzotint prepare makes them so)"
            )
        return torch.from_numpy(_untouched(picture, modes, found.name(i)))

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for begin in range(start, stop, READ_BATCH):
            yield torch.stack([pixels(i) for i in range(begin, min(stop, begin + READ_BATCH))])

    return ImageSource(
        name=str(folder),
        n=len(found),
        resolution=size,
        batches=batches,
        card=_beside(path / "card.json", len(found)),
        identity=found.identity(),
    )


def _untouched(picture: Image.Image, modes: tuple[str, ...], name: str) -> np.ndarray:
    try:
        if picture.mode == "RGBA" and np.asarray(picture)[..., 3].min() == 255:
            picture = picture.convert("RGB")  # an alpha channel that hides nothing
        if picture.mode not in modes:
            grey = (
                "; convert grey images to RGB first if that is meant"
                if picture.mode in ("L", "1", "LA")
                else ""
            )
            raise ValueError(
                f"{name} is of mode {picture.mode}; the feature network reads {' or '.join(modes)}{grey}"
            )
        array = np.array(picture.convert("L") if modes[0] == "L" else picture)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


@contextmanager
def npy_member(
    file: str | Path, key: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any], bool]]:
    """An array of a .npz as a stream behind its header, with shape, dtype and whether it is in Fortran order.

    Errors: ValueError for a damaged file, an absent array, and pickled objects, before any of them is touched.
    """
    with ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(file))
            stream = stack.enter_context(archive.open(f"{key}.npy"))
            version = np.lib.format.read_magic(stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(stream)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{file} is damaged or has no array {key!r} ({error})") from error
        if dtype.hasobject:
            raise ValueError(f"{file}: array {key!r} holds pickled objects; refused")
        yield stream, shape, dtype, fortran


def npz_names(file: str | Path) -> list[str]:
    """The arrays of a .npz, sorted."""
    try:
        with zipfile.ZipFile(file) as archive:
            return sorted(name.removesuffix(".npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} is no whole .npz file ({error})") from error


def read_npz(file: str | Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Arrays of a .npz by name; see `npy_member`."""
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        with npy_member(file, name) as (stream, shape, dtype, fortran):
            try:
                values = np.frombuffer(stream.read(), dtype)
                arrays[name] = values.reshape(shape, order="F" if fortran else "C").copy()
            except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{file}: array {name!r} is damaged ({error})") from error
    return arrays


def from_npz(file: str | Path) -> ImageSource:
    """`arr_0` of an ADM sample file: uint8 (n, h, w, channels), read in pieces, since 50,000 images are 10 GB.

    The card of `mezzotint sample` beside it, FILE.json, is read.
    """
    with npy_member(file, "arr_0") as (_, shape, dtype, fortran):
        pass
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran:
        raise ValueError(
            f"{file}: arr_0 is {dtype} of shape {shape}; expected uint8 (images, height, width, 1 or 3)"
        )
    n, height, width, channels = shape

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        with npy_member(file, "arr_0") as (stream, *_):
            try:
                stream.seek(stream.tell() + start * height * width * channels)
                for begin in range(start, stop, READ_BATCH):
                    count = min(stop, begin + READ_BATCH) - begin
                    data = stream.read(count * height * width * channels)
                    rows = np.frombuffer(data, np.uint8).reshape(count, height, width, channels)
                    yield torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())
            except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
                raise ValueError(f"{file}: arr_0 is damaged ({error})") from error

    return ImageSource(
        name=str(file),
        n=n,
        resolution=(height, width),
        batches=batches,
        card=_beside(Path(f"{file}.json"), n),
        identity=sha256_of_file(file),
    )


def from_samples(
    draw: Callable[[range], Tensor],
    n: int,
    name: str,
    card: dict[str, Any],
    identity: str | None = None,
    batch: int = 64,
) -> ImageSource:
    """Samples of a model: `draw(range(a, b))` gives images a ... b - 1 as uint8, each a function of its number alone.

    Args:
        card: fields of `card.Protocol` that say how they are made (seeds, sampler, steps, ...).
        identity: of the model and those settings, so that an interrupted evaluation can be taken up; None: it cannot.
        batch: images per call.
    """

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, batch):
            yield draw(range(first, min(stop, first + batch)))

    return ImageSource(
        name=name, n=n, resolution=None, batches=batches, card=card, identity=identity
    )


def open_image_source(path: str | Path, channels: int = 3) -> ImageSource:
    """A folder, .zip or .npz of finished images, or a set of `mezzotint prepare` at its own size."""
    base = Path(path).expanduser()
    base = base if base.exists() else Path(split_suffix(str(base))[0])
    if (base / CARD).is_file():
        return from_dataset(open_images(path, channels=channels), str(path))
    if (base / LATENTS).is_file():
        raise ValueError(
            f"{path} holds latents, not pictures; give the pictures it was prepared from, and a size"
        )
    path = Path(path)
    if path.suffix == ".npz":
        return from_npz(path)
    if path.is_dir() or path.suffix == ".zip":
        return from_folder(path, channels)
    raise ValueError(
        f"no images at {path}; give a folder of images, a .zip of one, or an .npz with arr_0"
    )


def from_job(job: SamplingJob, n: int, first: int = 0) -> ImageSource:
    """Images first ... first + n - 1 of `job` as a source; its identity is the job's card, so that pieces can be kept.

    Errors: ValueError for a job without a decoder, whose latents are no images.
    """
    if job.decoder is None:
        raise ValueError("latents cannot be judged; leave --latents out so that they are decoded")
    card = job.card(n, first)
    model = card["model"]
    # The number of images is not part of what image i is, so a longer evaluation takes up a shorter one's pieces.
    essence = {k: v for k, v in card.items() if k not in ("n", "versions")}
    return from_samples(
        lambda numbers: job.draw([first + i for i in numbers]),
        n,
        name=f"{model['preset'] or model['backbone']} {model['sha256'][:16]}",
        card=read_metadata(card, n),
        identity=hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest(),
        batch=job.settings.batch,
    )


def open_real_images(
    source: str, size: int | None, channels: int = 3, crop: str | None = None
) -> ImageSource:
    """Real images to compare with: a set cropped and resized to `size`, finished images or a prepared set as they are.

    Errors: ValueError for data that cannot be opened, or neither finished images nor a size.
    """
    if size is None:
        return open_image_source(source, channels)
    return from_dataset(open_images(source, size=size, channels=channels, crop=crop), source)
