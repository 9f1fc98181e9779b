"""Measure samples of 1, 2 and 4 steps after consistency tuning beside the teacher's many.

    OMP_NUM_THREADS=1 python benchmarks/few_steps.py runs/eurosat-64 --source eurosat64.zip \\
        --minutes 5 20

The teacher is a trained model of a tiny or small preset. Its recipe `-few-steps` tunes it on the
same images; the clock is the processor time of the tuning, one thread. At each of `--minutes` its
samples are compared with real images, and once those of the teacher: by ddim, and by the few steps
themselves, from the same seeds. The same command resumes, also with more minutes or calls. Writes
results/few-steps-eurosat.json and PICTURE: a row for each number of steps, then of the teacher's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, facts, one_thread
from mezzotint.config import Recipe
from mezzotint.convert.adapt import initialise_from
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.core.registry import Spec
from mezzotint.evaluate.image_source import from_job
from mezzotint.models import ModelInfo, open_model, preset_info
from mezzotint.recipes import recipe_for
from mezzotint.sampling.job import SamplingJob, make_job
from mezzotint.train.loop import train
from time_to_quality import Data, Judge, Ours, open_data, train_for

STEPS = (1, 2, 4)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "few-steps.png"
PICTURE_COLUMNS = 10


def tuning_recipe(teacher: ModelInfo) -> Recipe:
    """Return the recipe that tunes a teacher, with the fields that its network changed."""
    assert teacher.preset, "a preset's network"
    usual = dataclasses.asdict(preset_info(teacher.preset).config)
    own = dataclasses.asdict(teacher.config)
    recipe = recipe_for(f"{teacher.preset}-few-steps")
    changed = {name: value for name, value in own.items() if value != usual[name]}
    return dataclasses.replace(recipe, model={**changed, **recipe.model})


class Tuned(Ours):
    """The teacher, tuned by its recipe; `changes` are fields of it, as key=value."""

    def __init__(self, teacher: Path, data: Data, root: Path, changes: tuple[str, ...]):
        info = open_model(teacher).info
        super().__init__(f"{info.preset}-few-steps", data, root, changes, "tuned")
        self.teacher = teacher
        model = {**tuning_recipe(info).model, **self.recipe.model}
        self.recipe = dataclasses.replace(self.recipe, model=model)

    def advance(self, images: int) -> None:
        """Train until `images` have been seen, and save."""
        recipe = dataclasses.replace(self.recipe, images=images // self.batch * self.batch)
        start = initialise_from(str(self.teacher), say=lambda line: None)
        train(recipe, self.folder, quiet=True, init_weights=start)


def few_step_job(model: Path, sampler: str, steps: int) -> SamplingJob:
    """Return the job of one row: x clipped, no guidance, the model's own discretization."""
    changes = {
        "sampler": Spec(sampler),
        "steps": steps,
        "clip": Spec("static"),
        "batch": 50,
        "exact": False,  # whole batches are a quarter faster
    }
    return make_job(model, changes)


def first_images(job: SamplingJob) -> torch.Tensor:
    """Return the images of the first seeds, which cost little beside a row's."""
    return job.draw(range(PICTURE_COLUMNS))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="run or model folder")
    parser.add_argument("changes", nargs="*", help="fields of the recipe, key=value")
    parser.add_argument("--source", required=True, help="of the data, without its split")
    parser.add_argument("--minutes", nargs="+", type=float, default=[5, 20])
    parser.add_argument("--calls", nargs="+", type=int, default=[10, 25, 50, 250])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--real", type=int, default=1000, help="training images of the reference")
    parser.add_argument("--runs", type=Path, default=Path("runs/few-steps"))
    parser.add_argument("--out", type=Path, default=RESULTS / "few-steps-eurosat.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    one_thread()
    data = open_data("eurosat", args.source)
    args.runs.mkdir(parents=True, exist_ok=True)
    teacher = open_model(args.teacher).info
    judge = Judge(data, args.runs, None, args.samples, 0, args.real)
    tuned = Tuned(args.teacher, data, args.runs, tuple(args.changes))
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows: list[dict[str, Any]] = done.get("rows", [])
    held_out: dict[str, float] = done.get("held_out") or judge.held_out()

    def measure(model: Path, sampler: str, steps: int, asked: float, **made: Any) -> None:
        key = {"sampler": sampler, "steps": steps, "asked_minutes": asked}
        if any(key.items() <= row.items() for row in rows):
            return
        job = few_step_job(model, sampler, steps)
        distances = judge.distances(from_job(job, args.samples))
        made |= {"calls": job.network_calls, "distances": distances}
        rows.append({**key, **facts("cpu"), **made})
        content = {
            "data": f"{Path(args.source).name}, {data.size} px",
            "teacher": f"`{teacher.preset}`, {teacher.images:,} images",
            "changes": args.changes,
            "samples": args.samples,
            "reference": f"{args.real} training images",
            "held_out": held_out,
            "rows": rows,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        print(key, distances, flush=True)

    for minutes in sorted(args.minutes):
        images, seconds = train_for(tuned, 60 * minutes)
        if seconds < 60 * minutes * 1.1:  # else a resumed run is past these minutes
            for steps in STEPS:
                made = {"minutes": seconds / 60, "images": images}
                measure(tuned.folder, "consistency", steps, minutes, **made)
    for steps in STEPS:  # what the tuning has to beat
        measure(args.teacher, "consistency", steps, 0)
    for calls in args.calls:
        measure(args.teacher, "ddim", calls, 0)
    jobs = [few_step_job(tuned.folder, "consistency", steps) for steps in STEPS]
    jobs += [few_step_job(args.teacher, "ddim", calls) for calls in args.calls]
    shown = torch.cat([first_images(job) for job in jobs])
    save_png(make_grid(shown, columns=PICTURE_COLUMNS), args.picture)


if __name__ == "__main__":
    main()
