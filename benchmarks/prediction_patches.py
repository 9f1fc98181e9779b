"""Compare predictions of x, eps and v by U-ViT, DiMR and JiT on patches of 2 to 16 pixels.

    OMP_NUM_THREADS=1 python benchmarks/prediction_patches.py --source eurosat64.zip --minutes 1.5

Every row is one network on EuroSAT at 64 px, trained for `--minutes` of processor time of one
thread by the recipe of its tiny preset, but all with JiT's noise levels and JiT's loss, the error
of the flow velocity (arXiv 2511.13720, section 3 and table 1), whatever the network predicts. All
transformers are 128 wide; a patch of p pixels has 3 p p numbers. U-ViT is its transformer alone;
DiMR has branches on patches of 4 p, 2 p and p. Reports the error of the predicted noise on held-out
images by log-SNR: at a level, the errors of x, eps and v are multiples of each other. The same
command resumes. Writes OUT.json, and PICTURE: a row of samples per network and patch, by x, eps, v.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from choices import mean_error, measure_errors
from common import RESULTS, facts, one_thread
from mezzotint.core.image_grid import make_grid, save_png
from time_to_quality import Judge, Ours, open_data, train_for

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "prediction-patches.png"
PATCHES, PREDICTIONS = (2, 4, 8, 16), ("x", "eps", "v")
COLUMNS = 2  # samples per network
# JiT's log-normal sigma at noise of scale 1, and its loss.
JIT = (
    "schedule.name=lognormal",
    "schedule.options.mean=0.8",
    "schedule.options.std=0.8",
    "objective.name=clamped_flow",
    "objective.options.noise_scale=1",
    "batch=8",
    "optim.warmup_images=200",
)


def network_fields(preset: str, patch: int) -> tuple[str, ...]:
    """Return the fields of a network whose finest tokens are patches of `patch` pixels."""
    if preset == "jit-tiny":
        return (f"model.patch={patch}",)
    if preset == "dimr-tiny":
        return (f"model.patches=[{4 * patch},{2 * patch},{patch}]",)
    fields = ("transform=conv", f"patch={patch}", "multipliers=[1]", "blocks=[]", "width=128")
    return tuple(f"model.{field}" for field in (*fields, "depth=6", "heads=4"))


def samples_of(entrant: Ours, judge: Judge) -> torch.Tensor:
    """Return the images of the first seeds."""
    batches = entrant.source(judge, COLUMNS).batches(0, COLUMNS)
    return torch.cat([images.cpu() for images in batches])


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, help="EuroSAT, without its split")
    presets = ("jit-tiny", "uvit-tiny", "dimr-tiny")
    parser.add_argument("--presets", nargs="+", default=presets, choices=presets)
    parser.add_argument("--patches", nargs="+", type=int, default=PATCHES, choices=PATCHES)
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--count", type=int, default=96, help="held-out images")
    parser.add_argument("--runs", type=Path, default=Path("runs/prediction-patches"))
    parser.add_argument("--out", type=Path, default=RESULTS / "prediction-patches.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    one_thread()
    data = open_data("eurosat", args.source)
    args.runs.mkdir(parents=True, exist_ok=True)
    judge = Judge(data, args.runs, inception=None, num_samples=COLUMNS, steps=12, real=0)
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        rows = json.loads(args.out.read_text())["rows"]
    shown: list[torch.Tensor] = []
    for preset in args.presets:
        for patch in sorted(args.patches, reverse=True):
            for prediction in PREDICTIONS:
                fields = (*JIT, *network_fields(preset, patch), f"model.prediction={prediction}")
                entrant = Ours(preset, data, args.runs, fields, f"{preset}-{patch}-{prediction}")
                entrant.first_images = 32
                key = {"preset": preset, "patch": patch, "prediction": prediction}
                if not any(key.items() <= row.items() for row in rows):
                    train_for(entrant, 60 * args.minutes)
                    measured = measure_errors(entrant, judge, args.count)
                    rows.append({**key, "fields": list(fields), **facts("cpu"), **measured})
                    content = {"data": f"{Path(args.source).name}, {data.size} px"}
                    content |= {"minutes": args.minutes, "held_out_images": args.count}
                    args.out.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n")
                    print(
                        *key.values(), measured["images"], f"{mean_error(measured):.4f}", flush=True
                    )
                shown.append(samples_of(entrant, judge))
    columns = COLUMNS * len(PREDICTIONS)
    save_png(make_grid(torch.cat(shown), columns=columns), args.picture)


if __name__ == "__main__":
    main()
