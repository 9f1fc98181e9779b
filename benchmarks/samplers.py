"""Steps against quality: distance to real digits over network calls, for every sampler.

    python benchmarks/samplers.py [--run runs/demo]

Samples a tiny class-conditional network of digits (the demo's, trained here if --run has none,
about two minutes) with each sampler at equal numbers of network calls, on its default
discretization (Karras' for Heun, else even in u). The measure is the Fréchet distance, on the
features of the digit classifier, to the digits it was trained on (FD-digits; it says nothing about
photographs). The plot also shows that of the held-out real digits. The same command resumes. Writes
benchmarks/results/samplers-cpu.json and docs/images/samplers.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch

import mezzotint
from common import commit
from mezzotint.cli.demo import SIZE, demo_recipe
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate.features import open_features
from mezzotint.evaluate.metrics import Gaussian, Moments
from mezzotint.models import open_model
from mezzotint.process import samplers
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.settings import SamplingSettings
from mezzotint.train.loop import train

CALLS = (5, 9, 17, 33)  # network calls per image; odd, so that Heun can spend 2 steps - 1 of them


def settings_for(name: str, calls: int) -> SamplingSettings:
    """Return the settings of a sampler for that many network calls."""
    steps = (calls + 1) // 2 if name == "heun" else calls
    return SamplingSettings(sampler=Spec(name), steps=steps, batch=100, exact=False)


def distance(images: torch.Tensor, real: Gaussian) -> float:
    """FD-digits of uint8 images."""
    (features,) = open_features(["digits"])
    return Gaussian.of(Moments.of(features(images))).distance(real)


def real_digits(split: str) -> torch.Tensor:
    """Return the built-in digits, uint8 at the network's size."""
    digits = open_images(f"digits:{split}", size=SIZE, channels=1)
    return digits.batch(range(len(digits)))[0]


def measure(job: SamplingJob, images: int, real: Gaussian) -> dict[str, Any]:
    """One point of the plot."""
    began = time.perf_counter()
    made = job.draw(range(images))
    seconds = time.perf_counter() - began
    return {
        "sampler": job.settings.sampler.name,
        "steps": job.settings.steps,
        "network_calls": job.network_calls,
        "fd_digits": distance(made, real),
        "seconds": round(seconds, 2),
    }


def write(
    args: argparse.Namespace, model: mezzotint.Model, rows: list[dict[str, Any]], floor: float
) -> None:
    """The whole result so far, with what it was made on."""
    facts = {
        "model": f"{model.info.preset} on {SIZE} px digits, {model.info.images} training images",
        "images": args.images,
        "reference": "the 1,500 training digits",
        "fd_digits_of_held_out_digits": floor,
        "grid": "karras for heun, else even in u",
        "labels": "in turn",
        "torch": torch.__version__,
        "mezzotint": mezzotint.__version__,
        "commit": commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
    }
    args.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


def plot(args: argparse.Namespace, rows: list[dict[str, Any]], floor: float) -> None:
    """FD-digits against network calls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4))
    names = sorted({row["sampler"] for row in rows})
    for i, name in enumerate(names):
        mine = sorted((r for r in rows if r["sampler"] == name), key=lambda r: r["network_calls"])
        calls, values = [r["network_calls"] for r in mine], [r["fd_digits"] for r in mine]
        axis.plot(calls, values, marker="osv^D"[i % 5], ms=4, lw=1.2, color=f"C{i}", label=name)
    axis.axhline(floor, color="grey", lw=1, ls=":", label="297 held-out real digits")
    axis.set(
        xscale="log", xlabel="network calls per image", ylabel="FD-digits to the training digits"
    )
    # A sampler that fails at few calls leaves the plot at its top instead of flattening the others.
    least = sorted(row["fd_digits"] for row in rows)
    axis.set_ylim(0, 3 * least[len(least) // 2])
    axis.set_xticks(CALLS, [str(c) for c in CALLS])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=120)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, default=Path("runs/demo"), help="run folder of the demo"
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/samplers-cpu.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/samplers.png"))
    args = parser.parse_args()
    if not (args.run / "model").exists():
        train(demo_recipe(None, 0), args.run)
    model = open_model(args.run)
    (features,) = open_features(["digits"])
    real = Gaussian.of(Moments.of(features(real_digits("train"))))
    floor = distance(real_digits("test"), real)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    done = {(row["sampler"], row["network_calls"]) for row in rows}
    for calls in CALLS:
        for name in samplers.registry:
            job = SamplingJob(
                model=model, settings=settings_for(name, calls), classes=tuple(range(10))
            )
            if (name, job.network_calls) not in done:
                rows.append(measure(job, args.images, real))
                write(args, model, rows, floor)
                print(rows[-1], flush=True)
    assert all(math.isfinite(row["fd_digits"]) for row in rows)
    plot(args, rows, floor)


if __name__ == "__main__":
    main()
