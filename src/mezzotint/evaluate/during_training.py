"""The judge of a run: samples of its averaged weights against real images, every so many images seen.

`train` takes it as a function, since training and evaluation do not know each other.
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
from mezzotint.core.distributed import all_ranks, on_rank0, rank
from mezzotint.evaluate.evaluate import check_reference, evaluate, make_protocol
from mezzotint.evaluate.features import FeatureSet, open_features
from mezzotint.evaluate.image_source import ImageSource, from_job
from mezzotint.evaluate.references import Reference, read_reference
from mezzotint.evaluate.results import Evaluation, load_evaluation
from mezzotint.models import build_model, preset_info
from mezzotint.process.denoiser import Model
from mezzotint.sampling import protocols
from mezzotint.sampling.conditioning import read_prompts
from mezzotint.sampling.generate_images import SamplingJob
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.train.evaluation import Evaluator


def make_evaluator(recipe: Recipe, sets: Sequence[FeatureSet] | None = None) -> Evaluator | None:
    """The judge that the recipe's `evaluate` asks for; None where it asks for none.

    The whole card goes to EVALUATIONS/IMAGES.json. One that is there already, of the same weights under the same
    protocol, is not made again. Pieces of features lie in EVALUATIONS/IMAGES.pieces while they are needed.

    Args:
        sets: features to judge by instead of those that the recipe names, e.g. `evaluate.features.from_module`.

    Errors: ValueError for what would fail at the first evaluation as far as it can be told before training.
    """
    asked = recipe.evaluate
    if not asked.every_images:
        return None
    real = checked(recipe, sets)

    def judge(model: Model, folder: Path, stopping: Callable[[], bool]) -> dict[str, float]:
        path = folder / f"{model.info.images}.json"
        pieces = path.with_suffix(".pieces")

        def prepared() -> tuple[list[FeatureSet], ImageSource]:
            device = next(model.parameters()).device
            chosen = (
                open_features(asked.features, asked.weights, device) if sets is None else list(sets)
            )
            return chosen, until(stopping, source_of(asked, model))

        chosen, source = all_ranks(prepared)
        found = on_rank0(lambda: at_hand(path, pieces, source, chosen, real))
        if found is None:
            try:
                found = evaluate(source, real, chosen, folder=pieces)
            except Exception:
                if (
                    rank() == 0 and not stopping()
                ):  # a run that goes on has other weights the next time
                    shutil.rmtree(pieces, ignore_errors=True)
                raise
            on_rank0(lambda: found.save(path))
        if rank() == 0:
            shutil.rmtree(pieces, ignore_errors=True)
        return {
            number.metric: number.value for number in found.numbers if math.isfinite(number.value)
        }

    return judge


def checked(recipe: Recipe, sets: Sequence[FeatureSet] | None) -> Reference:
    """The recipe's reference, after a ValueError for what can be known to be wrong without data and weights."""
    asked = recipe.evaluate
    if not asked.reference:
        raise ValueError(
            "evaluate.every_images asks for a reference; make one with mezzotint evaluate --make-reference DATA "
            "FILE.npz and set evaluate.reference=FILE.npz"
        )
    if asked.num_images < 2:
        raise ValueError(f"evaluate.num_images {asked.num_images} must be at least 2")
    card = preset_info(recipe.preset, **recipe.model)
    reads = text_width(card.config) > 0
    if reads and asked.prompts is None:
        raise ValueError(
            f"{recipe.preset} reads captions; name a file of what its samples are to show, one a line, as "
            "evaluate.prompts=FILE"
        )
    if not reads and asked.prompts is not None:
        raise ValueError(
            f"evaluate.prompts={asked.prompts}: {recipe.preset} reads no captions; leave it out"
        )
    with torch.device("meta"):
        unfinished = build_model(card)
    job_of(dataclasses.replace(asked, guidance=None), unfinished).calls  # noqa: B018  a wrong sampler or steps
    real = read_reference(asked.reference, asked.reference_source)
    opened = open_features(asked.features, asked.weights, "cpu") if sets is None else sets
    check_reference(opened, real, (card.config.size,) * 2 if card.codec == "pixels" else None)
    for s in opened:
        if card.codec == "pixels" and s.channels != card.config.channels:
            raise ValueError(
                f"features {s.name!r} are of images of {s.channels} channels, {recipe.preset} makes "
                f"{card.config.channels}; choose other evaluate.features"
            )
    return real


def job_of(asked: Evaluate, model: Model) -> SamplingJob:
    """How the samples are made: classes or prompts in turn, seeds from 0."""
    settings = SamplingSettings(
        sampler=protocols.parse_sampler(asked.sampler),
        steps=asked.steps,
        guidance=None if asked.guidance is None else Guidance(dit_s=asked.guidance),
        batch=asked.batch,
    )
    pool = tuple(range(model.info.config.num_classes))
    said = () if asked.prompts is None else read_prompts(Path(asked.prompts))
    return SamplingJob(
        model=model, settings=settings, pool=pool, codec=model.info.codec, prompts=said
    )


def source_of(asked: Evaluate, model: Model) -> ImageSource:
    """The samples to be judged, of known resolution."""
    job = job_of(asked, model)
    assert job.decoder is not None, "the job names a codec"
    side = model.info.config.size * job.decoder.factor
    return dataclasses.replace(from_job(job, asked.num_images), resolution=(side, side))


def until(stopping: Callable[[], bool], source: ImageSource) -> ImageSource:
    """The same images, but an error as soon as training is to stop, whose time to save is short."""

    def batches(start: int, stop: int) -> Iterator[Tensor]:
        for batch in source.batches(start, stop):
            if stopping():
                raise RuntimeError("the run was asked to stop")
            yield batch

    return dataclasses.replace(source, batches=batches)


def at_hand(
    path: Path, pieces: Path, source: ImageSource, sets: Sequence[FeatureSet], real: Reference
) -> Evaluation | None:
    """The evaluation at `path` if it is the one wanted; what others left unfinished goes."""
    for left in path.parent.glob("*.pieces"):
        if left != pieces:
            shutil.rmtree(left)
    try:
        found = load_evaluation(path)
    except ValueError:
        return None
    same = found.protocol == make_protocol(source, source.resolution)
    same &= {n.features["hash"] for n in found.numbers} == {s.hash for s in sets}
    same &= all(n.reference is None or n.reference["hash"] == real.hash for n in found.numbers)
    return found if same else None
