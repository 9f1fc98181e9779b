"""Measure bits per dimension of the models that time_to_quality.py has trained.

    OMP_NUM_THREADS=1 python benchmarks/likelihood.py --runs runs/time-to-quality/cifar10 \\
        --data cifar10_jpg.npz:test

Every model gets the same images, noise levels and noise: differences between models are surer than
each value. It also measures the same images as PNG files. The same command continues an
interrupted one. Writes OUT.json.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from common import RESULTS, one_thread, write
from mezzotint.data.image_dataset import ImageDataset, open_images
from mezzotint.data.transforms import to_pillow
from mezzotint.evaluate.likelihood import LikelihoodSettings, bits_per_dim
from mezzotint.models import load_model
from time_to_quality import FAMILIES


def measure(
    run: Path, images: ImageDataset, name: str, settings: LikelihoodSettings, pieces: Path
) -> dict[str, Any]:
    """Return one row: the training behind a run's averaged weights, and every number."""
    model = load_model(run / "model").eval().requires_grad_(False)
    found = bits_per_dim(model, images, settings, name=name, folder=pieces, show=True)
    return {
        "preset": run.name,
        "images": model.info.images,
        "params": sum(p.numel() for p in model.parameters()),
        **found.to_json(),
    }


def measure_png(images: ImageDataset, count: int) -> float:
    """Return bits per dimension of PNG files, optimised, of the same images."""
    total = 0
    for i in range(count):
        file = io.BytesIO()
        pixels = images.image(i * len(images) // count)
        to_pillow(pixels.numpy()).save(file, "PNG", optimize=True)
        total += len(file.getvalue())
    return 8 * total / (count * images.channels * images.size**2)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of one run per preset")
    parser.add_argument("--data", required=True, help="images that no run was trained on")
    parser.add_argument("--presets", nargs="+", default=FAMILIES)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--pieces", type=Path, default=Path("runs/likelihood"))
    parser.add_argument("--out", type=Path, default=RESULTS / "likelihood-cifar10.json")
    args = parser.parse_args()
    one_thread()
    settings = LikelihoodSettings(num_images=args.num_images, draws=args.draws)
    images, name = open_images(args.data, size=args.size), Path(args.data).name
    png = measure_png(images, args.num_images)
    rows = []
    for preset in args.presets:
        rows.append(measure(args.runs / preset, images, name, settings, args.pieces))
        print(json.dumps(rows[-1]["numbers"][0]))
    write(args.out, "cpu", data=name, png=png, rows=rows)


if __name__ == "__main__":
    main()
