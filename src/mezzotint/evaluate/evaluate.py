"""Evaluate images against reference statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.core.distributed import all_ranks, on_rank0
from mezzotint.evaluate.bootstrap import bootstrap
from mezzotint.evaluate.clip import Clip
from mezzotint.evaluate.clip_score import check_captions, clip_numbers, embed_captions
from mezzotint.evaluate.extract import extract_features, with_resolution
from mezzotint.evaluate.features import KNOWN_INCEPTION, FeatureSet
from mezzotint.evaluate.image_source import ImageSource, repeat_grey
from mezzotint.evaluate.kid import kid
from mezzotint.evaluate.memorization import (
    QUANTILE,
    Memorization,
    check_held_out,
    check_quantile,
    measure_memorization,
    save_neighbour_sheet,
)
from mezzotint.evaluate.metrics import Gaussian, Moments, fdr, inception_score
from mezzotint.evaluate.precision_recall import (
    density_coverage,
    nearest_neighbours,
    precision_recall,
)
from mezzotint.evaluate.references import Reference
from mezzotint.evaluate.results import Evaluation, Number, Protocol, make_protocol

LOGITS, SPATIAL = "inception-logits", "inception-sfid"


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """Settings of the metrics; the defaults are those of the literature.

    split_size: images per split of the Inception Score. neighbours: k of precision and recall.
    density_neighbours: k of density and coverage. subset_size, subsets: of KID.
    seed: of subsets and resamples. level: of the bootstrap interval of each Fréchet distance.
    resamples: of that interval, 0 for none. Each takes as long as the distance itself.
    """

    split_size: int = 5000
    neighbours: int = 3
    density_neighbours: int = 5
    subset_size: int = 1000
    subsets: int = 100
    seed: int = 0
    resamples: int = 0
    level: float = 0.95


def evaluate(
    source: ImageSource,
    reference: Reference | None,
    sets: Sequence[FeatureSet],
    settings: MetricSettings | None = None,
    *,
    heldout: Reference | None = None,
    clips: Sequence[Clip] = (),
    folder: str | Path | None = None,
    show: bool = False,
) -> Evaluation:
    """Compute every metric that the feature sets and the reference allow; the same on all ranks.

    These are a Fréchet distance for each set with statistics; the Inception Score for the logits;
    precision, recall, density, coverage and KID for each set whose features the reference keeps;
    FDr for each set with statistics in `heldout`; the CLIP scores of each of `clips`. An image is
    drawn once for all of them.

    Args:
        reference: None with no sets, for CLIP scores alone.
        heldout: a reference of real images not trained on; `reference` should then be of the
            training images.
        folder: for pieces of features, to resume an interrupted evaluation.
        show: show progress.

    Errors: ValueError for bad images and for references that do not fit; see `extract_features`.
    """
    settings = settings or MetricSettings()

    every = [*sets, *(clip.features for clip in clips)]
    if (reference is None) != (not sets) or len({s.name for s in every}) < max(1, len(every)):
        raise ValueError(
            f"feature sets {[s.name for s in every]}: those of a reference need one, and none may "
            "be there twice"
        )

    # Checked before any network runs, so that a reference that does not fit costs no time.
    def check() -> tuple[ImageSource, Protocol]:
        if reference is not None:
            check_counts(sets, reference, source.num_images, settings)
        sized = repeat_grey(with_resolution(source), every[0].channels)
        for real in (reference, heldout):
            if real is not None:
                check_reference(sets, real, sized.resolution)
        if reference is not None and heldout is not None:
            _check_other_images(sets, reference, heldout)
        if clips:
            check_captions(sized)
        return sized, make_protocol(sized, sized.resolution)

    source, protocol = all_ranks(check)
    features = extract_features(source, every, folder, show)
    captions = source.captions or ()
    texts = [embed_captions(clip, captions, folder, show) for clip in clips]

    def compute() -> Evaluation:
        assert features is not None, "rank 0 has them"
        numbers = [
            number
            for s in sets
            if reference is not None
            for number in _compute_numbers(s, features[s.name], reference, heldout, settings)
        ]
        for clip, embedded in zip(clips, texts, strict=True):
            assert embedded is not None, "rank 0 has them"
            numbers += clip_numbers(clip, features[clip.name], captions, embedded)
        return Evaluation(protocol=protocol, numbers=tuple(numbers))

    return on_rank0(compute)


def check_reference(
    sets: Sequence[FeatureSet], reference: Reference, resolution: tuple[int, int] | None
) -> None:
    """Check the reference for every set that needs one; ValueError as in `Reference.check`."""
    for s in sets:
        if s.name != LOGITS:
            reference.check(s, resolution)


def check_counts(
    sets: Sequence[FeatureSet],
    reference: Reference,
    num_images: int,
    settings: MetricSettings | None = None,
) -> None:
    """Check that there are more images than neighbours, where the reference keeps features.

    Errors: ValueError with the fewest images.
    """
    settings = settings or MetricSettings()
    fewest = max(settings.neighbours, settings.density_neighbours) + 1
    for s in sets:
        if s.name not in reference.features or s.name.partition(":")[0] == SPATIAL:
            continue
        for what, count in (
            ("images to evaluate", num_images),
            (f"images kept in {reference.name}", len(reference.features[s.name])),
        ):
            if count < fewest:
                raise ValueError(
                    f"{count} {what}: precision, recall, density and coverage need {fewest} or more"
                )


def _check_other_images(
    sets: Sequence[FeatureSet], reference: Reference, heldout: Reference
) -> None:
    """Raise ValueError where the held-out statistics are those of the reference."""
    for s in sets:
        if not (s.name in reference.statistics and s.name in heldout.statistics):
            continue
        real, other = reference.statistics[s.name], heldout.statistics[s.name]
        # The same images in another order differ by rounding.
        scale = float(np.sqrt(np.diag(real.sigma).mean()))
        if np.abs(real.mu - other.mu).max() <= 1e-6 * scale:
            raise ValueError(
                f"{heldout.name} is of the same images as {reference.name}; give held-out images "
                "that the model was not trained on"
            )


def inception_score_name(logits: FeatureSet) -> str:
    """Return the name of an Inception Score; bare IS, as in papers, is of the published network."""
    known = logits.weights in KNOWN_INCEPTION
    return "IS" if known else f"IS (weights {logits.weights[:8]})"


def _compute_numbers(
    feature_set: FeatureSet,
    rows: Tensor,
    reference: Reference,
    heldout: Reference | None,
    settings: MetricSettings,
) -> list[Number]:
    """Return every number of one feature set, whose features are `rows`."""
    name, features = feature_set.name, {**feature_set.metadata(), "hash": feature_set.hash}
    if name == LOGITS:
        score = inception_score(rows, settings.split_size)
        details = {"split_size": settings.split_size, "std_over_splits": score.std}
        metric = inception_score_name(feature_set)
        return [Number(metric=metric, value=score.mean, features=features, settings=details)]
    numbers: list[Number] = []
    if name in reference.statistics:
        numbers += _frechet_numbers(feature_set, rows, reference, heldout, settings)
    # sFID's spatial features are for the Fréchet distance only.
    if name in reference.features and name.partition(":")[0] != SPATIAL:
        numbers += _neighbour_numbers(feature_set, rows, reference.features[name], settings)
    against = {
        "name": reference.name,
        "hash": reference.hash,
        "num_images": reference.metadata.get("num_images"),
    }
    return [
        dataclasses.replace(n, features=features, reference=against | (n.reference or {}))
        for n in numbers
    ]


def _frechet_numbers(
    feature_set: FeatureSet,
    rows: Tensor,
    reference: Reference,
    heldout: Reference | None,
    settings: MetricSettings,
) -> list[Number]:
    """Return the Fréchet distance, with an interval if requested, and FDr if there is `heldout`."""
    name = feature_set.distance_name
    real = reference.statistics[feature_set.name].gaussian()
    distance = Gaussian.of(Moments.of(rows)).distance(real)
    number = Number(metric=name, value=distance, features={})
    if settings.resamples:

        def resampled_distance(drawn: Tensor) -> float:
            # Not Gaussian.of: it would warn of few distinct images for every resample.
            moments = Moments.of(drawn)
            return Gaussian(moments.mean, moments.cov).distance(real)

        low, high, level = bootstrap(
            resampled_distance, rows, settings.resamples, settings.level, settings.seed
        )
        details = {"resamples": settings.resamples, "level": level, "seed": settings.seed}
        number = dataclasses.replace(number, low=low, high=high, settings=details)
    if heldout is None or feature_set.name not in heldout.statistics:
        return [number]
    base = heldout.statistics[feature_set.name].gaussian().distance(real)
    versus = {
        "heldout": heldout.name,
        "heldout_hash": heldout.hash,
        "heldout_num_images": heldout.metadata.get("num_images"),
    }
    ratio = fdr(distance, base)
    return [
        number,
        Number(metric=f"{name} of held-out images", value=base, features={}, reference=versus),
        Number(metric=f"FDr ({name})", value=ratio, features={}, reference=versus),
    ]


def _neighbour_numbers(
    feature_set: FeatureSet, rows: Tensor, real: np.ndarray, settings: MetricSettings
) -> list[Number]:
    """Return precision, recall, density, coverage and KID against features of real images."""
    manifold = precision_recall(real, rows, settings.neighbours)
    density = density_coverage(real, rows, settings.density_neighbours)
    discrepancy = kid(real, rows, settings.subset_size, settings.subsets, settings.seed)
    details: dict[str, dict[str, Any]] = {
        "precision": {"k": settings.neighbours},
        "recall": {"k": settings.neighbours},
        "density": {"k": settings.density_neighbours},
        "coverage": {"k": settings.density_neighbours},
        "KID": {
            "subset_size": settings.subset_size,
            "subsets": settings.subsets,
            "seed": settings.seed,
        },
    }
    values = {**manifold._asdict(), **density._asdict(), "KID": discrepancy.value}
    # A bare name is reserved for the published network's 2048 features, as in papers.
    suffix = "" if feature_set.distance_name == "FID" else f" ({feature_set.name})"
    return [
        Number(
            metric=f"{metric}{suffix}",
            value=value,
            features={},
            error=discrepancy.standard_error if metric == "KID" else None,
            settings=details[metric] | {"real_images": len(real)},
        )
        for metric, value in values.items()
    ]


def print_evaluation(
    evaluation: Evaluation, claims: dict[str, str] | None = None, show_unknown: bool = True
) -> None:
    """Print the numbers and the protocol.

    Args:
        claims: metric -> a paper's number, shown in a column of its own.
        show_unknown: print the fields of the protocol that are unknown, too.
    """
    from rich.table import Table

    from mezzotint.core.console import open_console

    console = open_console()
    table = Table("metric", "value", "interval or error", *(["claimed"] if claims else []))
    for number in evaluation.numbers:
        spread = "" if number.error is None else f"± {number.error:.3g}"
        if number.low is not None:
            spread = f"{number.low:.4g} ... {number.high:.4g}"
        claim = [claims.get(number.metric, "")] if claims else []
        table.add_row(number.metric, f"{number.value:.6g}", spread, *claim)
    console.print(table)
    for name, value in dataclasses.asdict(evaluation.protocol).items():
        if value is None and not show_unknown:
            continue
        text = "unknown" if value is None else value
        console.print(f"{name}: {text}", highlight=False)


def check_held_out_images(
    train: ImageSource,
    heldout: ImageSource,
    sets: Sequence[FeatureSet],
    quantile: float = QUANTILE,
    *,
    folder: str | Path | None = None,
    show: bool = False,
) -> None:
    """Raise the ValueError of `evaluate_memorization` for its real images, before sampling.

    All ranks call it together, with the same arguments as that.
    """
    check_quantile(quantile, heldout.num_images)
    found = [_extract_first(images, sets[:1], sets[0], folder, show) for images in (train, heldout)]

    def check() -> None:
        seen, unseen = (f for f in found if f is not None)
        distance, _ = nearest_neighbours(unseen, seen)
        check_held_out(unseen, distance[:, 0], quantile)

    on_rank0(check)


def _extract_first(
    images: ImageSource,
    sets: Sequence[FeatureSet],
    first: FeatureSet,
    folder: str | Path | None,
    show: bool,
) -> Tensor | None:
    """Return the features of one set; on rank 0 alone."""
    images = repeat_grey(images, first.channels)
    store = None if images.identity is None else folder
    features = extract_features(images, sets, store, show)
    return None if features is None else features[first.name]


def evaluate_memorization(
    source: ImageSource,
    train: ImageSource,
    heldout: ImageSource,
    sets: Sequence[FeatureSet],
    sheet: str | Path | None = None,
    rows: int = 16,
    quantile: float = QUANTILE,
    *,
    folder: str | Path | None = None,
    show: bool = False,
) -> Memorization:
    """Measure how often samples are copies of training images, with held-out images as a baseline.

    All ranks share the work; the result is the same on all.

    Args:
        sets: distances between images are taken in the features of the first. Give the sets of
            `evaluate`, networks of captions included, and its `folder` to reuse its features.
        sheet: a PNG to write: the `rows` samples nearest to the training set, each with its nearest
            training images. Samples and training images must then be of one size.
        quantile: see `measure_memorization`.
        folder, show: see `evaluate`. Images without an identity are not stored.
    """
    check_quantile(quantile, heldout.num_images)
    first = sets[0]
    features = [
        _extract_first(images, used, first, folder, show)
        for images, used in ((source, sets), (train, [first]), (heldout, [first]))
    ]

    def compute() -> Memorization:
        samples, seen, unseen = (f for f in features if f is not None)
        result = measure_memorization(samples, seen, unseen, quantile=quantile)
        if sheet is not None:
            nearest = result.distance[:, 0].argsort(stable=True)[:rows].tolist()
            save_neighbour_sheet(
                _load_images(source, nearest),
                [_load_images(train, result.index[i].tolist()) for i in nearest],
                sheet,
            )
        return result

    return on_rank0(compute)


def _load_images(source: ImageSource, indices: Sequence[int]) -> Tensor:
    return torch.cat([image for i in indices for image in source.batches(i, i + 1)])
