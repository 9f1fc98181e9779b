"""Evaluate samples of the averaged weights, and their likelihood, during training.

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

from mezzotint.backbones import native_size, text_width
from mezzotint.config import Evaluate, Recipe
from mezzotint.core.distributed import all_ranks, get_rank, on_rank0
from mezzotint.data.image_dataset import BUILTIN, open_images, split_source
from mezzotint.data.sources import SPLITS
from mezzotint.evaluate.evaluate import check_counts, check_reference, evaluate
from mezzotint.evaluate.features import FeatureSet, open_features
from mezzotint.evaluate.image_source import ImageSource, from_job, repeat_grey
from mezzotint.evaluate.likelihood import LikelihoodSettings, bits_per_dim, check_pixels, is_of
from mezzotint.evaluate.references import Reference, read_reference
from mezzotint.evaluate.results import Evaluation, load_evaluation, make_protocol
from mezzotint.models import build_model, preset_info
from mezzotint.process.denoiser import Model
from mezzotint.sampling import parse
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.prompts import make_prompts, read_texts
from mezzotint.sampling.sample import count_network_calls
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.train.evaluation import Evaluator


def make_evaluator(recipe: Recipe, sets: Sequence[FeatureSet] | None = None) -> Evaluator | None:
    """Return the evaluator of the recipe's `evaluate` settings; None if `every_images` is 0.

    It writes evaluations/IMAGES.json and IMAGES-bits-per-dim.json, unless the file exists already
    for the same weights and protocol. The same names with .pieces hold what an evaluation in
    progress has measured.

    Args:
        sets: feature sets in place of those that the recipe names, e.g. of `features.from_module`.

    Errors: ValueError for what can be known before training to fail at the first evaluation.
    """
    settings = recipe.evaluate
    if not settings.every_images:
        if settings.bits_per_dim:
            raise ValueError(
                "evaluate.bits_per_dim=true needs an interval; set evaluate.every_images"
            )
        return None
    evaluators = []
    if settings.reference or not settings.bits_per_dim:
        evaluators.append(_sample_evaluator(recipe, sets))
    if settings.bits_per_dim:
        evaluators.append(_likelihood_evaluator(recipe))

    def evaluate_model(
        model: Model, folder: Path, stopping: Callable[[], bool]
    ) -> dict[str, float]:
        on_rank0(lambda: _remove_other_pieces(folder, model.info.images))
        return {
            metric: value
            for evaluator in evaluators
            for metric, value in evaluator(model, folder, stopping).items()
        }

    return evaluate_model


def _sample_evaluator(recipe: Recipe, sets: Sequence[FeatureSet] | None) -> Evaluator:
    """Return the evaluator of samples against the recipe's reference."""
    settings, reference = recipe.evaluate, _check_settings(recipe, sets)

    def evaluate_samples(
        model: Model, folder: Path, stopping: Callable[[], bool]
    ) -> dict[str, float]:
        def prepare() -> tuple[list[FeatureSet], ImageSource]:
            opened = sets
            if opened is None:
                device = next(model.parameters()).device
                opened = open_features(settings.features, settings.weights, device)
            source = repeat_grey(_sample_source(settings, model), opened[0].channels)
            return list(opened), _stop_early(source, stopping)

        opened, source = all_ranks(prepare)
        return _measure_once(
            folder / f"{model.info.images}.json",
            lambda evaluation: _is_of(evaluation, source, opened, reference),
            lambda pieces: evaluate(source, reference, opened, folder=pieces),
            stopping,
        )

    return evaluate_samples


def _likelihood_evaluator(recipe: Recipe) -> Evaluator:
    """Return the evaluator of bits per dimension."""
    settings, info = recipe.evaluate, preset_info(recipe.preset, **recipe.model)
    check_pixels(recipe.data.codec or info.codec, info.config, recipe.preset)
    source, derived = settings.data or _test_split(recipe.data.source), not settings.data
    columns = {k: v for k, v in dataclasses.asdict(recipe.data.columns).items() if v is not None}
    images = open_images(
        source,
        size=info.config.size,
        channels=info.config.channels,
        crop=recipe.data.crop,
        columns=columns if derived else None,
        full_scale=recipe.data.full_scale,
    )
    asked = LikelihoodSettings(num_images=settings.num_images, batch=settings.batch)

    def evaluate_likelihood(
        model: Model, folder: Path, stopping: Callable[[], bool]
    ) -> dict[str, float]:
        return _measure_once(
            folder / f"{model.info.images}-bits-per-dim.json",
            lambda evaluation: is_of(evaluation, model, images, asked),
            lambda pieces: bits_per_dim(
                model, images, asked, name=source, folder=pieces, stopping=stopping
            ),
            stopping,
        )

    return evaluate_likelihood


def _test_split(source: str) -> str:
    """Return the test split of a data source that names its training split; ValueError if not."""
    base, option = split_source(source)
    words = [word for word in option.split(",") if word]
    # A built-in set without a split is its training split.
    named = "train" in words or (base in BUILTIN and not {*words} & {*SPLITS})
    if not named:
        raise ValueError(
            f"evaluate.bits_per_dim needs images that are not trained on, and {source} may train "
            f"on all; set evaluate.data=SET, or train on {base}:train, whose test split is used"
        )
    return f"{base}:{','.join(['test', *(word for word in words if word != 'train')])}"


def _measure_once(
    path: Path,
    is_current: Callable[[Evaluation], bool],
    measure: Callable[[Path], Evaluation],
    stopping: Callable[[], bool],
) -> dict[str, float]:
    """Return the finite numbers of the evaluation at `path`, measured and saved if need be.

    Args:
        is_current: whether a saved evaluation can be used.
        measure: gets the folder for pieces.
    """
    pieces = path.with_suffix(".pieces")

    def load_finished() -> Evaluation | None:
        try:
            evaluation = load_evaluation(path)
        except ValueError:
            return None
        return evaluation if is_current(evaluation) else None

    evaluation = on_rank0(load_finished)
    if evaluation is None:
        try:
            evaluation = measure(pieces)
        except Exception:
            # Pieces are kept only for a run that stops: a run that goes on has other weights at its
            # next evaluation.
            if get_rank() == 0 and not stopping():
                shutil.rmtree(pieces, ignore_errors=True)
            raise
        on_rank0(lambda: evaluation.save(path))
    if get_rank() == 0:
        shutil.rmtree(pieces, ignore_errors=True)
    return {n.metric: n.value for n in evaluation.numbers if math.isfinite(n.value)}


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
    check_reference(sets, reference, native_size(info.config) if is_pixel_model else None)
    check_counts(sets, reference, settings.num_images)
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
            dtype=settings.dtype,
            batch=settings.batch,
        ),
        classes=tuple(range(model.info.config.num_classes)),
        codec=model.info.codec,
        prompts=make_prompts(read_texts(Path(settings.prompts)) if settings.prompts else (), None),
    )


def _sample_source(settings: Evaluate, model: Model) -> ImageSource:
    """Return the samples of seeds 0 ... num_images - 1, with their resolution."""
    job = _make_job(settings, model)
    assert job.decoder is not None, "the job has a codec"
    height, width = (side * job.decoder.factor for side in native_size(model.info.config))
    return dataclasses.replace(from_job(job, settings.num_images), resolution=(height, width))


def _stop_early(source: ImageSource, stopping: Callable[[], bool]) -> ImageSource:
    """Return a source that raises once the run is to stop, which leaves little time to save."""

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for batch in source.batches(start, stop):
            if stopping():
                raise RuntimeError("the run was asked to stop")
            yield batch

    return dataclasses.replace(source, batches=batches)


def _remove_other_pieces(folder: Path, images: int) -> None:
    """Remove the pieces of evaluations at other images seen, which were killed."""
    for other in folder.glob("*.pieces"):
        if other.stem.partition("-")[0] != str(images):
            shutil.rmtree(other)


def _is_of(
    evaluation: Evaluation, source: ImageSource, sets: Sequence[FeatureSet], reference: Reference
) -> bool:
    """Return whether an evaluation is of these samples, features and reference."""
    numbers = evaluation.numbers
    same = evaluation.protocol == make_protocol(source, source.resolution)
    same &= {n.features["hash"] for n in numbers} == {s.hash for s in sets}
    return same and all(
        n.reference is None or n.reference["hash"] == reference.hash for n in numbers
    )
