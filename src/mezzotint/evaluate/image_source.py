"""Images to evaluate: a folder, a sample file, a prepared dataset, or a model's samples by seed.

Each is an `ImageSource`, which gives images by index. Evaluation can therefore be shared over
ranks, interrupted, and resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mezzotint.core.boxed import suggest_boxed
from mezzotint.core.files import expand_user, read_json, sha256_of_file
from mezzotint.core.npz_files import DAMAGE, npz_names, open_npy_member
from mezzotint.core.object_store import is_address
from mezzotint.core.paths import explain_path
from mezzotint.core.registry import Spec
from mezzotint.data.decode import MAX_PIXELS, UnreadableImage, load_image
from mezzotint.data.full_scale import grey_kind, measure_full_scale
from mezzotint.data.image_dataset import BUILTIN, LATENTS, ImageDataset, open_images, split_source
from mezzotint.data.prepared_source import CARD, PreparedSource
from mezzotint.data.sources import FileSource, hash_parts, open_files
from mezzotint.data.stores import find_store
from mezzotint.data.transforms import to_array, to_mode
from mezzotint.sampling.job import CARD_FORMAT, SamplingJob

READ_BATCH = 64  # images decoded at a time
READ_BYTES = 256 << 20  # of their pixels
GREY_NOTE = "grey repeated in three channels"


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Images by index.

    name: for print. num_images: how many.
    resolution: (height, width), None if it is unknown before the first image is drawn.
    channels: 1 or 3, None if it is unknown.
    batches: (start, stop) -> tensors (b, channels, h, w) of images start ... stop - 1 in order,
        uint8 or float in [0, 1].
    metadata: how the images were made as far as known, by field of `results.Protocol`.
    identity: of the content, for resuming; None if finished pieces cannot be reused.
    captions: what each image is to show; None if that is unknown.
    """

    name: str
    num_images: int
    resolution: tuple[int, int] | None
    channels: int | None = None
    batches: Callable[[int, int], Iterable[Tensor]] = field(repr=False)
    metadata: dict[str, Any] = field(default_factory=dict)
    identity: str | None = None
    captions: tuple[str, ...] | None = field(default=None, repr=False)


def caption_images(source: ImageSource, captions: Sequence[str]) -> ImageSource:
    """Return images with captions, one for each in their order; ValueError for another number."""
    if len(captions) != source.num_images:
        raise ValueError(
            f"{len(captions):,} captions for {source.num_images:,} images of {source.name}; give "
            "one for each, in the order of the images"
        )
    return dataclasses.replace(source, captions=tuple(captions))


def check_readable(images: ImageDataset, read: Sequence[int]) -> None:
    """Raise ValueError if one of the images just read was replaced by another, being damaged."""
    unreadable = images.unreadable()
    if bad := [i for i in read if i in unreadable]:
        raise ValueError(
            f"{images.name(bad[0])} cannot be read: {unreadable[bad[0]]}; remove it, or leave such "
            "images out with mezzotint prepare"
        )


def from_dataset(images: ImageDataset, name: str, num_images: int | None = None) -> ImageSource:
    """Return a dataset's images, cropped and resized as `images` does.

    Args:
        num_images: how many, evenly spaced over the dataset; all by default.
    """
    count = len(images) if num_images is None else num_images
    if not 0 < count <= len(images):
        raise ValueError(f"{count} images requested of {name}; it has {len(images)}")

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for part in _parts(start, stop, images.channels * images.size**2):
            # Even spacing, since datasets are often sorted by class.
            chosen = [i * len(images) // count for i in part]
            yield images.batch(chosen)[0]
            check_readable(images, chosen)

    notes = [GREY_NOTE] if images.channels == 3 and _all_grey(images) else []
    if isinstance(images.source, PreparedSource) and images.source.form.note:
        notes.append(f"stored as {images.source.form.name}")
    return ImageSource(
        name=name,
        num_images=count,
        resolution=(images.size, images.size),
        channels=images.channels,
        batches=batches,
        metadata={
            "preprocessing": "; ".join([f"crop {images.crop} to {images.size} px", *notes]),
            "uint8_rule": "as stored",
        },
        identity=images.fingerprint if count == len(images) else f"{images.fingerprint} {count}",
    )


def _all_grey(images: ImageDataset) -> bool:
    """Return whether all of a few images, evenly spaced, are stored as grey."""
    modes = []
    for i in range(0, len(images), max(1, len(images) // 16)):
        with contextlib.suppress(UnreadableImage):
            stored = images.source.read(i)
            is_array = isinstance(stored, np.ndarray)
            modes.append(len(stored) == 1 if is_array else _is_grey(stored))
    return bool(modes) and all(modes)


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
        "ema": describe_average(card["model"]),
        "training_images": card["model"]["training_images"],
        "dtype": card["dtype"],
        "uint8_rule": card["uint8_rule"],
        "preprocessing": "none",
        "tuned": card.get("tuned") or "none",
    }


def describe_average(facts: dict[str, Any]) -> str:
    """Return which average of the weights a model has: of its card, or of `ModelInfo.extra`."""
    if facts.get("raw_weights"):
        return "none, the raw weights"
    width = facts.get("ema_width")
    return "the saved average" if width is None else f"the post-hoc average of width {width:g}"


def _describe_prompts(prompts: list[str | dict[str, Any]] | None) -> str:
    """Return how many prompts there are, and a hash of them."""
    if not prompts:
        return "none"
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    return f"{len(prompts)} in turn, SHA-256 {digest}"


def _read_card(path: Path, num_images: int) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """Return `read_metadata` of the sampling card at `path`, or little if there is none; captions.

    Captions are known if all images of the card are there.
    """
    try:
        card = read_json(path)
        if card["mezzotint_samples"] == CARD_FORMAT:
            metadata, prompts = read_metadata(card, num_images), card.get("prompts")
            if not prompts or num_images != card["num_images"]:
                return metadata, None
            texts = [p if isinstance(p, str) else p["text"] for p in prompts]
            seeds = range(card["first_seed"], card["first_seed"] + num_images)
            return metadata, tuple(texts[seed % len(texts)] for seed in seeds)
    except (ValueError, LookupError, TypeError):  # no file, or not a sampling card
        pass
    return {"preprocessing": "none"}, None


def from_folder(folder: str | Path, channels: int = 3) -> ImageSource:
    """Return every image in a folder, .zip or .tar, sorted by name, without resize or crop.

    They are all of colour, or all grey: then of one channel, see `repeat_grey`. Grey of more than 8
    bits is scaled as in `mezzotint.data.full_scale`. The folder's card.json is read if `mezzotint
    sample` wrote one.

    Args:
        channels: 1 refuses images of colour.

    Errors: ValueError for fewer than two images, for images of different sizes, and for one that is
        damaged, transparent, or grey among others of colour.
    """
    base, split = split_source(str(folder))
    path = expand_user(base)
    if is_address(base):
        raise ValueError(f"{base} is an address; give images on a disk, or a model")
    found = find_store(path)
    if found is None:
        raise ValueError(
            f"no images at {folder}: {explain_path(base, 'a set of images')}; give a folder, .zip "
            f"or .tar of images, a .npz with arr_0, or a model{suggest_boxed(base)}"
        )
    files = open_files(found[0], split or "all", below=found[1])
    if len(files) < 2:
        raise ValueError(f"{folder} holds {len(files)} images; at least two are needed")
    full_scale = measure_full_scale(files.read, len(files))
    is_grey = channels == 1 or _is_grey(_read(files, 0))

    def read_pixels(i: int) -> np.ndarray:
        image = _read(files, i)
        if is_grey != _is_grey(image):
            raise ValueError(
                f"{files.name(i)} has mode {image.mode}; the others are "
                f"{'grey' if is_grey else 'of colour'}; give images of one kind"
            )
        return to_array(to_mode(image, 1 if is_grey else 3, full_scale))

    size = read_pixels(0).shape[1:]

    def read_checked(i: int) -> Tensor:
        pixels = read_pixels(i)
        if pixels.shape[1:] != size:
            height, width = pixels.shape[1:]
            raise ValueError(
                f"{files.name(i)} is {width} x {height} pixels, {files.name(0)} is "
                f"{size[1]} x {size[0]}; give images of one size (mezzotint prepare resizes them)"
            )
        return torch.from_numpy(pixels)

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for part in _parts(start, stop, 3 * size[0] * size[1]):
            yield torch.stack([read_checked(i) for i in part])

    card = path / "card.json" if path.is_dir() else Path(f"{path}.json")
    metadata, captions = _read_card(card, len(files))
    return ImageSource(
        name=str(folder),
        num_images=len(files),
        resolution=(size[0], size[1]),
        channels=1 if is_grey else 3,
        batches=batches,
        metadata=_add_preprocessing(metadata, *full_scale.notes),
        # Other images may come under the same names, in as many bytes.
        identity=hash_parts(
            [files.identity(), *(str(_checksum(files, i)) for i in range(len(files)))]
        ),
        captions=captions,
    )


def _checksum(files: FileSource, i: int) -> int:
    """Return the CRC-32 of a file; ValueError, naming it, if it cannot be read."""
    try:
        return files.checksum(i)
    except (UnreadableImage, OSError) as error:
        raise ValueError(f"{files.name(i)} cannot be read: {error}") from error


def _read(files: FileSource, i: int) -> Image.Image:
    """Return an image with its pixels; ValueError, naming it, if it is damaged or transparent."""
    try:
        image = load_image(files.read(i))
    except UnreadableImage as error:
        raise ValueError(f"{files.name(i)} cannot be read: {error}") from error
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        raise ValueError(
            f"{files.name(i)} has mode {image.mode} and is transparent; put the images on a "
            "background first (mezzotint prepare takes white)"
        )
    return image


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or grey_kind(image) is not None


def _parts(start: int, stop: int, image_bytes: int) -> Iterator[range]:
    """Yield start ... stop - 1 in ranges of at most READ_BATCH images and about READ_BYTES."""
    count = max(1, min(READ_BATCH, READ_BYTES // image_bytes))
    for first in range(start, stop, count):
        yield range(first, min(stop, first + count))


def _add_preprocessing(metadata: dict[str, Any], *notes: str) -> dict[str, Any]:
    """Return the metadata with notes added to its preprocessing."""
    given = metadata.get("preprocessing")
    parts = [*([given] if given and given != "none" else []), *notes]
    return metadata | {"preprocessing": "; ".join(parts)} if parts else metadata


def repeat_grey(source: ImageSource, channels: int) -> ImageSource:
    """Return grey images in three channels, and say so, if the features need three `channels`.

    Other images are returned unchanged.
    """
    if (source.channels, channels) != (1, 3):
        return source
    return dataclasses.replace(
        source,
        channels=3,
        batches=lambda start, stop: (
            images.expand(-1, 3, -1, -1) for images in source.batches(start, stop)
        ),
        metadata=_add_preprocessing(source.metadata, GREY_NOTE),
    )


def from_npz(file: str | Path, channels: int = 3) -> ImageSource:
    """Return the images of an ADM sample file: `arr_0`, uint8 (n, h, w, channels).

    They are read in pieces, since 50,000 images at 256 pixels are 10 GB. FILE.json is read if
    `mezzotint sample` wrote one.

    Args:
        channels: 1 refuses images of colour.
    """
    names = npz_names(file)
    if "arr_0" not in names:
        held = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"{file} holds {held or 'nothing'}, and no arr_0 as files of samples do; give --size "
            "to read it as a dataset"
        )
    with open_npy_member(file, "arr_0") as (_, shape, dtype, fortran_order):
        pass
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran_order:
        raise ValueError(
            f"{file}: arr_0 is {dtype} of shape {shape}; expected uint8 (images, height, width, "
            "1 or 3)"
        )
    if shape[3] > channels:
        raise ValueError(f"{file}: arr_0 holds images of colour; give grey ones, of one channel")
    num_images, height, width, channels = shape
    image_bytes = height * width * channels
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(
            f"{file}: arr_0 holds images of {width} x {height} pixels; they have 1...{MAX_PIXELS:,}"
        )

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        with open_npy_member(file, "arr_0") as (stream, *_):
            try:
                stream.seek(stream.tell() + start * image_bytes)
                for part in _parts(start, stop, image_bytes):
                    data = np.frombuffer(stream.read(len(part) * image_bytes), np.uint8)
                    rows = data.reshape(len(part), height, width, channels)
                    yield torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())
            except DAMAGE as error:
                raise ValueError(f"{file}: arr_0 is damaged ({error})") from error

    metadata, captions = _read_card(Path(f"{file}.json"), num_images)
    return ImageSource(
        name=str(file),
        num_images=num_images,
        resolution=(height, width),
        channels=channels,
        batches=batches,
        metadata=metadata,
        identity=sha256_of_file(file),
        captions=captions,
    )


def from_samples(
    draw: Callable[[range], Tensor],
    num_images: int,
    name: str,
    metadata: dict[str, Any],
    identity: str | None = None,
    batch: int = 64,
    channels: int | None = None,
) -> ImageSource:
    """Return a model's samples.

    Args:
        draw: range(a, b) -> images a ... b - 1 as uint8; each may depend on its index alone.
        metadata: how they are made (seeds, sampler, steps, ...), by field of `results.Protocol`.
        identity: of the model and its settings; None: an evaluation cannot be resumed.
        batch: images per call of `draw`.
        channels: 1 or 3, if it is known.
    """

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for first in range(start, stop, batch):
            yield draw(range(first, min(stop, first + batch)))

    return ImageSource(
        name=name,
        num_images=num_images,
        resolution=None,
        channels=channels,
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
    source = from_samples(
        lambda indices: job.draw([first_seed + i for i in indices]),
        num_images,
        name=f"{model['preset'] or model['backbone']} {model['sha256'][:16]}",
        metadata=read_metadata(card, num_images),
        identity=hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest(),
        batch=job.settings.batch,
        channels=job.model.info.config.channels if job.codec == "pixels" else 3,
    )
    seeds = range(first_seed, first_seed + num_images)
    return caption_images(source, [job.prompt(s).text for s in seeds]) if job.prompts else source


def open_image_source(path: str | Path, channels: int = 3) -> ImageSource:
    """Open a folder, archive or .npz of images, or a prepared dataset, at their own size.

    "PATH:SPLIT" and "set.zip/FOLDER" choose a part, see `mezzotint.data.image_dataset.open_images`.
    """
    name, split = split_source(str(path))
    base = expand_user(name)
    if (base / CARD).is_file():
        return from_dataset(open_images(path, channels=channels), str(path))
    if (base / LATENTS).is_file():
        raise ValueError(
            f"{path} holds latents, not images; give the images it was encoded from, and a size"
        )
    if base.suffix.lower() == ".npz" and base.is_file():
        if split:
            raise ValueError(
                f"{path}: a file of samples has no splits; give --size to read it as a dataset"
            )
        return from_npz(path, channels)
    if str(base) in BUILTIN:
        raise ValueError(f"{path} is a built-in dataset; it also needs a size, e.g. --size 64")
    return from_folder(path, channels)


def open_real_images(source: str, size: int | None, channels: int = 3) -> ImageSource:
    """Open real images: a dataset cropped and resized to `size`, or without a size, as stored.

    Errors: ValueError for a source that cannot be opened, e.g. raw data without a size.
    """
    if size is None:
        return open_image_source(source, channels)
    return from_dataset(open_images(source, size=size, channels=channels), source)
