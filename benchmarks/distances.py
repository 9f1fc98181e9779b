"""Distances between real images: train against test, and class against class.

    python benchmarks/distances.py --data cifar10_jpg.npz \\
        --weights inception_2015_to_mixed7a.safetensors

These are a lower bound for the distance of samples: no model can be expected below train against
test at the same number of images. Writes OUT.json. The weights end at Mixed_7a, so none of the
numbers is a FID.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mezzotint
from mezzotint.data.image_dataset import ImageDataset, open_images
from mezzotint.evaluate.features import compute_features, open_features
from mezzotint.evaluate.metrics import Moments, frechet_distance

SETS = ("inception-64", "inception-768")


def rows(images: ImageDataset, count: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """Features of `count` images spread evenly over the set, and their labels."""
    chosen = np.linspace(0, len(images) - 1, count).round().astype(int).tolist()

    def batches() -> Iterator[Tensor]:
        for start in range(0, count, 64):
            yield images.batch(chosen[start : start + 64])[0]

    sets = open_features(SETS, ARGS.weights)
    return compute_features(sets, batches()), np.array([images.label(i) for i in chosen])


def distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two sets of features."""
    one, two = Moments.of(a), Moments.of(b)
    return frechet_distance(one.mean, one.cov, two.mean, two.cov)


def main() -> None:
    """Measure and write."""
    data = {
        split: open_images(f"{ARGS.data}:{split}", size=ARGS.size) for split in ("train", "test")
    }
    found = {split: rows(images, ARGS.count) for split, images in data.items()}
    names = data["train"].label_names or ()
    result: dict[str, object] = {
        "data": Path(ARGS.data).name,
        "images of each": ARGS.count,
        "size": ARGS.size,
        "torch": torch.__version__,
        "mezzotint": mezzotint.__version__,
    }
    for name in SETS:
        train, test = found["train"][0][name], found["test"][0][name]
        result[f"FD-{name} train/test"] = distance(train, test)
        result[f"FD-{name} train halves"] = distance(train[::2], train[1::2])
    train, test = (found[split][0]["inception-64"] for split in ("train", "test"))
    a, b = found["train"][1], found["test"][1]
    result["FD-inception-64 of train classes (rows) to test classes"] = {
        names[i]: {
            names[j]: round(distance(train[a == i], test[b == j]), 4) for j in range(len(names))
        }
        for i in range(len(names))
    }
    ARGS.out.parent.mkdir(parents=True, exist_ok=True)
    ARGS.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/distances-cifar10.json")
    )
    ARGS = parser.parse_args()
    main()
