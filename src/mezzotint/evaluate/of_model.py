"""Samples of a model as images to judge: drawn when they are needed, shared over ranks, with the card that says how."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mezzotint.evaluate.sources import ImageSource, of_images, of_samples, open_source_of
from mezzotint.produce import Job


def samples_of(job: Job, n: int, first: int = 0) -> ImageSource:
    """Images first ... first + n - 1 of `job` as a source; its identity is the job's card, so that pieces can be kept.

    Errors: ValueError for a job without a decoder, whose latents are no images.
    """
    if job.decoder is None:
        raise ValueError("latents cannot be judged; leave --latents out so that they are decoded")
    card = job.card(n, first)
    model = card["model"]
    # The number of images is not part of what image i is, so a longer evaluation takes up a shorter one's pieces.
    essence = {k: v for k, v in card.items() if k not in ("n", "versions")}
    return of_samples(
        lambda numbers: job.draw([first + i for i in numbers]),
        n,
        name=f"{model['preset'] or model['backbone']} {model['sha256'][:16]}",
        card={
            "seeds": f"{first}...{first + n - 1}",
            "label_law": card["label_law"],
            "sampler": f"{job.settings.sampler} on the grid {job.settings.grid or 'of the family'}",
            "steps": card["steps"],
            "network_calls": card["network_calls_per_image"],
            "guidance": "none" if card["guidance"] is None else json.dumps(card["guidance"]),
            "ema": f"the saved average at {model['training_images']:,} images",
            "uint8_rule": card["uint8_rule"],
            "preprocessing": "none",
        },
        identity=hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest(),
        batch=job.settings.batch,
    )


def real_images(source: str, size: int | None, channels: int = 3, crop: str = "adm") -> ImageSource:
    """Real images to compare with: a set cropped and resized to `size`, or finished images as they are.

    Errors: ValueError for data that cannot be opened, or neither finished images nor a size.
    """
    if size is None:
        return open_source_of(Path(source), channels)
    from mezzotint.data.images import open_images

    return of_images(open_images(source, size=size, channels=channels, crop=crop), source)
