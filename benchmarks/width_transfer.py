"""Test whether one learning rate per unit of width serves networks of several widths.

    python benchmarks/width_transfer.py --data eurosat64.zip:train --held-out eurosat64.zip:test

Trains tiny presets at several widths and learning rates, briefly, on the same images in the same
order. The rule under test is that of the recipes of `-small` and `-base`: rate ∝ 1 / width.
`--rates` hold at the preset's own width; a network m times as wide trains at rate / m. If the rule
holds, every width has its lowest error at the same rate. The error is the mean squared error of the
predicted noise on held-out images, mean over fixed log-SNRs and over seeds of weights and noise.
The same command resumes. Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, one_thread, write
from mezzotint.backbones import get_backbone
from mezzotint.core.registry import build
from mezzotint.data.image_dataset import ImageDataset, open_images
from mezzotint.data.transforms import to_model_range
from mezzotint.models import create_model
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for
from mezzotint.train.optim import learning_rate, make_optimisers, set_learning_rate
from mezzotint.train.validate import eps_mse_by_level
from time_to_quality import check_settings

NATIVE = 16  # the width of the tiny presets of these families
HEADS = {"unet-tiny": {8: 4, 16: 4, 32: 4}, "uvit-tiny": {8: 2, 16: 4, 32: 8}}


@dataclass
class Images:
    """Images of every run: x in [-1, 1] (n, c, h, w) and labels (n,) to train on; held-out ones."""

    x: Tensor
    label: Tensor
    held_out: ImageDataset


def read_images(args: argparse.Namespace) -> Images:
    """Return `args.images` training images, spread over the set and shuffled once for all runs."""
    data = open_images(args.data, size=args.size, channels=3)
    order = torch.randperm(args.images, generator=torch.Generator().manual_seed(0)).tolist()
    pixels, label = data.batch([i * len(data) // args.images for i in order])
    assert label is not None, "the networks are class-conditional"
    return Images(to_model_range(pixels), label, open_images(args.held_out, size=args.size))


def error(
    preset: str, width: int, rate: float, seed: int, images: Images, args: argparse.Namespace
) -> float:
    """Return the held-out error after one pass over the images at `rate` times NATIVE / `width`."""
    changes = {
        "size": args.size,
        "num_classes": images.held_out.num_classes,
        "width": width,
        "emb_dim": 8 * width,
        "heads": HEADS[preset][width],
    }
    recipe = recipe_for(preset)
    optim = replace(
        recipe.optim,
        lr=rate * NATIVE / width,
        warmup_images=args.images // 8,
        decay="cosine",
    )
    torch.manual_seed(seed)
    model = create_model(preset, **changes)
    objective = build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, recipe.schedule or model.info.schedule)
    optimisers = make_optimisers(optim, get_backbone(model), fused=True)
    noise = torch.Generator().manual_seed(seed)
    for start in range(0, args.images, args.batch):
        x, label = (t[start : start + args.batch] for t in (images.x, images.label))
        eps = torch.randn(x.shape, generator=noise)
        u = (torch.arange(len(x)) + torch.rand(len(x), generator=noise)) / len(x)
        set_learning_rate(optimisers, learning_rate(optim, start + len(x), args.images))
        objective(model, x, eps, schedule(u), Cond(label=label)).mean().backward()
        if optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    errors = eps_mse_by_level(model, images.held_out, count=args.count)
    return sum(errors.values()) / len(errors)


def best_rate(rows: list[dict[str, Any]]) -> float | None:
    """Return the rate at the vertex of a parabola in log rate, through the best and its neighbours.

    None where the lowest error is at an end of the grid.
    """
    i = min(range(len(rows)), key=lambda i: rows[i]["error"])
    if not 0 < i < len(rows) - 1:
        return None
    (xa, a), (xb, b), (xc, c) = ((math.log(r["rate"]), r["error"]) for r in rows[i - 1 : i + 2])
    left, right = (xb - xa) * (b - c), (xb - xc) * (b - a)
    # Press et al., Numerical Recipes, third edition, eq. 10.3.1.
    return math.exp(xb - ((xb - xa) * left - (xb - xc) * right) / (2 * (left - right)))


def curves(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return rates with their errors, means over the seeds, by (preset, width)."""
    found: dict[tuple[str, int], dict[float, list[float]]] = {}
    for r in sorted(rows, key=lambda r: (r["preset"], r["width"], r["rate"])):
        rates = found.setdefault((r["preset"], r["width"]), {})
        rates.setdefault(r["rate"], []).append(r["error"])
    return {
        key: [{"rate": rate, "error": fmean(errors)} for rate, errors in rates.items()]
        for key, rates in found.items()
    }


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw error over rate, one panel per preset, one line per width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    presets = sorted({r["preset"] for r in rows})
    figure, axes = plt.subplots(1, len(presets), figsize=(4.5 * len(presets), 3.6), squeeze=False)
    for axis, preset in zip(axes[0], presets, strict=True):
        for (name, width), curve in curves(rows).items():
            if name == preset:
                points = [(r["rate"], r["error"]) for r in curve]
                axis.plot(*zip(*points, strict=True), marker="o", label=f"width {width}")
        axis.set(xscale="log", title=preset, xlabel=f"learning rate x width / {NATIVE}")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    axes[0][0].set_ylabel("held-out eps-MSE, mean over log-SNR -6, -3, 0, 3, 6", fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--presets", nargs="*", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--widths", nargs="*", type=int, default=[8, 16, 32])
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3, 2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", type=int, default=128, help="held-out images")
    parser.add_argument("--out", type=Path, default=RESULTS / "width-transfer")
    args = parser.parse_args()
    one_thread()
    done = args.out.with_suffix(".json")
    images = read_images(args)
    settings = {
        "data": Path(args.data).name,
        "held_out": f"{Path(args.held_out).name}, {args.count} images spread over it",
        **{k: vars(args)[k] for k in ("size", "images", "batch")},
    }
    before = json.loads(done.read_text()) if done.exists() else {}
    check_settings(before, settings, done)
    rows: list[dict[str, Any]] = before.get("rows", [])
    runs = product(range(args.seeds), args.presets, args.widths, args.rates)
    for seed, preset, width, rate in runs:
        key = {"preset": preset, "width": width, "rate": rate, "seed": seed}
        if any(key.items() <= {"seed": 0, **r}.items() for r in rows):
            continue
        began = time.process_time()
        found = error(preset, width, rate, seed, images, args)
        rows.append({**key, "lr": rate * NATIVE / width, "error": found})
        rows[-1]["seconds"] = time.process_time() - began
        print(rows[-1], flush=True)
        best = [
            {"preset": p, "width": w, "rate": best_rate(curve)}
            for (p, w), curve in curves(rows).items()
        ]
        write(done, "cpu", **settings, rows=rows, best=best)
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
