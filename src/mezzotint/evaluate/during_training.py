"""Evaluate samples of the averaged weights during training.

Training takes the evaluator as a function, since `train` does not import `evaluate`.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.backbones import text_width
from mezzotint.config import Evaluate, Recipe
from mezzotint.core.distributed import all_ranks, get_rank, on_rank0
from mezzotint.evaluate.evaluate import check_reference, evaluate, make_protocol
from mezzotint.evaluate.features import FeatureSet, open_features
from mezzotint.evaluate.image_source import ImageSource, from_job, repeat_grey
from mezzotint.evaluate.references import Reference, read_reference
from mezzotint.evaluate.results import Evaluation, load_evaluation
from mezzotint.models import build_model, preset_info
from mezzotint.process.denoiser import Model
from mezzotint.sampling import parse
from mezzotint.sampling.conditioning import read_prompts
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.sample import count_network_calls
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.train.evaluation import Evaluator


def make_evaluator(recipe: Recipe, sets: Sequence[FeatureSet] | None = None) -> Evaluator | None:
    """Return the evaluator of the recipe's `evaluate` settings; None if `every_images` is 0.

    It writes evaluations/IMAGES.json, unless that file exists already for the same weights and
    protocol. evaluations/IMAGES.pieces holds features of an evaluation in progress.

    Args:
        sets: feature sets in place of those that the recipe names, e.g. of `features.from_module`.

    Errors: ValueError for what can be known before training to fail at the first evaluation.
    """
    settings = recipe.evaluate
    if not settings.every_images:
        return None
    reference = _check_settings(recipe, sets)

    def evaluate_model(
        model: Model, folder: Path, stopping: Callable[[], bool]
    ) -> dict[str, float]:
        path = folder / f"{model.info.images}.json"
        pieces = path.with_suffix(".pieces")

        def prepare() -> tuple[list[FeatureSet], ImageSource]:
            opened = sets
            if opened is None:
                device = next(model.parameters()).device
                opened = open_features(settings.features, settings.weights, device)
            source = repeat_grey(_sample_source(settings, model), opened[0].channels)
            return list(opened), _stop_early(source, stopping)

        opened, source = all_ranks(prepare)
        evaluation = on_rank0(lambda: _load_finished(path, pieces, source, opened, reference))
        if evaluation is None:
            try:
                evaluation = evaluate(source, reference, opened, folder=pieces)
            except Exception:
                # Pieces are kept only for a run that stops: a run that goes on has other weights at
                # its next evaluation.
                if get_rank() == 0 and not stopping():
                    shutil.rmtree(pieces, ignore_errors=True)
                raise
            on_rank0(lambda: evaluation.save(path))
        if get_rank() == 0:
            shutil.rmtree(pieces, ignore_errors=True)
        return {n.metric: n.value for n in evaluation.numbers if math.isfinite(n.value)}

    return evaluate_model


def _check_settings(recipe: Recipe, sets: Sequence[FeatureSet] | None) -> Reference:
    """Return the recipe's reference; ValueError for settings that cannot work."""
    settings, preset = recipe.evaluate, recipe.preset
    if not settings.reference:
        raise ValueError(
            f"evaluate.every_images={settings.every_images} needs a reference; make one with "
            "mezzotint reference DATA FILE.npz and set evaluate.reference=FILE.npz"
        )
    if not settings.features:
        raise ValueError("evaluate.features is empty; name one, e.g. evaluate.features=[digits]")
    info = preset_info(preset, **recipe.model)
    reads_text = text_width(info.config) > 0
    if reads_text and settings.prompts is None:
        raise ValueError(
            f"{preset} is conditioned on text; set evaluate.prompts to a file, one prompt a line"
        )
    if not reads_text and settings.prompts is not None:
        raise ValueError(
            f"evaluate.prompts={settings.prompts}: {preset} is not conditioned on text; remove it"
        )
    with torch.device("meta"):
        model = build_model(info)
    # Counting runs the sampler around an empty network, which fails for a wrong sampler or steps.
    unguided = dataclasses.replace(settings, guidance=None)
    count_network_calls(model, _make_job(unguided, model).settings)
    reference = read_reference(settings.reference, settings.reference_source)
    if sets is None:
        sets = open_features(settings.features, settings.weights, "cpu")
    is_pixel_model = info.codec == "pixels"
    check_reference(sets, reference, (info.config.size,) * 2 if is_pixel_model else None)
    for s in sets:
        # Grey is repeated in three channels.
        if is_pixel_model and s.channels < info.config.channels:
            raise ValueError(
                f"features {s.name!r} need images of {s.channels} channels, {preset} generates "
                f"{info.config.channels}; choose other evaluate.features"
            )
    return reference


def _make_job(settings: Evaluate, model: Model) -> SamplingJob:
    """Return the sampling job: classes or prompts in turn."""
    return SamplingJob(
        model=model,
        settings=SamplingSettings(
            sampler=parse.parse_sampler(settings.sampler),
            steps=settings.steps,
            guidance=None if settings.guidance is None else Guidance(scale=settings.guidance),
            batch=settings.batch,
        ),
        classes=tuple(range(model.info.config.num_classes)),
        codec=model.info.codec,
        prompts=() if settings.prompts is None else read_prompts(Path(settings.prompts)),
    )


def _sample_source(settings: Evaluate, model: Model) -> ImageSource:
    """Return the samples of seeds 0 ... num_images - 1, with their resolution."""
    job = _make_job(settings, model)
    assert job.decoder is not None, "the job has a codec"
    size = model.info.config.size * job.decoder.factor
    return dataclasses.replace(from_job(job, settings.num_images), resolution=(size, size))


def _stop_early(source: ImageSource, stopping: Callable[[], bool]) -> ImageSource:
    """Return a source that raises once the run is to stop, which leaves little time to save."""

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for batch in source.batches(start, stop):
            if stopping():
                raise RuntimeError("the run was asked to stop")
            yield batch

    return dataclasses.replace(source, batches=batches)


def _load_finished(
    path: Path, pieces: Path, source: ImageSource, sets: Sequence[FeatureSet], reference: Reference
) -> Evaluation | None:
    """Return the evaluation at `path` if it is up to date; remove other evaluations' pieces."""
    for other in path.parent.glob("*.pieces"):
        if other != pieces:
            shutil.rmtree(other)
    try:
        evaluation = load_evaluation(path)
    except ValueError:
        return None
    numbers = evaluation.numbers
    same = evaluation.protocol == make_protocol(source, source.resolution)
    same &= {n.features["hash"] for n in numbers} == {s.hash for s in sets}
    same &= all(n.reference is None or n.reference["hash"] == reference.hash for n in numbers)
    return evaluation if same else None
