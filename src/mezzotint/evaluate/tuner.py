"""What `evaluate.tune` tunes and how it measures a candidate; the checks before it begins."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from mezzotint.backbones import native_size, needs_label
from mezzotint.core.boxed import boxed_folder
from mezzotint.core.distributed import default_device
from mezzotint.core.fields import MOST_SEED, Checked, Range
from mezzotint.core.files import sha256_of_file
from mezzotint.evaluate.evaluate import check_reference
from mezzotint.evaluate.extract import extract_features
from mezzotint.evaluate.features import FeatureSet
from mezzotint.evaluate.image_source import from_job, repeat_grey
from mezzotint.evaluate.kid import KernelDistance
from mezzotint.evaluate.metrics import Gaussian, distance_of_rows
from mezzotint.evaluate.references import Reference
from mezzotint.evaluate.search import Candidate, Space
from mezzotint.models import CONFIG, WEIGHTS
from mezzotint.process.denoiser import Model
from mezzotint.sampling.job import SamplingJob, make_job
from mezzotint.sampling.parse import parse_sampler
from mezzotint.sampling.sample import count_network_calls, make_logsnr_steps
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.sampling.tuned import OPEN_END
from mezzotint.train.posthoc_ema import list_snapshots, reconstruct_model

METRICS = ("fd", "kid")
# Our choices: the search may use two thirds of the calls and plans 8 candidates an axis; the last
# comparison takes the rest, for the default and the two best of the search.
SEARCH_SHARE, TRIALS_PER_AXIS, FINALISTS = 2 / 3, 8, 2
FEWEST_IMAGES = 32  # of a candidate; with fewer images no distance tells anything


@dataclass(frozen=True, kw_only=True)
class TuneSettings(Checked):
    """How to tune.

    calls: network calls of the whole search; a guided step calls the network twice for an image.
    metric: "fd", the Fréchet distance, or "kid", the Kernel Inception Distance, which has no bias
        from few images; None takes kid where the reference keeps features, else fd.
    sampler, steps: of every candidate. batch: images per network call.
    seed: of the first image. By default far from those that `sample` and `evaluate` begin with, so
        that an evaluation is on images that the search has not seen.
    prompts: for a model with text conditioning, taken in turn. encoder: folder of the text encoder.
    resamples: of the 95 % intervals of the last comparison, 0 for none.
    """

    calls: Annotated[int, Range(1, 10**15, "network calls")]
    metric: str | None = None
    sampler: str = "ddim"
    steps: Annotated[int, Range(1, 10_000)] = 50
    batch: Annotated[int, Range(1, 1_000_000, "images at a time")] = 64
    seed: Annotated[int, Range(0, MOST_SEED)] = 1_000_000
    prompts: tuple[str, ...] = ()
    encoder: str | None = None
    resamples: Annotated[int, Range(0, 100_000)] = 100

    def __post_init__(self):
        super().__post_init__()
        if self.metric not in (None, *METRICS):
            raise ValueError(f"unknown metric {self.metric!r}; choose fd or kid")
        if 0 < self.resamples < 20:
            raise ValueError(f"resamples {self.resamples}: give at least 20, or 0 for no interval")


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """What is tuned and how it is measured.

    folder: run or model folder. job: the default, without guidance. logsnr_steps: of its sampler.
    ema_images: images seen at the end of a post-hoc average; 0 for a model without snapshots.
    """

    folder: Path
    is_run: bool
    job: SamplingJob
    space: Space
    logsnr_steps: Tensor
    ema_images: int
    reference: Reference
    feature_set: FeatureSet
    metric: str
    settings: TuneSettings

    @property
    def metric_name(self) -> str:
        """The distance as `evaluate` prints it."""
        s = self.feature_set
        if self.metric == "fd":
            return s.distance_name
        return "KID" if s.distance_name == "FID" else f"KID ({s.name})"

    @property
    def model_folder(self) -> Path:
        """Return the folder whose weights are tuned."""
        return self.folder / "model" if self.is_run else self.folder

    def arguments(self) -> dict[str, Any]:
        """Return what decides every number of a search, as JSON values; not the batch."""
        settings = dataclasses.asdict(self.settings)
        del settings["batch"]
        return {
            **settings,
            "prompts": list(self.settings.prompts),
            "metric": self.metric_name,
            "model": sha256_of_file(self.model_folder / WEIGHTS),
            "snapshots": [s.path.name for s in list_snapshots(self.folder)] if self.is_run else [],
            "reference": self.reference.hash,
            "features": self.feature_set.hash,
        }

    def guidance(self, candidate: Candidate) -> Guidance | None:
        """Return a candidate's guidance; its ends lie between two steps, on multiples of 0.1."""
        if candidate.scale == 1:
            return None
        if (candidate.first, candidate.last) == (0, 1):
            return Guidance(scale=candidate.scale)
        points, last = self.logsnr_steps, len(self.logsnr_steps) - 1
        begin, end = round(candidate.first * last), round(candidate.last * last)

        def between(i: int) -> float:
            a, b = points[i - 1].item(), points[i].item()
            return round((a + b) / 2 if math.isfinite(b) else a + 1, 1)

        low = between(begin) if begin > 0 else min(-OPEN_END, math.floor(points[0].item()))
        high = between(end) if end < last else max(OPEN_END, math.ceil(points[-2].item()))
        return Guidance(scale=candidate.scale, low=low, high=high)

    def settings_of(self, candidate: Candidate) -> SamplingSettings:
        """Return a candidate's sampling settings."""
        return dataclasses.replace(self.job.settings, guidance=self.guidance(candidate))

    def calls(self, candidate: Candidate) -> int:
        """Return a candidate's network calls for an image."""
        return count_network_calls(self.job.model, self.settings_of(candidate))

    @property
    def dearest(self) -> int:
        """The most network calls for an image of any candidate."""
        return self.calls(Candidate(scale=1.5) if self.space.guided else Candidate())

    @property
    def search_images(self) -> int:
        """Images of each candidate of the search."""
        share = SEARCH_SHARE * self.settings.calls
        fitting = share / (TRIALS_PER_AXIS * self.space.axes * self.dearest)
        return max(FEWEST_IMAGES, int(fitting))

    def job_of(self, candidate: Candidate, images: int) -> SamplingJob:
        """Return a candidate's sampling job.

        Labels are in turn. They are random for fewer images than classes, which would leave out
        the last, and for kid: an unbiased estimate needs independent images.
        """
        model = self.job.model
        if candidate.width is not None:
            model = _averaged_model(self.folder, candidate.width, self.ema_images)
        in_turn = self.metric == "fd" and images >= len(self.job.classes)
        order = "turn" if in_turn else "random"
        settings = self.settings_of(candidate)
        return dataclasses.replace(self.job, model=model, settings=settings, label_order=order)

    def rows(
        self, candidate: Candidate, first_seed: int, images: int, folder: Path | None
    ) -> Tensor | None:
        """Return features of a candidate's samples, (images, d) on rank 0 and None elsewhere."""
        source = from_job(self.job_of(candidate, images), images, first_seed)
        source = repeat_grey(source, self.feature_set.channels)
        features = extract_features(source, [self.feature_set], folder)
        return None if features is None else features[self.feature_set.name]

    def statistic(self, rows: Tensor) -> Callable[[Tensor], float]:
        """Return the distance of chosen rows to the reference: a function of their indices."""
        if self.metric == "kid":
            return self.real_kernel.statistic(rows)
        return lambda chosen: distance_of_rows(rows[chosen], self.real)

    @functools.cached_property
    def real(self) -> Gaussian:
        """The reference's Gaussian, with its root."""
        return self.reference.statistics[self.feature_set.name].gaussian()

    @functools.cached_property
    def real_kernel(self) -> KernelDistance:
        """The reference's features, with their own part of the distance."""
        return KernelDistance(self.reference.features[self.feature_set.name])

    def describe(self) -> list[str]:
        """Return what the search will do, for the user."""
        axes = [*(["guidance scale and interval"] if self.space.guided else [])]
        axes += ["EMA width"] if self.space.widths else []
        first, n = self.settings.seed, self.search_images
        lines = [
            f"tuning {' and '.join(axes)} of {self.folder} by {self.metric_name}: {n:,} images for "
            f"each candidate, seeds {first:,} to {first + n - 1:,}, "
            f"{self.settings.sampler}, {self.settings.steps} steps"
        ]
        if self.metric == "fd" and n <= self.feature_set.dims:
            lines.append(
                f"! {n:,} images in {self.feature_set.dims:,} dimensions: the distances are much "
                "larger than for many images; --metric kid has no such bias"
            )
        return lines


@functools.lru_cache(maxsize=1)
def _averaged_model(run: Path, width: float, images: int) -> Model:
    model, _ = reconstruct_model(run, width, images)
    return model.eval().requires_grad_(False).to(default_device())


def open_tuner(
    folder: Path,
    reference: Reference,
    feature_set: FeatureSet,
    settings: TuneSettings,
) -> Tuner:
    """Return the tuner of a run or model folder; ValueError for what cannot be tuned so."""
    is_run = (folder / "model").exists() or (folder / "recipe.yaml").exists()
    model_folder = folder / "model" if is_run else folder
    if not (model_folder / CONFIG).is_file():
        if boxed := boxed_folder(folder):
            raise ValueError(
                f"{folder} is a model in the box, which stays as it is; copy {boxed} and tune the "
                "copy"
            )
        what = "a run without a saved model yet" if is_run else "no run folder and no model folder"
        raise ValueError(f"{folder} is {what}; tune writes the settings into such a folder")
    plain = {
        "sampler": parse_sampler(settings.sampler),
        "steps": settings.steps,
        "batch": settings.batch,
        "guidance": None,
    }
    job = make_job(model_folder, plain, prompts=settings.prompts, encoder=settings.encoder)
    job = dataclasses.replace(job, tuned=None, tuned_fields=())
    space, ema_images = _find_space(folder, is_run, job)
    metric = _choose_metric(settings.metric, reference, feature_set)
    _check_fits(job, reference, feature_set)
    tuner = Tuner(
        folder=folder,
        is_run=is_run,
        job=job,
        space=space,
        logsnr_steps=make_logsnr_steps(job.model, job.settings),
        ema_images=ema_images,
        reference=reference,
        feature_set=feature_set,
        metric=metric,
        settings=settings,
    )
    fewest = FEWEST_IMAGES * (tuner.calls(Candidate()) + FINALISTS * tuner.dearest)
    needed = math.ceil(fewest / min(SEARCH_SHARE, 1 - SEARCH_SHARE))
    if settings.calls < needed:
        raise ValueError(
            f"--calls {settings.calls:,} is too few: {FEWEST_IMAGES} images of the default and of "
            f"two candidates, twice, need {needed:,} with {settings.steps} steps; give more, or "
            "fewer --steps"
        )
    return tuner


def _find_space(folder: Path, is_run: bool, job: SamplingJob) -> tuple[Space, int]:
    """Return what can be tuned, and the images at which post-hoc averages end."""
    info = job.model.info
    snapshots = [s for s in list_snapshots(folder) if s.images <= info.images] if is_run else []
    widths = tuple(sorted({s.std for s in snapshots}))
    reads_text = "text" in info.extra
    guided = bool(job.prompts) or (bool(job.classes) and not needs_label(info.config))
    if not guided and not widths:
        why = "it is unconditional, so that nothing can be guided"
        if reads_text:
            why = "its guidance needs prompts (--prompts FILE)"
        elif job.classes:
            why = "it has no null label, so that nothing can be guided"
        snapshots_why = "no EMA snapshots (ema.power_stds in training)" if is_run else "no run"
        raise ValueError(f"{folder} has nothing to tune: {why}, and there is {snapshots_why}")
    space = Space(guided=guided, widths=widths, steps=job.settings.steps)
    return space, snapshots[-1].images if snapshots else 0


def _choose_metric(name: str | None, reference: Reference, feature_set: FeatureSet) -> str:
    """Return "fd" or "kid"; ValueError where the reference lacks what it needs."""
    has = {
        "fd": feature_set.name in reference.statistics,
        "kid": feature_set.name in reference.features,
    }
    if name is None:
        return "kid" if has["kid"] else "fd"
    if not has[name]:
        what = "statistics" if name == "fd" else "features of single images"
        raise ValueError(
            f"{reference.name} holds no {what} of {feature_set.name!r}, which --metric {name} "
            "needs; make it with mezzotint reference, or choose the other metric"
        )
    return name


def _check_fits(job: SamplingJob, reference: Reference, feature_set: FeatureSet) -> None:
    """Raise ValueError for a reference of another size or of other features."""
    config = job.model.info.config
    if job.decoder is None:
        raise ValueError("latents cannot be evaluated; this model needs its autoencoder")
    channels = config.channels if job.codec == "pixels" else 3
    if feature_set.channels < channels:
        raise ValueError(
            f"features {feature_set.name!r} need images of {feature_set.channels} channels, this "
            f"model generates {channels}; choose other --features"
        )
    height, width = (side * job.decoder.factor for side in native_size(config))
    check_reference([feature_set], reference, (height, width))
