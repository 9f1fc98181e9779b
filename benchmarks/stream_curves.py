"""Training curves with the residual stream in bfloat16 and in float32, of every tiny preset.

    OMP_NUM_THREADS=1 python benchmarks/stream_curves.py

Each preset trains on the handwritten digits, 16 px in pixels, with its recipe, three times from
each seed: in float32, under bfloat16 autocast with the stream between the blocks in float32, and
with it in bfloat16. The images, the noise and the first weights of the three are the same, so
their losses differ by rounding alone, and by what training makes of it. Printed are the losses
over the last quarter relative to float32's and the mean squared errors of the predicted noise by
the averaged weights, each with the standard deviation over seeds; beside them how much float32's
own results differ between seeds. It resumes. Writes stream-curves.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, facts, one_thread
from mezzotint import config
from mezzotint.backbones.blocks import repeated_blocks
from mezzotint.core import distributed
from mezzotint.data.image_dataset import open_images
from mezzotint.models import load_model
from mezzotint.recipes import recipe_for
from mezzotint.train import loop
from mezzotint.train.progress import ProgressDisplay
from mezzotint.train.setup import setup
from mezzotint.train.validate import eps_mse_by_level
from stream_precision import round_stream

PRESETS = (
    "unet-tiny", "uvit-tiny", "sid2-tiny", "dimr-tiny", "diffit-tiny", "jit-tiny",
    "diffit-latent-tiny",
)  # fmt: skip
# The other presets' batch and warm-up: its own are for a longer run.
FIELDS = {"diffit-latent-tiny": ["batch=8", "optim.warmup_images=500"]}
SIZE = 16
# The precision of the passes and the dtype that enters each block.
STREAMS = {
    "float32": ("float32", None),
    "bf16, stream float32": ("bf16", torch.float32),
    "bf16, stream bf16": ("bf16", torch.bfloat16),
}


def train_with(preset: str, stream: str, seed: int, images: int) -> dict[str, Any]:
    """Return the losses of the log lines, and the errors of the averaged weights."""
    precision, dtype = STREAMS[stream]
    fields = [
        "data.source=digits", f"model.size={SIZE}", "model.num_classes=10", "model.channels=1",
        f"images={images}", f"seed={seed}", f"engine.precision={precision}",
        "data.codec=pixels", f"log_every_images={images // 40}", "samples.every_images=0",
        "save.every_images=0",
    ]  # fmt: skip
    recipe = config.override(recipe_for(preset), [*fields, *FIELDS.get(preset, [])])
    with tempfile.TemporaryDirectory() as folder:
        run = setup(recipe, Path(folder), distributed.init_distributed())
        if dtype is not None:
            assert list(repeated_blocks(run.state.backbone))
            round_stream(run.state.backbone, dtype)
        loop.loop(run, ProgressDisplay(show=False), loop.StopSignal())
        run.writer.close()
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        model = load_model(Path(folder) / "model").eval()
    digits = open_images("digits", size=SIZE, channels=1)
    errors = eps_mse_by_level(model, digits, count=256)
    return {
        "losses": [json.loads(line)["loss"] for line in lines],
        "eps_mse": {f"{level:g}": error for level, error in errors.items()},
    }


def late_loss(row: dict[str, Any]) -> float:
    """Return the mean loss over the last quarter of the images."""
    losses = row["losses"]
    return statistics.mean(losses[-max(1, len(losses) // 4) :])


def mean_error(row: dict[str, Any]) -> float:
    """Return the geometric mean over levels of the error of the predicted noise."""
    return math.exp(statistics.mean(math.log(e) for e in row["eps_mse"].values()))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the ratios to float32 and the spread of float32 itself as Markdown."""
    lines = [
        "| preset | stream | loss / float32's | error / float32's | of float32, between seeds |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for preset in dict.fromkeys(r["preset"] for r in rows):
        mine = {(r["stream"], r["seed"]): r for r in rows if r["preset"] == preset}
        seeds = sorted({seed for _, seed in mine})
        exact = [mean_error(mine["float32", s]) for s in seeds]
        spread = statistics.stdev(exact) / statistics.mean(exact) if len(seeds) > 1 else math.nan
        for stream in list(STREAMS)[1:]:
            cells = []
            for measure in (late_loss, mean_error):
                ratios = [measure(mine[stream, s]) / measure(mine["float32", s]) for s in seeds]
                deviation = statistics.stdev(ratios) if len(seeds) > 1 else math.nan
                cells.append(f"{statistics.mean(ratios):.4f} ± {deviation:.4f}")
            lines.append(f"| `{preset}` | {stream} | {' | '.join(cells)} | ± {spread:.4f} |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "stream-curves.json")
    args = parser.parse_args()
    one_thread()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {(r["preset"], r["stream"], r["seed"]) for r in rows}
    for preset in args.presets:
        for seed in range(args.seeds):
            for stream in STREAMS:
                if (preset, stream, seed) in done:
                    continue
                found = train_with(preset, stream, seed, args.images)
                rows.append({"preset": preset, "stream": stream, "seed": seed, **found})
                content = {"images": args.images, **facts("cpu"), "rows": rows}
                args.out.write_text(json.dumps(content, indent=1) + "\n")
                print(preset, stream, seed, f"{late_loss(rows[-1]):.4f}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
