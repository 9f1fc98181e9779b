"""Every family's tiny preset on the same real images: held-out error at equal images and GMAC.

    python benchmarks/quality.py --data eurosat64.zip:train --held-out eurosat64.zip:test \\
        --budget 8000 --weights inception_2015_to_mixed7a.safetensors

Each family trains with its own paper's schedule, prediction and loss until it has spent `--budget`
(multiply-accumulates of forward passes, in 1e9). Meanwhile the error of the implied noise is
measured on held-out images at fixed log-SNRs, which compares all families. With `--weights` of an
Inception (or `--features digits`) each final model is also evaluated with the same sampler,
discretization, steps, seeds and reference. The same command resumes. Writes OUT.json, OUT.png and a
table, and RUNS/PRESET-SIZE/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mezzotint
from common import commit
from mezzotint import config
from mezzotint.backbones import get_backbone
from mezzotint.backbones.flops import GIGA, count_macs
from mezzotint.core.distributed import default_device
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate.evaluate import evaluate
from mezzotint.evaluate.features import open_features
from mezzotint.evaluate.image_source import from_dataset, from_job
from mezzotint.evaluate.references import Reference, make_reference, read_reference
from mezzotint.evaluate.results import load_evaluation, require_comparable
from mezzotint.models import create_model, load_model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.job import make_job
from mezzotint.train.loop import train
from mezzotint.train.validate import LEVELS, eps_mse_by_level

# Every family was trained on these levels.
DISCRETIZATION = Spec("even_logsnr", {"logsnr_min": -9.0, "logsnr_max": 9.0})
FAMILIES = ("unet-tiny", "uvit-tiny", "dimr-tiny", "diffit-tiny")


def gmac_per_image(preset: str, model: dict[str, Any]) -> float:
    """Return the multiply-accumulates of one forward pass of one image in 1e9."""
    with torch.device("meta"):
        return count_macs(get_backbone(create_model(preset, **model))).computed / GIGA


def milestones(gmac: float, budget: float, batch: int) -> list[int]:
    """Return images at 1/8, 1/4, 1/2 and all of the budget and at 2,048 x 2^k; whole batches."""
    end = int(budget / gmac) // batch * batch
    shares = [end // n // batch * batch for n in (8, 4, 2, 1)]
    doubling = [2048 * 2**k for k in range(20) if 2048 * 2**k <= end]
    return sorted({m for m in [*shares, *doubling] if m > 0})


def one_family(preset: str, args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Train and measure one preset, appending a row per milestone and writing after each."""
    held_out = open_images(args.held_out, size=args.size, channels=args.channels)
    model = {"size": args.size, "channels": args.channels, "num_classes": held_out.num_classes}
    gmac = gmac_per_image(preset, model)
    recipe = config.override(recipe_for(preset), [f"{f'model.{k}'}={v}" for k, v in model.items()])
    recipe = config.override(
        recipe, [f"data.source={args.data!r}", f"batch={args.batch}", "log_every_images=512"]
    )
    recipe = config.override(
        recipe, ["samples.count=40", "samples.steps=18", "samples.every_images=1000000000"]
    )
    folder = args.runs / f"{preset}-{args.size}"
    for images in milestones(gmac, args.budget, args.batch):
        if any(r["preset"] == preset and r["images"] == images for r in rows):
            continue
        train(replace(recipe, images=images), folder)
        trained = load_model(folder / "model").eval().to(default_device())
        errors = eps_mse_by_level(trained, held_out, count=args.count)
        rows.append(
            {
                "preset": preset,
                "images": images,
                "gmac": images * gmac,
                "gmac_per_image": gmac,
                "params": sum(p.numel() for p in trained.parameters()),
                "eps_mse": {f"{level:g}": error for level, error in errors.items()},
            }
        )
        write(args, rows)
    if evaluates(args):
        last = max((r for r in rows if r["preset"] == preset), key=lambda r: r["images"])
        if "distances" not in last:
            last["distances"] = evaluate_model(folder, args)
            write(args, rows)


def evaluates(args: argparse.Namespace) -> bool:
    """Return whether there are features to evaluate the final models with."""
    return bool(args.weights) or args.features == ["digits"]


def references(args: argparse.Namespace) -> list[Reference]:
    """Statistics of the training and of the held-out images, made once."""
    sets = open_features(args.features, args.weights)
    found: list[Reference] = []
    for part, data in (("train", args.data), ("held-out", args.held_out)):
        path = args.runs / f"{part}-{args.size}.npz"
        if not path.exists():
            images = open_images(data, size=args.size, channels=args.channels)
            source = from_dataset(
                images, f"{Path(args.data).name} {part}", min(args.real, len(images))
            )
            make_reference(source, path, sets, keep=args.real)
        found.append(read_reference(path))
    return found


def evaluate_model(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return the distances of the final model's samples and write its evaluation.json."""
    train_set, held_out = references(args)
    changes = {
        "sampler": Spec("dpmpp_2m"),
        "discretization": DISCRETIZATION,
        "steps": args.steps,
        "dtype": args.dtype,
        "clip": Spec("static"),
    }
    evaluation = evaluate(
        from_job(make_job(folder, changes), args.samples),
        train_set,
        open_features(args.features, args.weights),
        heldout=held_out,
        folder=folder / "pieces",
        show=True,
    )
    evaluation.save(folder / "evaluation.json")
    return {number.metric: number.value for number in evaluation.numbers}


def check_cards(args: argparse.Namespace) -> None:
    """Check that all evaluations were made in the same way; ValueError names what differs."""
    cards = [
        load_evaluation(path) for path in sorted(args.runs.glob(f"*-{args.size}/evaluation.json"))
    ]
    for other in cards[1:]:
        require_comparable(cards[0], other, varying=("ema",))  # "at N images": what is compared


def table(rows: list[dict[str, Any]]) -> str:
    """The final row of each family as Markdown."""
    last = [
        max((r for r in rows if r["preset"] == p), key=lambda r: r["images"], default=None)
        for p in FAMILIES
    ]
    shown = [r for r in last if r is not None]
    metrics = sorted({m for r in shown for m in r.get("distances", {})})
    heads = ["preset", "params", "images", "GMAC", *(f"eps-MSE {x:g}" for x in LEVELS), *metrics]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in shown:
        errors = [f"{r['eps_mse'][f'{x:g}']:.4f}" for x in LEVELS]
        distances = [
            f"{r['distances'][m]:.4g}" if m in r.get("distances", {}) else "–" for m in metrics
        ]
        cells = [
            r["preset"],
            f"{r['params'] / 1e6:.2f} M",
            f"{r['images']:,}",
            f"{r['gmac']:.0f}",
            *errors,
            *distances,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The whole result so far, with what it was made on."""
    facts = {
        "data": Path(args.data).name,
        "held_out": f"{Path(args.held_out).name}, {args.count} images spread over it",
        "size": args.size,
        "batch": args.batch,
        "budget_gmac": args.budget,
        "samples": f"{args.samples}, dpmpp_2m, even in log-SNR -9 to 9, {args.steps} steps, "
        f"x clipped, {args.dtype}"
        if evaluates(args)
        else "none",
        "reference": f"{args.real} images spread over the training set, as many held out",
        "torch": torch.__version__,
        "mezzotint": mezzotint.__version__,
        "commit": commit(),
        "machine": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
    }
    args.out.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1))


def plot(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Mean held-out error over the levels, against images and against compute."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for preset in FAMILIES:
        mine = sorted((r for r in rows if r["preset"] == preset), key=lambda r: r["images"])
        mean = [sum(r["eps_mse"].values()) / len(r["eps_mse"]) for r in mine]
        for axis, unit in zip(axes, ("images", "gmac"), strict=True):
            axis.plot([r[unit] for r in mine], mean, marker="o", label=preset)
    for axis, label in zip(axes, ("images seen", "GMAC of forward passes"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3)
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(LogLocator(subs=(1, 2, 5)))
            line.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel(
        f"held-out eps-MSE, mean over log-SNR {', '.join(f'{x:g}' for x in LEVELS)}", fontsize=7
    )
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="upper center", ncols=len(FAMILIES), frameon=False
    )
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(args.out.with_suffix(".png"), dpi=120)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--budget", type=float, default=8000, help="GMAC of forward passes per family"
    )
    parser.add_argument("--count", type=int, default=256, help="held-out images")
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument(
        "--weights", type=Path, help="of an Inception, to evaluate the final models"
    )
    parser.add_argument("--features", nargs="*", default=["inception-64", "inception-768"])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16", help="of the network while sampling")
    parser.add_argument("--real", type=int, default=2000, help="images of each reference")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality-cpu"))
    args = parser.parse_args()
    done = args.out.with_suffix(".json")
    rows = json.loads(done.read_text())["rows"] if done.exists() else []
    for preset in args.families:
        one_family(preset, args, rows)
    check_cards(args)
    plot(args, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
