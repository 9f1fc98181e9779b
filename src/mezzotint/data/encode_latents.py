"""Write a folder of latents, see `mezzotint.data.latent_dataset`: in pieces, by any number of processes, resumable."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.core.files import atomic_open, read_json, write_json
from mezzotint.data.autoencoder import Codec
from mezzotint.data.image_dataset import LATENTS, ImageDataset
from mezzotint.data.latent_dataset import LABELS, PLAN, encode_moments, piece_path
from mezzotint.data.sources import NO_LABEL, hash_parts

PIECE_BYTES = 16 << 20  # of moments in one piece, at most; a kill costs the piece begun
PIECE_IMAGES = 256
EXPECTED_STD = (0.5, 2.0)  # the scaling constants are made for 1


@dataclass(frozen=True)
class WorkShare:
    """This process's part of the work: pieces k with k % world == rank."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def from_environment() -> WorkShare:
        """As torchrun states it."""
        return WorkShare(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def encode_latents(
    images: ImageDataset,
    out: Path,
    space: Codec,
    share: WorkShare | None = None,
    *,
    progress: bool = True,
) -> bool:
    """Write the latents of `images` and their mirror images to the folder `out`; go on where an earlier call stopped.

    Processes know nothing of each other: each writes its share of the pieces, whoever finds all pieces present
    completes the set. What cannot be read is left out and named in the card.

    Returns: whether the set is complete now.

    Errors: ValueError where `out` holds anything else, or latents of another codec, resolution or set of pictures.
    """
    share = share or WorkShare()
    plan = {
        "format": 1,
        "codec": space.name,
        "codec_hash": space.hash,
        "scale": space.scale,
        "shift": space.shift,
        "factor": space.factor,
        "channels": space.channels,
        "size": images.size,
        "crop": images.crop,
        "pictures": images.fingerprint,
        "label_names": list(images.label_names) if images.label_names else None,
    }
    if images.size % space.factor:
        near = images.size // space.factor * space.factor or space.factor
        raise ValueError(
            f"size {images.size} is no multiple of the codec's {space.factor}; try --size {near}"
        )
    _claim(out, plan)
    row_bytes = 2 * 2 * 2 * space.channels * (images.size // space.factor) ** 2
    per_piece = min(PIECE_IMAGES, max(1, PIECE_BYTES // row_bytes))
    pieces = range(-(-len(images) // per_piece))
    if not (out / LATENTS).is_file():
        mine = [k for k in pieces if k % share.world == share.rank]
        _encode_pieces(images, out, space, mine, per_piece, progress)
        if all(piece_path(out, k, "json").is_file() for k in pieces):
            _complete(out, plan, len(pieces))
    return (out / LATENTS).is_file()


def _claim(out: Path, plan: dict[str, Any]) -> None:
    """Write plan.json into a new folder, or check that the one there is the same."""
    if not (out / PLAN).is_file():
        strange = out.exists() and (
            not out.is_dir() or any(not p.name.startswith(f".{PLAN}.") for p in out.iterdir())
        )
        if strange and not (out / PLAN).is_file():  # another process may have been first in between
            raise ValueError(f"{out} exists and is not empty; remove it or give another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / PLAN, plan)
    there = read_json(out / PLAN, "remove the folder")
    # The name is how a codec was called; the hash is what it is.
    differing = [
        f"{k}: {there.get(k)} there, {v} asked"
        for k, v in plan.items()
        if k != "codec" and there.get(k) != v
    ]
    if differing:
        raise ValueError(
            f"{out} holds latents made otherwise (codec {there.get('codec')}, not {plan['codec']}): "
            f"{'; '.join(differing)}. Give another folder, or remove this one"
        )


def _encode_pieces(
    images: ImageDataset, out: Path, space: Codec, mine: list[int], per_piece: int, progress: bool
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        todo = [k for k in mine if not piece_path(out, k, "json").is_file()]
        total = sum(min(per_piece, len(images) - k * per_piece) for k in mine)
        left = sum(min(per_piece, len(images) - k * per_piece) for k in todo)
        task = bar.add_task(
            f"encoding with {Path(space.name).name}", total=total, completed=total - left
        )
        for k in todo:
            moments, left_out = [], []
            rows: dict[str, list[Any]] = {"name": [], "label": [], "text": []}
            for i in range(k * per_piece, min((k + 1) * per_piece, len(images))):
                bar.advance(task)
                try:
                    pixels = images.image(i)
                except ValueError as reason:  # names the picture
                    left_out.append(str(reason))
                    continue
                try:
                    moments.append(encode_moments(space, pixels, mirror=True).numpy())
                except ValueError as error:
                    raise ValueError(f"{images.name(i)}: {error}") from None
                for column, read in (
                    ("name", images.name),
                    ("label", images.label),
                    ("text", images.text),
                ):
                    rows[column].append(read(i))
            side = images.size // space.factor
            stored = (
                np.stack(moments)
                if moments
                else np.empty((0, 2, 2, space.channels, side, side), np.float16)
            )
            _write_piece(out, k, stored, {**rows, "left_out": left_out})


def _write_piece(out: Path, k: int, moments: np.ndarray, facts: dict[str, Any]) -> None:
    """The moments, then what makes them count: names, and sums of the latents' first two moments by channel."""
    mean, variance = (
        moments[:, :, 0].astype(np.float64),
        np.exp(moments[:, :, 1].astype(np.float64)),
    )
    facts["sum"] = mean.sum((0, 1, 3, 4)).tolist()
    facts["sum_of_squares"] = (
        (mean**2 + variance).sum((0, 1, 3, 4)).tolist()
    )  # E z² = mean² + variance
    facts["numbers"] = int(np.prod([2, *moments.shape[-2:], len(moments)]))  # per channel
    with atomic_open(piece_path(out, k, "npy")) as file:
        np.save(file, moments)
    write_json(piece_path(out, k, "json"), facts)


def _complete(out: Path, plan: dict[str, Any], pieces: int) -> None:
    facts = [
        read_json(piece_path(out, k, "json"), "remove it and prepare again") for k in range(pieces)
    ]
    counts = [len(f["name"]) for f in facts]
    left_out = [name for f in facts for name in f["left_out"]]
    if not sum(counts):
        raise ValueError(
            f"nothing to prepare: no image can be read, e.g. {left_out[0] if left_out else 'none given'}"
        )
    n = sum(f["numbers"] for f in facts)
    mean = np.sum([f["sum"] for f in facts], 0) / n
    std = np.sqrt(np.sum([f["sum_of_squares"] for f in facts], 0) / n - mean**2)
    notes = [f"left out when it was prepared: {name}" for name in left_out]
    overall = float(np.sqrt(np.mean(std**2)))
    if not EXPECTED_STD[0] <= overall <= EXPECTED_STD[1]:
        notes.append(
            f"the latents' standard deviation is {overall:.3g}, where networks and schedules expect about 1; is the "
            f"scale {plan['scale']:g} this autoencoder's?"
        )
    labels = np.array(
        [NO_LABEL if k is None else k for f in facts for k in f["label"]], dtype=np.int64
    )
    content = [labels.tobytes(), *(json.dumps([f["name"], f["text"]]) for f in facts)]
    card = {
        **plan,
        "count": sum(counts),
        "pieces": counts,
        "statistics": {"mean": mean.tolist(), "std": std.tolist(), "overall_std": overall},
        "notes": notes,
        "fingerprint": hash_parts([plan["pictures"], plan["codec_hash"], *content]),
    }
    for old in out.glob(".*.partial"):  # of killed processes
        old.unlink(missing_ok=True)
    with atomic_open(out / LABELS) as file:
        np.save(file, labels)
    write_json(out / LATENTS, card)  # last: its presence says that the dataset is complete
