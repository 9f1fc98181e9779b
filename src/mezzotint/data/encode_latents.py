"""Encode a dataset to latents, in parallel and resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.core.distributed import WorkShare
from mezzotint.core.files import atomic_open, read_json, remove_partials, write_json
from mezzotint.core.progress import ProgressBar
from mezzotint.data.autoencoder import Codec
from mezzotint.data.image_dataset import LATENTS, ImageDataset
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.latent_dataset import LABELS, PLAN, encode_moments, piece_path
from mezzotint.data.sources import hash_parts

PIECE_BYTES = 16 << 20  # most bytes of moments in one piece; a killed process loses its last piece
PIECE_IMAGES = 256  # most images in one piece
EXPECTED_STD = (0.5, 2.0)  # the codecs' scales are made for 1


def encode_latents(
    images: ImageDataset,
    out: Path,
    codec: Codec,
    share: WorkShare | None = None,
    *,
    progress: bool = True,
) -> bool:
    """Write the latents of `images` and of their mirror images to `out`; resume an earlier call.

    Processes do not communicate. Each writes its share of the pieces, and the one that finds all
    pieces there completes the folder. Unreadable images are left out and named in the card.

    Returns: whether the folder is complete.

    Errors: ValueError where `out` holds other files, or latents of another codec, size or source.
    """
    share = share or WorkShare()
    plan = {
        "format": 1,
        "codec": codec.name,
        "codec_hash": codec.hash,
        "scale": codec.scale,
        "shift": codec.shift,
        "factor": codec.factor,
        "channels": codec.channels,
        "size": images.size,
        "crop": images.crop,
        "pictures": images.fingerprint,
        "label_names": list(images.label_names) if images.label_names else None,
    }
    check_size(images.size, codec)
    _claim_folder(out, plan)
    # Two views of mean and log-variance, in float16.
    image_bytes = 2 * 2 * 2 * codec.channels * (images.size // codec.factor) ** 2
    piece_images = min(PIECE_IMAGES, max(1, PIECE_BYTES // image_bytes))
    pieces = range(-(-len(images) // piece_images))
    if not (out / LATENTS).is_file():
        own = [k for k in pieces if k % share.world == share.rank]
        _encode_pieces(images, out, codec, own, piece_images, progress)
        if all(piece_path(out, k, "json").is_file() for k in pieces):
            _complete_folder(out, plan, len(pieces))
    return (out / LATENTS).is_file()


def check_size(size: int, codec: Codec) -> None:
    """Raise ValueError where the codec does not take images of this side in pixels."""
    if size % codec.factor:
        nearest = max(1, size // codec.factor) * codec.factor
        raise ValueError(
            f"size {size} is not a multiple of the codec's {codec.factor}; try --size {nearest}"
        )


def _claim_folder(out: Path, plan: dict[str, Any]) -> None:
    """Write plan.json into a new folder, or check that the existing one is the same."""
    if not (out / PLAN).is_file():
        is_foreign = out.exists() and (
            not out.is_dir() or any(not p.name.startswith(f".{PLAN}.") for p in out.iterdir())
        )
        if is_foreign and not (out / PLAN).is_file():  # another process may have written it by now
            raise ValueError(
                f"{out} exists and is not empty; give a folder that does not exist yet"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, plan)
    existing = read_json(out / PLAN, "remove the folder")
    differing = [
        f"{k}: {existing.get(k)} there, {v} given"
        for k, v in plan.items()
        if k != "codec" and existing.get(k) != v  # one codec may have several names; compare hashes
    ]
    if differing:
        raise ValueError(
            f"{out} holds other latents (codec {existing.get('codec')}, not {plan['codec']}): "
            f"{'; '.join(differing)}. Give another folder, or remove this one"
        )


def _encode_pieces(
    images: ImageDataset, out: Path, codec: Codec, own: list[int], piece_images: int, progress: bool
) -> None:
    def indices(k: int) -> range:
        return range(k * piece_images, min((k + 1) * piece_images, len(images)))

    todo = [k for k in own if not piece_path(out, k, "json").is_file()]
    total = sum(len(indices(k)) for k in own)
    done = total - sum(len(indices(k)) for k in todo)
    description = f"encoding with {Path(codec.name).name}"
    with ProgressBar(description, total, done, show=progress) as bar:
        for k in todo:
            _encode_piece(images, out, codec, k, indices(k), bar)


def _encode_piece(
    images: ImageDataset, out: Path, codec: Codec, k: int, indices: range, bar: ProgressBar
) -> None:
    moments, left_out = [], []
    rows: dict[str, list[Any]] = {"name": [], "label": [], "text": []}
    for i in indices:
        bar.advance()
        try:
            pixels = images.image(i)
        except ValueError as reason:  # names the image
            left_out.append(str(reason))
            continue
        try:
            moments.append(encode_moments(codec, pixels, mirror=True).numpy())
        except ValueError as error:
            raise ValueError(f"{images.name(i)}: {error}") from None
        rows["name"].append(images.name(i))
        rows["label"].append(images.label(i))
        rows["text"].append(images.text(i))
    side = images.size // codec.factor
    empty = np.empty((0, 2, 2, codec.channels, side, side), np.float16)
    _write_piece(out, k, np.stack(moments) if moments else empty, {**rows, "left_out": left_out})


def _write_piece(out: Path, k: int, moments: np.ndarray, facts: dict[str, Any]) -> None:
    """Write the moments, then names and sums of the latents' first two moments by channel.

    The second file marks the piece as complete.
    """
    facts.update(sum_latents(moments))
    with atomic_open(piece_path(out, k, "npy")) as file:
        np.save(file, moments)
    write_json(piece_path(out, k, "json"), facts)


def sum_latents(moments: np.ndarray) -> dict[str, Any]:
    """Return the sums of latents (n, view, 2, c, h, w), and of their squares, by channel."""
    mean = moments[:, :, 0].astype(np.float64)
    variance = np.exp(moments[:, :, 1].astype(np.float64))
    axes = (0, 1, 3, 4)
    return {
        "sum": mean.sum(axes).tolist(),
        "sum_of_squares": (mean**2 + variance).sum(axes).tolist(),  # E z² = mean² + variance
        "numbers": mean.size // mean.shape[2],  # per channel
    }


def measure_latents(sums: list[dict[str, Any]], scale: float) -> tuple[dict[str, Any], list[str]]:
    """Return the statistics of a card from those of its parts, and notes on what is unusual.

    Args:
        sums: of `sum_latents`.
        scale: of the codec.
    """
    n = sum(s["numbers"] for s in sums)
    mean = np.sum([s["sum"] for s in sums], 0) / n
    std = np.sqrt(np.sum([s["sum_of_squares"] for s in sums], 0) / n - mean**2)
    overall_std = float(np.sqrt(np.mean(std**2)))
    notes = []
    if not EXPECTED_STD[0] <= overall_std <= EXPECTED_STD[1]:
        notes.append(
            f"the latents' standard deviation is {overall_std:.3g}; networks and schedules expect "
            f"about 1. Is the scale {scale:g} right for this autoencoder?"
        )
    return {"mean": mean.tolist(), "std": std.tolist(), "overall_std": overall_std}, notes


def _complete_folder(out: Path, plan: dict[str, Any], num_pieces: int) -> None:
    """Write labels.npy and latents.json, the card of a complete folder."""
    facts = [
        read_json(piece_path(out, k, "json"), "remove it and prepare again")
        for k in range(num_pieces)
    ]
    counts = [len(f["name"]) for f in facts]
    left_out = [name for f in facts for name in f["left_out"]]
    if not sum(counts):
        example = left_out[0] if left_out else "there are none"
        raise ValueError(f"nothing to prepare: no image can be read, e.g. {example}")
    statistics, unusual = measure_latents(facts, plan["scale"])
    notes = [*(f"left out when it was prepared: {name}" for name in left_out), *unusual]
    all_labels = [NO_LABEL if k is None else k for f in facts for k in f["label"]]
    labels = np.array(all_labels, dtype=np.int64)
    content = [labels.tobytes(), *(json.dumps([f["name"], f["text"]]) for f in facts)]
    card = {
        **plan,
        "count": sum(counts),
        "pieces": counts,
        "statistics": statistics,
        "notes": notes,
        "fingerprint": hash_parts([plan["pictures"], plan["codec_hash"], *content]),
    }
    remove_partials(out)
    with atomic_open(out / LABELS) as file:
        np.save(file, labels)
    write_json(out / LATENTS, card)  # last: it marks the folder as complete
