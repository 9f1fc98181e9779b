"""Measure choices of a tiny recipe that leave its speed as it is, after equal numbers of images.

    OMP_NUM_THREADS=1 python benchmarks/training_choices.py cifar10 --source cifar10_jpg.npz

Trains every row of CHOICES and measures the error of the predicted noise on held-out images by
log-SNR, and the distance of samples to real images by the protocol of time_to_quality.py. Nothing
depends on the time that it takes. The same command resumes. Writes OUT.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from choices import mean_error, measure_errors
from common import RESULTS, facts, one_thread
from mezzotint.models import load_model
from mezzotint.train.validate import eps_mse_by_level
from time_to_quality import Judge, Ours, open_data, train_for

# Of EDM: its preconditioning, noise levels in training, and weight.
EDM = ("model.prediction=edm", "schedule.name=lognormal", "objective.name=regression")
EPS_WEIGHT = ("objective={name: eps_mse}", "time.loss_measure=u")
NO_FILM = ("model.film=false",)  # DiffiT's cells as published
EDM_PUBLISHED = (*EDM, "time.loss_measure=u", *NO_FILM)
NO_CLASSES = ("model.class_dim=0",)  # DiMR's norms as published
PYRAMID = ("objective={name: pyramid}", "time.loss_measure=u", *NO_CLASSES)

# data: {preset: (images, {name of the row: fields of the recipe})}
CHOICES: dict[str, dict[str, tuple[int, dict[str, tuple[str, ...]]]]] = {
    "cifar10": {
        "sid2-tiny": (
            34_592,
            {
                "weight of eps": EPS_WEIGHT,
                "sigmoid weight, bias 2.8": ("objective.options.bias=2.8",),
                "sigmoid weight, bias 1.4": ("objective.options.bias=1.4",),
                "sigmoid weight, bias 0": ("objective.options.bias=0",),
            },
        ),
        "dimr-tiny": (
            17_640,
            {
                "v unweighted, rate 1e-3": (*PYRAMID, "optim.lr=1e-3"),
                "v unweighted, rate 2e-3": PYRAMID,
                "weight of eps": (
                    "objective.options.bias=1000",
                    "time.loss_measure=u",
                    *NO_CLASSES,
                ),
                "sigmoid weight": NO_CLASSES,
                "sigmoid weight, classes in the norms": (),
            },
        ),
        "diffit-tiny": (
            6_000,
            {
                "EDM, rate 1e-3": (*EDM_PUBLISHED, "optim.lr=1e-3"),
                "EDM, rate 2e-3": (*EDM_PUBLISHED, "optim.lr=2e-3"),
                "v, cosine, weight of eps": (*EPS_WEIGHT, *NO_FILM),
                "v, cosine, weight of eps, FiLM": EPS_WEIGHT,
                "v, cosine, sigmoid weight, bias 2.8, FiLM": (),
            },
        ),
        "uvit-tiny": (12_288, {"v, cosine, weight of eps": (), "EDM": EDM}),
    },
    "eurosat": {
        "sid2-tiny": (
            12_768,
            {
                "weight of eps": EPS_WEIGHT,
                "sigmoid weight, bias 2.8": ("objective.options.bias=2.8",),
                "sigmoid weight, bias 1.4": ("objective.options.bias=1.4",),
                "sigmoid weight, bias 0": ("objective.options.bias=0",),
            },
        ),
        "dimr-tiny": (
            14_136,
            {
                "v unweighted": PYRAMID,
                "sigmoid weight": NO_CLASSES,
                "sigmoid weight, classes in the norms": (),
            },
        ),
        "diffit-tiny": (
            6_000,
            {
                "weight of eps": (*EPS_WEIGHT, *NO_FILM),
                "weight of eps, FiLM": EPS_WEIGHT,
                "sigmoid weight, bias 1.4": NO_FILM,
                "sigmoid weight, bias 1.4, FiLM": (),
            },
        ),
    },
}


def measure_errors_without_label(entrant: Ours, judge: Judge, count: int) -> dict[str, float]:
    """Return the held-out error by log-SNR with the null label, for what the label is worth."""
    model = load_model(entrant.folder / "model").eval()
    images = judge.images(judge.data.held_out)
    errors = eps_mse_by_level(model, images, count=count, labels=False)
    return {f"{level:g}": error for level, error in errors.items()}


def run_choice(entrant: Ours, judge: Judge, images: int) -> dict[str, Any]:
    """Train one row for `images` and return its measurements."""
    train_for(entrant, float("inf"), most_images=images)
    measured = measure_errors(entrant, judge, count=128)
    # The images are what counts; the time is that of a machine that did other work.
    del measured["minutes"]
    measured["eps_mse_without_label"] = measure_errors_without_label(entrant, judge, count=128)
    distances = judge.distances(entrant.source(judge, judge.num_samples))
    return {**measured, "distances": distances}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=list(CHOICES))
    parser.add_argument("--source", required=True, help="of the data, without its split")
    parser.add_argument("--presets", nargs="+", default=None)
    parser.add_argument("--runs", type=Path, default=Path("runs/training-choices"))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    one_thread()
    out = args.out or RESULTS / f"training-choices-{args.data}.json"
    data, root = open_data(args.data, args.source), args.runs / args.data
    root.mkdir(parents=True, exist_ok=True)
    judge = Judge(data, root, inception=None, num_samples=256, steps=12, real=1000)
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    for preset, (images, changes) in CHOICES[args.data].items():
        if args.presets and preset not in args.presets:
            continue
        for change, fields in changes.items():
            if any((r["preset"], r["change"]) == (preset, change) for r in rows):
                continue
            name = f"{preset} {change}".replace(" ", "-").replace(",", "")
            entrant = Ours(preset, data, root, fields, name)
            row = {"preset": preset, "change": change, "fields": list(fields)}
            rows.append(row | facts("cpu") | run_choice(entrant, judge, images))
            out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            distance = rows[-1]["distances"]["FD-EfficientNet-Lite0"]
            print(f"{preset} {change}: {mean_error(rows[-1]):.4f} {distance:.0f}", flush=True)


if __name__ == "__main__":
    main()
