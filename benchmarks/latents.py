"""A folder of random latents as `mezzotint prepare` writes one: training needs no autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_random_latents(
    folder: Path, count: int, *, size: int, channels: int, classes: int, codec: str
) -> None:
    """Write `count` latents of size x size cells and standard deviation 1; labels in turn.

    Args:
        codec: name of the autoencoder that they pass for.
    """
    rng = np.random.default_rng(0)
    moments = np.zeros((count, 2, 2, channels, size, size), np.float16)
    moments[:, :, 0] = rng.standard_normal(moments[:, :, 0].shape, np.float32)
    moments[:, :, 1] = -10.0  # log-variance
    labels = np.arange(count, dtype=np.int64) % classes
    names = [f"{i}.png" for i in range(count)]
    folder.mkdir(parents=True)
    np.save(folder / "piece-000000.npy", moments)
    facts = {"name": names, "label": labels.tolist(), "text": [None] * count, "left_out": []}
    (folder / "piece-000000.json").write_text(json.dumps(facts))
    np.save(folder / "labels.npy", labels)
    card = {
        "format": 1,
        "size": size,
        "factor": 1,
        "channels": channels,
        "count": count,
        "pieces": [count],
        "codec": codec,
        "codec_hash": "random",
        "fingerprint": "random",
        "label_names": [str(i) for i in range(classes)],
        "statistics": {"mean": [0.0] * channels, "std": [1.0] * channels, "overall_std": 1.0},
        "notes": ["random numbers"],
    }
    (folder / "latents.json").write_text(json.dumps(card))
