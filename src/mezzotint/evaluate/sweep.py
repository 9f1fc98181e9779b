"""A sweep of the guidance scale: two metrics of the same seeds at each, as one curve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.backbones import needs_label
from mezzotint.core.files import write_json
from mezzotint.core.registry import suggest
from mezzotint.core.svg_plot import Line, save_plot
from mezzotint.evaluate.clip import Clip
from mezzotint.evaluate.clip_score import metric_name
from mezzotint.evaluate.evaluate import LOGITS, SPATIAL, evaluate, inception_score_name
from mezzotint.evaluate.features import FeatureSet
from mezzotint.evaluate.image_source import from_job
from mezzotint.evaluate.references import Reference
from mezzotint.evaluate.results import Evaluation
from mezzotint.sampling.job import SamplingJob, check_sampler
from mezzotint.sampling.settings import Guidance

FORMAT = 1
KEYS = ("guidance",)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What was measured at each guidance scale.

    x, y: names of the metrics. convention: of the scales, see `Guidance`.
    points: (scale, evaluation), in the order given.
    """

    x: str
    y: str
    convention: str
    points: tuple[tuple[float, Evaluation], ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: for each scale both numbers, and its whole evaluation."""
        points = [
            {
                "guidance": scale,
                "x": evaluation[self.x].value,
                "y": evaluation[self.y].value,
                "y_error": evaluation[self.y].error,
                "evaluation": evaluation.to_json(),
            }
            for scale, evaluation in self.points
        ]
        names = {"x": self.x, "y": self.y, "convention": self.convention}
        return {"mezzotint_sweep": FORMAT, **names, "points": points}

    def save(self, path: Path) -> None:
        """Write `to_json` atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())

    def draw(self, path: Path) -> None:
        """Write y over x, a point for each scale with the scale beside it, as .svg or .png."""
        x, y = ([e[name].value for _, e in self.points] for name in (self.x, self.y))
        labels = [f"{scale:g}" for scale, _ in self.points]
        save_plot(path, [Line(x, y, style="o-", labels=labels)], self.x, self.y)


def parse_sweep(text: str) -> tuple[float, ...]:
    """Parse "guidance=1,1.5,2" to scales.

    Errors: ValueError for another key, no value, one that is no number or there twice.
    """
    key, equals, values = text.partition("=")
    if not equals or key.strip() not in KEYS:
        what = f"{suggest(key.strip(), KEYS)}; " if equals else ""
        raise ValueError(f"--sweep {text!r}: {what}write --sweep guidance=1,1.5,2,3,4,6")
    scales: list[float] = []
    for value in values.split(","):
        try:
            scale = float(value)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ValueError(
                f"--sweep {text!r}: {value.strip() or 'an empty value'} is no guidance scale; "
                "write numbers with commas between them, e.g. guidance=1,1.5,2,3,4,6"
            )
        if scale in scales:
            raise ValueError(f"--sweep {text!r} has {scale:g} twice; leave one out")
        scales.append(scale)
    return tuple(scales)


def sweep_jobs(job: SamplingJob, scales: Sequence[float]) -> dict[float, SamplingJob]:
    """Return the job of each scale; all else, such as a guidance interval, is the job's own.

    Errors: ValueError for a model that cannot be guided, and for a scale below the unconditional
        model's (0 as DiT counts it), which guides away from the condition.
    """
    model = job.model
    guidable = (
        job.guide_model or job.prompts or (job.classes and not needs_label(model.info.config))
    )
    if not guidable:
        raise ValueError(
            "this model cannot be guided as it is: --sweep guidance needs prompts (--prompts "
            "FILE), or classes and a null label"
        )
    base = job.settings.guidance or Guidance(scale=1.0)
    jobs = {}
    for scale in scales:
        guidance = dataclasses.replace(base, scale=scale)
        if guidance.peak < 0:
            least = scale - guidance.peak  # every convention counts in steps of one
            raise ValueError(
                f"--sweep guidance {scale:g} is below {least:g}, the unconditional model in the "
                f"convention {base.convention!r}; give {least:g} or more"
            )
        settings = dataclasses.replace(job.settings, guidance=guidance)
        jobs[scale] = dataclasses.replace(job, settings=settings)
        check_sampler(jobs[scale])
    return jobs


def choose_axes(
    reference: Reference, sets: Sequence[FeatureSet], clips: Sequence[Clip]
) -> tuple[str, str]:
    """Return the names of the metrics on x and y.

    x is the Fréchet distance of the first set with statistics (FID where it has that name). y is
    the CLIP score; without a CLIP model the Inception Score, or else the precision.

    Errors: ValueError where there are none of these.
    """
    of_images = [s for s in sets if s.name != LOGITS and s.name.partition(":")[0] != SPATIAL]
    distances = [s.distance_name for s in of_images if s.name in reference.statistics]
    if not distances:
        raise ValueError(
            f"{reference.name} has no statistics of {', '.join(s.name for s in sets)}; --sweep "
            "draws a Fréchet distance"
        )
    if clips:
        return distances[0], metric_name(clips[0])
    if logits := next((s for s in sets if s.name == LOGITS), None):
        return distances[0], inception_score_name(logits)
    kept = [s for s in of_images if s.name in reference.features]
    if not kept:
        raise ValueError(
            f"--sweep has nothing to draw over {distances[0]}: add --clip, the features "
            f"{LOGITS}, or a reference that keeps features (mezzotint reference)"
        )
    suffix = "" if kept[0].distance_name == "FID" else f" ({kept[0].name})"
    return distances[0], f"precision{suffix}"


def run_sweep(
    jobs: dict[float, SamplingJob],
    num_images: int,
    reference: Reference,
    sets: Sequence[FeatureSet],
    *,
    clips: Sequence[Clip] = (),
    folder: str | Path | None = None,
    say: Callable[[str], None] = print,
    show: bool = False,
) -> Sweep:
    """Evaluate the same seeds at each scale; the same on all ranks, which call this together.

    Args:
        jobs: of `sweep_jobs`.
        folder: for finished pieces of each scale, to resume an interrupted sweep.
        say: receives a line for each finished point. show: show progress.

    Errors: ValueError as `choose_axes` and `evaluate`, before anything is drawn.
    """
    x, y = choose_axes(reference, sets, clips)
    points = []
    for scale, job in jobs.items():
        source = from_job(job, num_images)
        found = evaluate(source, reference, sets, clips=clips, folder=folder, show=show)
        points.append((scale, found))
        say(f"guidance {scale:g}: {x} {found[x].value:.4g}, {y} {found[y].value:.4g}")
    convention = next(j.settings.guidance.convention for j in jobs.values() if j.settings.guidance)
    return Sweep(x=x, y=y, convention=convention, points=tuple(points))
