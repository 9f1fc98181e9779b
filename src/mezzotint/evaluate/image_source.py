"""Images to evaluate: a folder, a sample file, a prepared dataset, or a model's samples by seed.

Each is an `ImageSource`, which gives images by index. Evaluation can therefore be shared over
ranks, interrupted, and resumed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.core.files import read_json, sha256_of_file
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import LATENTS, ImageDataset, open_images, split_suffix
from mezzotint.data.sources import open_files
from mezzotint.data.stores import FolderStore, ZipStore
from mezzotint.data.tables import CARD
from mezzotint.evaluate.npz_files import DAMAGE, open_npy_member
from mezzotint.sampling.job import CARD_FORMAT, SamplingJob

READ_BATCH = 64  # images decoded at a time


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images by index.

    name: for print. num_images: how many.
    resolution: (height, width), None if it is unknown before the first image is drawn.
    batches: (start, stop) -> tensors (b, channels, h, w) of images start ... stop - 1 in order,
        uint8 or float in [0, 1].
    metadata: how the images were made as far as known, by field of `results.Protocol`.
    identity: of the content, for resuming; None if finished pieces cannot be reused.
    """

    name: str
    num_images: int
    resolution: tuple[int, int] | None
    batches: Callable[[int, int], Iterable[Tensor]] = field(repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)
    identity: str | None = None


def from_dataset(images: ImageDataset, name: str, num_images: int | None = None) -> ImageSource:
    """Return a dataset's images, cropped and resized as `images` does.

    Args:
        num_images: how many, evenly spaced over the dataset; all by default.
    """
    count = len(images) if num_images is None else num_images
    if not 0 < count <= len(images):
        raise ValueError(f"{count} images requested of {name}; it has {len(images)}")

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, READ_BATCH):
            # Even spacing, since datasets are often sorted by class.
            last = min(stop, first + READ_BATCH)
            yield images.batch([i * len(images) // count for i in range(first, last)])[0]

    return ImageSource(
        name=name,
        num_images=count,
        resolution=(images.size, images.size),
        batches=batches,
        metadata={
            "preprocessing": f"crop {images.crop} to {images.size} px",
            "uint8_rule": "as stored",
        },
        identity=images.fingerprint if count == len(images) else f"{images.fingerprint} {count}",
    )


def read_metadata(card: dict[str, Any], num_images: int) -> dict[str, Any]:
    """Return the protocol fields of `num_images` images from their sampling card."""
    seeds = f"{card['first_seed']}...{card['first_seed'] + card['num_images'] - 1}"
    times = card["discretization"]
    discretization = Spec(**times) if isinstance(times, dict) else "of the family"
    return {
        "seeds": seeds if num_images == card["num_images"] else f"{num_images} of {seeds}",
        "label_order": card["label_order"],
        "prompts": _describe_prompts(card.get("prompts")),
        "sampler": f"{Spec(**card['sampler'])}, discretization {discretization}",
        "steps": card["steps"],
        "network_calls": card["network_calls_per_image"],
        "guidance": "none" if card["guidance"] is None else json.dumps(card["guidance"]),
        "ema": f"the saved average at {card['model']['training_images']:,} images",
        "uint8_rule": card["uint8_rule"],
        "preprocessing": "none",
    }


def _describe_prompts(prompts: list[str] | None) -> str:
    """Return how many prompts there are, and a hash of them."""
    if not prompts:
        return "none"
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return f"{len(prompts)} in turn, SHA-256 {digest}"


def _read_card_metadata(path: Path, num_images: int) -> dict[str, Any]:
    """Return `read_metadata` of the sampling card at `path`, or little if there is none."""
    try:
        card = read_json(path)
        if card["mezzotint_samples"] == CARD_FORMAT:
            return read_metadata(card, num_images)
    except (ValueError, LookupError, TypeError):  # no file, or not a sampling card
        pass
    return {"preprocessing": "none"}


def from_folder(folder: str | Path, channels: int = 3) -> ImageSource:
    """Return every image in a folder or .zip, sorted by name, without resize or crop.

    The folder's card.json is read if `mezzotint sample` wrote one.

    Errors: ValueError for fewer than two images, for images of different sizes, and for one that is
    damaged or does not have `channels` channels.
    """
    path = Path(folder).expanduser()
    store = ZipStore(path) if path.suffix.lower() == ".zip" else FolderStore(path)
    files = open_files(store, "all")
    if len(files) < 2:
        raise ValueError(f"{folder} holds {len(files)} images; at least two are needed")
    modes = {3: ("RGB",), 1: ("L", "1")}[channels]
    first = files.read(0)
    size = (first.height, first.width)

    def read_pixels(i: int) -> Tensor:
        try:
            image = files.read(i)
        except ValueError as error:
            raise ValueError(f"{files.name(i)} cannot be read: {error}") from error
        if (image.height, image.width) != size:
            raise ValueError(
                f"{files.name(i)} is {image.width} x {image.height} pixels, {files.name(0)} is "
                f"{size[1]} x {size[0]}; give images of one size (mezzotint prepare resizes them)"
            )
        return torch.from_numpy(_to_array(image, modes, files.name(i)))

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for begin in range(start, stop, READ_BATCH):
            yield torch.stack([read_pixels(i) for i in range(begin, min(stop, begin + READ_BATCH))])

    return ImageSource(
        name=str(folder),
        num_images=len(files),
        resolution=size,
        batches=batches,
        metadata=_read_card_metadata(path / "card.json", len(files)),
        identity=files.identity(),
    )


def _to_array(image: Image.Image, modes: tuple[str, ...], name: str) -> np.ndarray:
    """Return the pixels, (channels, h, w) uint8, unchanged; ValueError for another mode."""
    try:
        if image.mode == "RGBA" and np.asarray(image)[..., 3].min() == 255:
            image = image.convert("RGB")  # fully opaque: the alpha channel hides nothing
        if image.mode not in modes:
            is_grey = image.mode in ("L", "1", "LA")
            advice = "; convert grey images to RGB first" if is_grey else ""
            raise ValueError(
                f"{name} has mode {image.mode}; the feature network needs {' or '.join(modes)}"
                f"{advice}"
            )
        array = np.array(image.convert("L") if modes[0] == "L" else image)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def from_npz(file: str | Path) -> ImageSource:
    """Return the images of an ADM sample file: `arr_0`, uint8 (n, h, w, channels).

    They are read in pieces, since 50,000 images at 256 pixels are 10 GB. FILE.json is read if
    `mezzotint sample` wrote one.
    """
    with open_npy_member(file, "arr_0") as (_, shape, dtype, fortran_order):
        pass
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran_order:
        raise ValueError(
            f"{file}: arr_0 is {dtype} of shape {shape}; expected uint8 (images, height, width, "
            "1 or 3)"
        )
    num_images, height, width, channels = shape

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        image_bytes = height * width * channels
        with open_npy_member(file, "arr_0") as (stream, *_):
            try:
                stream.seek(stream.tell() + start * image_bytes)
                for begin in range(start, stop, READ_BATCH):
                    count = min(stop, begin + READ_BATCH) - begin
                    data = np.frombuffer(stream.read(count * image_bytes), np.uint8)
                    rows = data.reshape(count, height, width, channels)
                    yield torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())
            except DAMAGE as error:
                raise ValueError(f"{file}: arr_0 is damaged ({error})") from error

    return ImageSource(
        name=str(file),
        num_images=num_images,
        resolution=(height, width),
        batches=batches,
        metadata=_read_card_metadata(Path(f"{file}.json"), num_images),
        identity=sha256_of_file(file),
    )


def from_samples(
    draw: Callable[[range], Tensor],
    num_images: int,
    name: str,
    metadata: dict[str, Any],
    identity: str | None = None,
    batch: int = 64,
) -> ImageSource:
    """Return a model's samples.

    Args:
        draw: range(a, b) -> images a ... b - 1 as uint8; each may depend on its index alone.
        metadata: how they are made (seeds, sampler, steps, ...), by field of `results.Protocol`.
        identity: of the model and its settings; None: an evaluation cannot be resumed.
        batch: images per call of `draw`.
    """

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, batch):
            yield draw(range(first, min(stop, first + batch)))

    return ImageSource(
        name=name,
        num_images=num_images,
        resolution=None,
        batches=batches,
        metadata=metadata,
        identity=identity,
    )


def from_job(job: SamplingJob, num_images: int, first_seed: int = 0) -> ImageSource:
    """Return the samples of seeds first_seed ... first_seed + num_images - 1.

    Errors: ValueError for a job without a decoder, whose results are latents.
    """
    if job.decoder is None:
        raise ValueError("latents cannot be evaluated; leave out --latents to decode them")
    card = job.card(num_images, first_seed)
    model = card["model"]
    # Neither the number of images nor the versions change what image i is.
    essence = {k: v for k, v in card.items() if k not in ("num_images", "versions")}
    return from_samples(
        lambda indices: job.draw([first_seed + i for i in indices]),
        num_images,
        name=f"{model['preset'] or model['backbone']} {model['sha256'][:16]}",
        metadata=read_metadata(card, num_images),
        identity=hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest(),
        batch=job.settings.batch,
    )


def open_image_source(path: str | Path, channels: int = 3) -> ImageSource:
    """Open a folder, .zip or .npz of images, or a prepared dataset at its own size."""
    base = Path(path).expanduser()
    base = base if base.exists() else Path(split_suffix(str(base))[0])
    if (base / CARD).is_file():
        return from_dataset(open_images(path, channels=channels), str(path))
    if (base / LATENTS).is_file():
        raise ValueError(
            f"{path} holds latents, not images; give the images it was encoded from, and a size"
        )
    path = Path(path)
    if path.suffix == ".npz":
        return from_npz(path)
    if path.is_dir() or path.suffix == ".zip":
        return from_folder(path, channels)
    raise ValueError(
        f"no images at {path}; give a folder or .zip of images, or a .npz with arr_0; a built-in "
        "dataset also needs a size, e.g. --size 64"
    )


def open_real_images(source: str, size: int | None, channels: int = 3) -> ImageSource:
    """Open real images: a dataset cropped and resized to `size`, or without a size, as stored.

    Errors: ValueError for a source that cannot be opened, e.g. raw data without a size.
    """
    if size is None:
        return open_image_source(source, channels)
    return from_dataset(open_images(source, size=size, channels=channels), source)
