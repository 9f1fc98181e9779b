"""Measure each choice of a tiny recipe, one change at a time, at equal minutes and equal GMAC.

    OMP_NUM_THREADS=1 python benchmarks/choices.py --source eurosat64.zip --minutes 3 --gmac 300

Trains every row of CHOICES on EuroSAT at 64 px and measures the error of the predicted noise on
held-out images by log-SNR: after `--minutes` of processor time of one thread, and after `--gmac`
(1e9 multiply-accumulates of forward passes). `--distances` also measures the distance of samples to
real images, which takes minutes per row. The same command resumes. Writes OUT.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from common import RESULTS, facts, one_thread
from mezzotint.models import load_model
from mezzotint.train.validate import LEVELS, eps_mse_by_level
from time_to_quality import Judge, Ours, count_gmac, open_data, read_clock, train_for

CONV = ("model.transform=conv", "model.patch=2", "model.width=32")
WAVELET = ("model.transform=dwt", "model.patch=2", "model.width=32")
SIGMOID = (
    "objective.name=sigmoid",
    "objective.options.bias=0",
    "time.loss_measure=logsnr",
)
COARSE = (
    "model.patches=[8,4,2]",
    "model.dims=[192,96,48]",
    "model.hidden_dims=[384,192,96]",
)
PYRAMID = ("model.width=16", "model.multipliers=[1,2,4,8]", "model.blocks=1", "model.window=4")
EDM = ("model.prediction=edm", "schedule.name=lognormal", "objective.name=regression")

COSINE = ("schedule.name=cosine", "schedule.options.image_d=64", "schedule.options.noise_d=64")
LONG = ("batch=64", "optim.warmup_images=3000")
SHORT = ("batch=8", "optim.warmup_images=500")
B8 = ("batch=8", "optim.warmup_images=3000")
# What the tiny presets of DiMR, DiffiT and SiD2 were before these measurements.
EPS = ("model.prediction=eps", "model.time=linear_vp")
V = ("model.prediction=v", "model.time=linear_vp")
FINE = ("model.patches=[4,2,1]",)
TWO = (
    "model.multipliers=[1,4,8]",
    "model.kinds=[res,transformer,transformer]",
    "model.blocks=[1,1]",
)
RESIDUAL = ("model.kinds=[res,res,transformer]",)
THREE = ("model.width=32", "model.multipliers=[1,2,2]", "model.blocks=2")

# preset: {name of the row: fields of the recipe}
CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "unet-tiny": {
        "batch 32": ("batch=32", "optim.warmup_images=3000"),
        "batch 16": ("batch=16", "optim.warmup_images=3000"),
        "batch 8": B8,
        "twice the rate": (*B8, "optim.lr=4e-3"),
        "short warm-up": SHORT,
        "patch of 2, convolution": (*B8, *CONV),
        "EDM": (*B8, *EDM),
        "sigmoid weight": (*B8, *SIGMOID),
        "patch of 2, wavelet": (*B8, *WAVELET),
    },
    "uvit-tiny": {
        "batch 64": LONG,
        "batch 8, short warm-up": SHORT,
        "EDM": (*SHORT, *EDM),
    },
    "sid2-tiny": {
        "batch 8, short warm-up": (*SHORT, *TWO),
        "patch of 2": (*SHORT, *TWO, "model.transform=conv", "model.patch=2"),
        "weight of eps": (*SHORT, *TWO, "objective={name: eps_mse}", "time.loss_measure=u"),
        "two residual levels": (*SHORT, *TWO, "model.multipliers=[1,2,8]", *RESIDUAL),
        "four levels": SHORT,
        "four levels, weight of eps": (*SHORT, "objective={name: eps_mse}", "time.loss_measure=u"),
    },
    "diffit-tiny": {
        "batch 8, short warm-up": (*SHORT, *THREE),
        "width 16, four levels": (*SHORT, *PYRAMID),
        "patch of 2": (*SHORT, *THREE, "model.patch=2"),
    },
    "dimr-tiny": {
        "batch 64": (*LONG, *EPS, *FINE),
        "batch 8, short warm-up": (*SHORT, *EPS, *FINE),
        "twice the rate": (*SHORT, *EPS, *FINE, "optim.lr=2e-3"),
        "v": (*SHORT, *V, *FINE),
        "x": (*SHORT, "model.prediction=x", "model.time=linear_vp", *FINE),
        "v, patches 8, 4, 2, width 192": (*SHORT, *V, *COARSE),
        "v, patches 8, 4, 2, width 192, cosine": (*SHORT, *V, *COARSE, *COSINE),
        "v, patches 8, 4, 2": (*SHORT, *V, "model.patches=[8,4,2]"),
    },
}


def measure_errors(entrant: Ours, judge: Judge, count: int) -> dict[str, Any]:
    """Return the held-out error of the averaged weights by log-SNR, and the work so far."""
    model = load_model(entrant.folder / "model").eval()
    gmac = count_gmac(entrant.recipe)
    images, seconds = read_clock(entrant.folder)
    errors = eps_mse_by_level(model, judge.images(judge.data.held_out), count=count)
    return {
        "images": images,
        "minutes": seconds / 60,
        "gmac": images * gmac,
        "gmac_per_image": gmac,
        "params": sum(p.numel() for p in model.parameters()),
        "eps_mse": {f"{level:g}": error for level, error in errors.items()},
    }


def run_choice(entrant: Ours, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    """Train one row and return its measurements at equal GMAC and at equal minutes."""
    batch = entrant.batch
    gmac = count_gmac(entrant.recipe)
    row: dict[str, Any] = {}
    images, seconds = read_clock(entrant.folder)
    equal_work = int(args.gmac / gmac) // batch * batch
    if images <= equal_work:
        train_for(entrant, float("inf"), most_images=equal_work)
        row["equal_gmac"] = measure_errors(entrant, judge, args.count)
    images, seconds = read_clock(entrant.folder)
    if seconds <= 60 * args.minutes:
        train_for(entrant, 60 * args.minutes)
    row["equal_minutes"] = measure_errors(entrant, judge, args.count)
    if args.distances:
        source = entrant.source(judge, judge.num_samples)
        row["equal_minutes"]["distances"] = judge.distances(source)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: the geometric mean of the errors, and each level's."""
    heads = ["preset", "change", "GMAC/image", "images/s", "mean at equal GMAC", "mean"]
    heads += [f"{level:g}" for level in LEVELS]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * 2 + "| ---: " * (len(heads) - 2) + "|"]
    for row in rows:
        last = row["equal_minutes"]
        speed = last["images"] / last["minutes"] / 60
        work = mean_error(row["equal_gmac"]) if "equal_gmac" in row else None
        cells = [row["preset"], row["change"], f"{last['gmac_per_image']:.3f}", f"{speed:.1f}"]
        cells += ["–" if work is None else f"{work:.4f}", f"{mean_error(last):.4f}"]
        cells += [f"{error:.2g}" for error in last["eps_mse"].values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_error(measured: dict[str, Any]) -> float:
    """Return the geometric mean over log-SNRs: a ratio counts equally at every level."""
    return geometric_mean(measured["eps_mse"].values())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="EuroSAT, without its split")
    parser.add_argument("--presets", nargs="+", default=list(CHOICES))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--gmac", type=float, default=300.0)
    parser.add_argument("--count", type=int, default=192, help="held-out images")
    parser.add_argument("--distances", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/choices"))
    parser.add_argument("--out", type=Path, default=RESULTS / "choices-eurosat.json")
    args = parser.parse_args()
    one_thread()
    data = open_data("eurosat", args.source)
    args.runs.mkdir(parents=True, exist_ok=True)
    judge = Judge(data, args.runs, inception=None, num_samples=250, steps=14, real=2000)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for preset in args.presets:
        for change, fields in CHOICES[preset].items():
            if any((r["preset"], r["change"]) == (preset, change) for r in rows):
                continue
            name = f"{preset} {change}".replace(" ", "-").replace(",", "")
            entrant = Ours(preset, data, args.runs, fields, name)
            row = {"preset": preset, "change": change, "fields": list(fields)}
            rows.append(row | facts("cpu") | run_choice(entrant, judge, args))
            content = {"minutes": args.minutes, "gmac": args.gmac, "held_out_images": args.count}
            args.out.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
