"""Samples of a model as images to judge: drawn when they are needed, shared over ranks, with the card that says how."""

from __future__ import annotations

import hashlib
import json

from mezzotint.data.images import open_images
from mezzotint.evaluate.sources import ImageSource, of_images, of_samples, open_source_of, stated
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
        card=stated(card, n),
        identity=hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest(),
        batch=job.settings.batch,
    )


def real_images(source: str, size: int | None, channels: int = 3, crop: str | None = None) -> ImageSource:
    """Real images to compare with: a set cropped and resized to `size`, finished images or a prepared set as they are.

    Errors: ValueError for data that cannot be opened, or neither finished images nor a size.
    """
    if size is None:
        return open_source_of(source, channels)
    return of_images(open_images(source, size=size, channels=channels, crop=crop), source)
