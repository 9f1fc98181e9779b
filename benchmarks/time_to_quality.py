"""Measure distance to real images over core-minutes of training: our families, two public peers.

    OMP_NUM_THREADS=1 python benchmarks/time_to_quality.py eurosat --source eurosat64.zip \\
        --inception inception_2015_to_mixed7a.safetensors --minutes 10 30

Each entrant trains on the same images with one thread. Its clock is the number of images it has
seen over its speed, so other programs, or another processor, do not change it. The speeds are
measured first, in turns: start this on an idle machine. At each of `--minutes` one set of samples
is compared with the same statistics, by the same sampler, steps, seeds and number:

- ours: each family's tiny preset with its recipe, at the size of the data;
- diffusers: UNet2DModel as examples/unconditional_image_generation/train_unconditional.py builds
  and trains it by default, with the averaged weights of its --use_ema;
- lucidrains: Unet(64, (1, 2, 4, 8)) and Trainer of denoising-diffusion-pytorch as its README says,
  where that package can be imported.

The same command resumes, also with more minutes or entrants; `--minutes` without a number measures
speeds alone. Writes OUT.json, OUT.png, which shows distance over core-minutes, and the first
samples of each entrant, at its latest checkpoint, to PICTURES/DATA-ENTRANT.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from common import RESULTS, facts, one_thread
from mezzotint import config
from mezzotint.backbones import get_backbone
from mezzotint.backbones.flops import GIGA, count_macs
from mezzotint.config import Recipe
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.core.registry import Spec
from mezzotint.data.image_dataset import ImageDataset, open_images
from mezzotint.evaluate.evaluate import MetricSettings, evaluate
from mezzotint.evaluate.features import FeatureSet, open_features
from mezzotint.evaluate.image_source import ImageSource, from_dataset, from_job
from mezzotint.evaluate.references import Reference, make_reference, read_reference
from mezzotint.models import create_model, load_model
from mezzotint.process.denoiser import Model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.job import make_job
from mezzotint.train.checkpoint import list_checkpoints
from mezzotint.train.loop import train
from mezzotint.train.validate import eps_mse_by_level

FAMILIES = ("unet-tiny", "uvit-tiny", "sid2-tiny", "diffit-tiny", "dimr-tiny")
PIECE_SECONDS = 120.0  # between checkpoints: the most that a kill costs
PICTURES = Path(__file__).parents[1] / "docs" / "images" / "time-to-quality"
PICTURE_IMAGES = 16
ERROR_IMAGES = 128  # held-out images of the error of the predicted noise
MIN_PIECE = 0.02  # part of the asked minutes that may be missing at the end


@dataclass(frozen=True)
class Data:
    """One data set: its splits as sources of the library, and the size of its images."""

    train: str
    held_out: str
    size: int


def open_data(name: str, source: str) -> Data:
    """Return the splits of a data set by name."""
    size = {"eurosat": 64, "flowers": 64, "cifar10": 32}[name]
    return Data(f"{source}:train", f"{source}:test", size)


@dataclass(frozen=True)
class Judge:
    """The protocol of every evaluation: real images and their features, sampler, sample count."""

    data: Data
    folder: Path
    inception: Path | None
    num_samples: int
    steps: int
    real: int

    def features(self) -> list[FeatureSet]:
        """Open EfficientNet-Lite0, and Inception's deepest features where its weights are given."""
        names = ["efficientnet-lite0", *(["inception-768"] if self.inception else [])]
        return open_features(names, self.inception)

    def images(self, source: str) -> ImageDataset:
        """Open one split at the size of the data."""
        return open_images(source, size=self.data.size, channels=3)

    def reference(self, sets: list[FeatureSet]) -> Reference:
        """Return the statistics and features of `real` training images, made once."""
        path = self.folder / f"train-{self.real}-{len(sets)}.npz"
        if not path.exists():
            images = self.images(self.data.train)
            real = min(self.real, len(images))
            make_reference(from_dataset(images, "training images", real), path, sets, keep=real)
        return read_reference(path)

    def distances(self, source: ImageSource) -> dict[str, float]:
        """Return every metric of one set of images."""
        sets = self.features()
        settings = MetricSettings(subset_size=min(1000, source.num_images // 2))
        result = evaluate(source, self.reference(sets), sets, settings)
        return {number.metric: number.value for number in result.numbers}

    def held_out(self) -> dict[str, float]:
        """Return the metrics of held-out real images, as many as there are samples."""
        images = self.images(self.data.held_out)
        return self.distances(from_dataset(images, "held-out images", self.num_samples))

    def judge(self, model: Model, source: ImageSource, picture: Path) -> dict[str, Any]:
        """Return the metrics of samples, and the mean squared error of the noise by log-SNR.

        picture: PNG file for the first samples.
        """
        errors = eps_mse_by_level(model, self.images(self.data.held_out), count=ERROR_IMAGES)
        first: dict[int, torch.Tensor] = {}  # an evaluation may ask for some twice

        def batches(start: int, stop: int) -> Iterable[torch.Tensor]:
            for images in source.batches(start, stop):
                first.update(enumerate(images[: max(0, PICTURE_IMAGES - start)], start))
                start += len(images)
                yield images

        distances = self.distances(replace(source, batches=batches))
        shown = torch.stack([first[i] for i in sorted(first)])
        save_png(make_grid(shown, columns=PICTURE_IMAGES // 2), picture)
        return {
            "distances": distances,
            "eps_mse": {f"{level:g}": error for level, error in errors.items()},
        }


class Entrant(ABC):
    """A trainer that can train further, and be evaluated.

    first_images: the first piece of a new run, which gives its speed.
    """

    name: str
    folder: Path
    batch: int
    first_images = 32

    def saved_images(self) -> int:
        """Return the images of the newest checkpoint; after a kill the clock may be behind it."""
        return 0

    @abstractmethod
    def advance(self, images: int) -> None:
        """Train until `images` have been seen, and save."""

    @abstractmethod
    def judge(self, judge: Judge, picture: Path) -> dict[str, Any]:
        """Return the metrics of the averaged weights, parameters and GMAC per image."""


class Ours(Entrant):
    """A preset of the library with its recipe; `changes` are fields of it, as key=value."""

    first_images = 512

    def __init__(
        self, preset: str, data: Data, root: Path, changes: tuple[str, ...] = (), name: str = ""
    ):
        self.name, self.data = name or preset, data
        self.folder = root / self.name
        classes = open_images(data.train, size=data.size, channels=3).num_classes
        fields = [f"model.size={data.size}", f"model.num_classes={classes}", "model.channels=3"]
        fields += [f"data.source={data.train!r}", "log_every_images=1024"]
        # Checkpoints only at the end of a piece, and no grids: both would run on the clock.
        fields += ["save.every_images=0", "samples.every_images=0", *changes]
        self.recipe = config.override(recipe_for(preset), fields)
        self.batch = self.recipe.batch

    def saved_images(self) -> int:
        """See `Entrant`."""
        return max((int(path.name) for path in list_checkpoints(self.folder)), default=0)

    def advance(self, images: int) -> None:
        """Train until `images` have been seen, and save."""
        train(
            replace(self.recipe, images=images // self.batch * self.batch), self.folder, quiet=True
        )

    def source(self, judge: Judge, count: int) -> ImageSource:
        """Return samples by DPM-Solver++ 2M, even in log-SNR from -9 to 9, x clipped."""
        levels = Spec("even_logsnr", {"logsnr_min": -9.0, "logsnr_max": 9.0})
        changes = {
            "sampler": Spec("dpmpp_2m"),
            "discretization": levels,
            "steps": judge.steps,
            "clip": Spec("static"),
            "batch": 50,
        }
        return from_job(make_job(self.folder, changes), count)

    def judge(self, judge: Judge, picture: Path) -> dict[str, Any]:
        """Return the metrics of the averaged weights, parameters and GMAC per image."""
        model = load_model(self.folder / "model").eval()
        return {
            "params": sum(p.numel() for p in model.parameters()),
            "gmac_per_image": count_gmac(self.recipe),
            **judge.judge(model, self.source(judge, judge.num_samples), picture),
        }


def count_gmac(recipe: Recipe) -> float:
    """Return the GMAC of one forward pass of one image by a recipe's network."""
    with torch.device("meta"):
        network = get_backbone(create_model(recipe.preset, **recipe.model))
    return count_macs(network).computed / GIGA


def read_clock(folder: Path) -> tuple[int, float]:
    """Return images seen and seconds of training; zeros for a new run."""
    path = folder / "clock.json"
    if not path.exists():
        return 0, 0.0
    clock = json.loads(path.read_text())
    return clock["images"], clock["seconds"]


def check_processor(folder: Path) -> None:
    """Raise ValueError for a run of another processor, whose clock cannot go on here."""
    path, here = folder / "clock.json", facts("cpu")["processor"]
    before = json.loads(path.read_text()).get("processor", here) if path.exists() else here
    if before != here:
        raise ValueError(f"{folder} began on {before}, and this is {here}; give other --runs")


def write_clock(folder: Path, images: int, seconds: float) -> None:
    """Write what `read_clock` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = {"images": images, "seconds": seconds, "processor": facts("cpu")["processor"]}
    temporary = folder / "clock.json.tmp"
    temporary.write_text(json.dumps(clock))
    os.replace(temporary, folder / "clock.json")


def train_for(
    entrant: Entrant, seconds: float, most_images: int | None = None
) -> tuple[int, float]:
    """Train until the clock shows `seconds`, or `most_images` are seen; return both counts.

    It trains in pieces that end with a checkpoint. An interruption counts the time of its piece.
    """
    if math.isfinite(seconds):
        check_processor(entrant.folder)
    images, spent = read_clock(entrant.folder)
    most = float("inf") if most_images is None else most_images
    while spent < seconds * (1 - MIN_PIECE) and images < most:
        rest = min(PIECE_SECONDS, seconds - spent)
        more = int(images / spent * rest) if images else entrant.first_images
        target = images + max(entrant.batch, more // entrant.batch * entrant.batch)
        target = max(int(min(target, most)), entrant.saved_images())
        started = time.process_time()
        try:
            entrant.advance(target)
        except BaseException:
            write_clock(entrant.folder, images, spent + time.process_time() - started)
            raise
        images, spent = target, spent + time.process_time() - started
        write_clock(entrant.folder, images, spent)
    return images, spent


def open_entrants(names: list[str], data: Data, root: Path) -> list[Entrant]:
    """Return the entrants by name."""
    from public_trainers import Diffusers, Lucidrains

    peers: dict[str, Callable[[Data, Path], Entrant]] = {
        Diffusers.name: Diffusers,
        Lucidrains.name: Lucidrains,
    }
    return [peers[n](data, root) if n in peers else Ours(n, data, root) for n in names]


def find_peers() -> list[str]:
    """Return the peers whose packages can be imported."""
    packages = {"diffusers": "diffusers", "lucidrains": "denoising_diffusion_pytorch"}
    return [name for name, package in packages.items() if find_spec(package)]


def check_settings(done: dict[str, Any], settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError where the rows of a file were measured with other settings."""
    other = [f"{k}: {done[k]!r}" for k, value in settings.items() if done.get(k, value) != value]
    if other:
        raise ValueError(
            f"{path} was measured with {'; '.join(other)}; give these, or another --out"
        )


def measure_speeds(
    entrants: list[Entrant], rounds: int = 3, seconds: float = 10.0
) -> dict[str, list[float]]:
    """Return images per second of processor time in training, one number per round, by entrant.

    Each round trains every entrant in turn: for one batch, then for about `seconds` more than that.
    The difference has no start and no save in it. It leaves checkpoints in the entrants' folders.
    """
    seen = {entrant.name: 0 for entrant in entrants}

    def time_batches(entrant: Entrant, batches: int) -> float:
        seen[entrant.name] += batches * entrant.batch
        started = time.process_time()
        entrant.advance(seen[entrant.name])
        return time.process_time() - started

    batches: dict[str, int] = {}
    for entrant in entrants:
        time_batches(entrant, 1)  # it may prepare its data once
        more, first = 1, time_batches(entrant, 1)
        while (spent := time_batches(entrant, 1 + more) - first) < seconds / 4:
            more *= 2
        batches[entrant.name] = max(1, round(more * seconds / spent))
    speeds: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for _ in range(rounds):
        for entrant in entrants:
            more, first = batches[entrant.name], time_batches(entrant, 1)
            spent = time_batches(entrant, 1 + more) - first
            speeds[entrant.name].append(more * entrant.batch / spent)
    return speeds


def count_images(entrant: Entrant, minutes: float, speeds: dict[str, Any]) -> int:
    """Return the images that an entrant sees in `minutes` at its speed, whole batches."""
    images = 60 * minutes * median(speeds[entrant.name]["images_per_second"])
    return max(1, round(images / entrant.batch)) * entrant.batch


def core_minutes(row: dict[str, Any], speeds: dict[str, Any]) -> float:
    """Return the core-minutes of a row's images at its entrant's speed."""
    return row["images"] / median(speeds[row["entrant"]]["images_per_second"]) / 60


def find_processor(speeds: dict[str, Any]) -> str:
    """Return the processor of all speeds."""
    (processor,) = {speed["processor"] for speed in speeds.values()}
    return processor


Curve = list[tuple[float, float]]  # (core-minutes, distance), by time


def curves(rows: list[dict[str, Any]], speeds: dict[str, Any], metric: str) -> dict[str, Curve]:
    """Return distance over core-minutes by entrant, in alphabetical order."""
    found: dict[str, Curve] = {}
    for row in rows:
        point = core_minutes(row, speeds), row["distances"][metric]
        found.setdefault(row["entrant"], []).append(point)
    return {entrant: sorted(curve) for entrant, curve in sorted(found.items())}


def minutes_to(curve: Curve, value: float) -> str:
    """Return the core-minutes after which a distance is at most `value`; "–" if never.

    "≤" where the first point is below. Between points the interpolation is linear in log distance
    and log minutes.
    """
    before: tuple[float, float] | None = None
    for minutes, distance in curve:
        if distance <= value:
            if before is None:
                return f"≤ {minutes:.1f}"
            share = math.log(before[1] / value) / math.log(before[1] / distance)
            return f"{before[0] * (minutes / before[0]) ** share:.1f}"
        before = minutes, distance
    return "–"


def tabulate_minutes(rows: list[dict[str, Any]], speeds: dict[str, Any], metric: str) -> str:
    """Return the core-minutes to each distance as Markdown, one row per entrant.

    The distances are those among the rows' of series R20 (ISO 3: twenty a decade, two digits).
    """
    found = [r["distances"][metric] for r in rows]
    first, last = math.log10(min(found)), math.log10(max(found))
    steps = reversed(range(math.ceil(20 * first), math.floor(20 * last) + 1))
    values = [float(f"{10 ** (step / 20):.2g}") for step in steps]
    lines = [
        f"| entrant | {' | '.join(f'{value:g}' for value in values)} |",
        f"| --- |{' ---: |' * len(values)}",
    ]
    for entrant, curve in curves(rows, speeds, metric).items():
        cells = [minutes_to(curve, value) for value in values]
        lines.append(f"| `{entrant}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(
    rows: list[dict[str, Any]],
    speeds: dict[str, Any],
    held_out: dict[str, float],
    metric: str,
    path: Path,
) -> None:
    """Draw distance over core-minutes, one line per entrant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4))
    for entrant, curve in curves(rows, speeds, metric).items():
        axis.plot(*zip(*curve, strict=True), marker="o", label=entrant)
    axis.axhline(held_out[metric], color="grey", linestyle=":", label="held-out real images")
    label = f"core-minutes of training, {find_processor(speeds)}"
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel=metric)
    for numbers in (axis.xaxis, axis.yaxis):
        numbers.set_major_formatter("{x:g}")
        numbers.set_minor_formatter("{x:g}")
        numbers.set_tick_params(which="both", labelsize=7)
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower left", edgecolor="none", framealpha=1, fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=("eurosat", "cifar10", "flowers"))
    parser.add_argument("--source", required=True, help="of the data, without its split")
    parser.add_argument("--entrants", nargs="+", default=[*FAMILIES, *find_peers()])
    parser.add_argument("--minutes", nargs="*", type=float, default=[10, 30, 60, 120])
    parser.add_argument("--inception", type=Path, help="weights, for its deepest tap too")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--real", type=int, default=2000, help="training images of the reference")
    parser.add_argument("--runs", type=Path, default=Path("runs/time-to-quality"))
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    one_thread()
    data = open_data(args.data, args.source)
    root = args.runs / args.data
    root.mkdir(parents=True, exist_ok=True)
    judge = Judge(data, root, args.inception, args.samples, args.steps, args.real)
    out = args.out or RESULTS / f"time-to-quality-{args.data}"
    path = out.with_suffix(".json")
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    settings = {
        "data": f"{Path(args.source).name}, {data.size} px",
        "samples": args.samples,
        "sampler": f"dpmpp_2m, {args.steps} steps even in log-SNR -9 ... 9, x clipped",
        "reference": f"{args.real} training images",
    }
    check_settings(done, settings, path)
    content = {**settings, **done}
    speeds = content.setdefault("speeds", {})
    missing = [name for name in args.entrants if name not in speeds]
    if missing:
        here = facts("cpu")
        if speeds and find_processor(speeds) != here["processor"]:
            raise ValueError(
                f"{path} has speeds of {find_processor(speeds)}, and this is {here['processor']}; "
                f"give --entrants without {', '.join(missing)}, or another --out"
            )
        with TemporaryDirectory(dir=args.runs) as folder:
            found = measure_speeds(open_entrants(missing, data, Path(folder)))
        for name, measured in found.items():
            speeds[name] = {"images_per_second": measured, **here}
        path.write_text(json.dumps(content, indent=1) + "\n")
        print("images per second:", found, flush=True)
    if "held_out" not in content:
        content["held_out"] = judge.held_out()
    rows: list[dict[str, Any]] = content.setdefault("rows", [])
    for minutes in sorted(args.minutes):
        for entrant in open_entrants(args.entrants, data, root):
            target = count_images(entrant, minutes, speeds)
            if any(r["entrant"] == entrant.name and r["images"] == target for r in rows):
                continue
            seen, _ = read_clock(entrant.folder)
            if seen > target:
                raise ValueError(f"{entrant.folder} has seen {seen} images, not {target}; move it")
            images, _ = train_for(entrant, float("inf"), most_images=target)
            picture = args.pictures / f"{args.data}-{entrant.name}.png"
            row = {"entrant": entrant.name, "images": images}
            rows.append({**row, **facts("cpu"), **entrant.judge(judge, picture)})
            path.write_text(json.dumps(content, indent=1) + "\n")
            print(entrant.name, f"{minutes:g} min", images, rows[-1]["distances"], flush=True)
    metric = "FD-EfficientNet-Lite0"
    if rows:
        plot(rows, speeds, content["held_out"], metric, out.with_suffix(".png"))
        print(tabulate_minutes(rows, speeds, metric))


if __name__ == "__main__":
    main()
