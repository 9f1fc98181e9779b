"""One evaluation, whole: images against a reference, to numbers with their card."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint import __version__
from mezzotint.core.distributed import all_ranks, on_rank0
from mezzotint.core.registry import suggest
from mezzotint.evaluate.bootstrap import bootstrap
from mezzotint.evaluate.extract import Features, extract_features
from mezzotint.evaluate.features import FeatureSet, compute_features
from mezzotint.evaluate.image_source import ImageSource
from mezzotint.evaluate.kid import kid
from mezzotint.evaluate.memorization import Memorization, measure_memorization, neighbour_sheet
from mezzotint.evaluate.metrics import Gaussian, Moments, fdr, inception_score
from mezzotint.evaluate.precision_recall import density_coverage, precision_recall
from mezzotint.evaluate.references import Reference
from mezzotint.evaluate.results import Evaluation, Number, Protocol

LOGITS, SPATIAL = "inception-logits", "inception-sfid"


@dataclass(frozen=True, kw_only=True)
class MetricSettings:
    """Of the metrics; the defaults are the field's habits.

    split_size: images per split of the Inception Score. neighbours: k of precision and recall. density_neighbours: k of
    density and coverage. subset_size, subsets: of KID. seed: of subsets and resamples. resamples: of the interval of
    each Fréchet distance, 0 for none (each costs as much as the distance itself). level: of that interval.
    """

    split_size: int = 5000
    neighbours: int = 3
    density_neighbours: int = 5
    subset_size: int = 1000
    subsets: int = 100
    seed: int = 0
    resamples: int = 0
    level: float = 0.95


def make_protocol(source: ImageSource, resolution: tuple[int, int] | None) -> Protocol:
    """The card's upper half, from what the source says; ValueError for a field that cards do not have."""
    known = {f.name for f in dataclasses.fields(Protocol)} - {
        "source",
        "n",
        "code_version",
        "resolution",
    }
    for key in source.card:
        if key not in known:
            raise ValueError(f"{source.name} states {key!r}; {suggest(key, known)}")
    return Protocol(
        source=source.name,
        n=source.n,
        code_version=__version__,
        resolution=resolution,
        **source.card,
    )


def evaluate(
    source: ImageSource,
    reference: Reference,
    sets: Sequence[FeatureSet],
    settings: MetricSettings | None = None,
    *,
    heldout: Reference | None = None,
    folder: str | Path | None = None,
    show: bool = False,
) -> Evaluation:
    """Every number that the feature sets and the reference allow; on all ranks together, the same on each.

    A Fréchet distance for each set with statistics; the Inception Score for the logits; precision, recall, density,
    coverage and KID for each set of which the reference keeps features; FDr where `heldout` has statistics too.

    Args:
        heldout: a reference made of real images not trained on; `reference` should then be of the training images.
        folder: for pieces of features, to take up an interrupted evaluation. show: progress bars.

    Errors: ValueError for bad images and references that do not fit; see `collect`.
    """
    settings = settings or MetricSettings()

    def protocol_checked() -> tuple[ImageSource, Protocol]:
        seen, resolution = _seen(source)
        check_reference(sets, reference, resolution)
        if heldout is not None:
            check_reference(sets, heldout, resolution)
        return seen, make_protocol(seen, resolution)

    source, protocol = all_ranks(protocol_checked)
    features = extract_features(source, sets, folder, show)

    def numbers() -> Evaluation:
        assert features is not None
        found = [
            n for s in sets for n in _numbers(s, features[s.name], reference, heldout, settings)
        ]
        return Evaluation(protocol=protocol, numbers=tuple(found))

    return on_rank0(numbers)


def check_reference(
    sets: Sequence[FeatureSet], reference: Reference, resolution: tuple[int, int] | None
) -> None:
    """ValueError unless the reference serves all of these sets that need one; see `Reference.check`."""
    for s in sets:
        if s.name != LOGITS:
            reference.check(s, resolution)


def _seen(source: ImageSource) -> tuple[ImageSource, tuple[int, int] | None]:
    """The source and its resolution, looked up from the first two images where it is not stated."""
    if source.resolution is not None or source.n < 2:
        return source, source.resolution
    first = next(iter(source.batches(0, 2)))
    size = (int(first.shape[2]), int(first.shape[3]))
    return dataclasses.replace(source, resolution=size), size


def _numbers(
    s: FeatureSet,
    rows: Tensor,
    reference: Reference,
    heldout: Reference | None,
    settings: MetricSettings,
) -> list[Number]:
    features = {**s.card(), "hash": s.hash}
    if s.name == LOGITS:
        score = inception_score(rows, settings.split_size)
        how = {"split_size": settings.split_size, "std_over_splits": score.std}
        return [Number(metric="IS", value=score.mean, features=features, settings=how)]
    against = {"name": reference.name, "hash": reference.hash, "n": reference.card.get("n")}
    found: list[Number] = []
    if s.name in reference.statistics:
        found += _distances(s, rows, reference, heldout, settings)
    if s.name in reference.features and s.name.partition(":")[0] != SPATIAL:
        found += _by_image(s, rows, reference.features[s.name], settings)
    return [
        dataclasses.replace(n, features=features, reference=against | (n.reference or {}))
        for n in found
    ]


def _distances(
    s: FeatureSet,
    rows: Tensor,
    reference: Reference,
    heldout: Reference | None,
    settings: MetricSettings,
) -> list[Number]:
    there = reference.statistics[s.name].gaussian()
    distance = Gaussian.of(Moments.of(rows)).distance(there)
    found = Number(metric=s.distance, value=distance, features={})
    if settings.resamples:
        # Resamples have fewer distinct images; the warning for few images was given above, once.
        def again(drawn: Tensor) -> float:
            m = Moments.of(drawn)
            return Gaussian(m.mean, m.cov, m.n).distance(there)

        low, high, level = bootstrap(again, rows, settings.resamples, settings.level, settings.seed)
        how = {"resamples": settings.resamples, "level": level, "seed": settings.seed}
        found = dataclasses.replace(found, low=low, high=high, settings=how)
    if heldout is None or s.name not in heldout.statistics:
        return [found]
    real = heldout.statistics[s.name].gaussian().distance(there)
    versus = {
        "heldout": heldout.name,
        "heldout_hash": heldout.hash,
        "heldout_n": heldout.card.get("n"),
    }
    base = Number(
        metric=f"{s.distance} of held-out images", value=real, features={}, reference=versus
    )
    return [
        found,
        base,
        Number(
            metric=f"FDr ({s.distance})", value=fdr(distance, real), features={}, reference=versus
        ),
    ]


def _by_image(
    s: FeatureSet, rows: Tensor, real: np.ndarray, settings: MetricSettings
) -> list[Number]:
    of = {"real_images": len(real)}
    near = precision_recall(real, rows, settings.neighbours)
    dense = density_coverage(real, rows, settings.density_neighbours)
    discrepancy = kid(real, rows, settings.subset_size, settings.subsets, settings.seed)
    how: dict[str, dict[str, Any]] = {
        "precision": {"k": settings.neighbours},
        "density": {"k": settings.density_neighbours},
        "KID": {
            "subset_size": settings.subset_size,
            "subsets": settings.subsets,
            "seed": settings.seed,
        },
    }
    how |= {"recall": how["precision"], "coverage": how["density"]}
    values = {**near._asdict(), **dense._asdict(), "KID": discrepancy.value}
    # Only the 2048-d pool of the published network gives the numbers that papers print under the bare names.
    suffix = "" if s.distance == "FID" else f" ({s.name})"
    return [
        Number(
            metric=f"{metric}{suffix}",
            value=value,
            features={},
            error=discrepancy.standard_error if metric == "KID" else None,
            settings=how[metric] | of,
        )
        for metric, value in values.items()
    ]


def print_evaluation(evaluation: Evaluation, claims: dict[str, str] | None = None) -> None:
    """A table of the numbers, beside what a paper claims where `claims` has the metric, and the protocol's lines."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("metric", "value", "interval or error", *(["claimed"] if claims else []))
    for number in evaluation.numbers:
        spread = f"± {number.error:.3g}" if number.error is not None else ""
        spread = f"{number.low:.4g} ... {number.high:.4g}" if number.low is not None else spread
        table.add_row(
            number.metric,
            f"{number.value:.6g}",
            spread,
            *([claims.get(number.metric, "")] if claims else []),
        )
    console.print(table)
    for name, value in dataclasses.asdict(evaluation.protocol).items():
        console.print(
            f"{name}: {'not stated' if value is None else value}", markup=False, highlight=False
        )


def evaluate_memorization(
    source: ImageSource,
    train: ImageSource,
    heldout: ImageSource,
    s: FeatureSet,
    picture: str | Path | None = None,
    rows: int = 16,
    quantile: float = 0.01,
) -> Memorization:
    """Copy rate of samples against the training images, judged by held-out ones, and the sheet of the nearest.

    Args:
        s: the features in which nearness is meant.
        picture: where to write the sheet, a PNG with the `rows` samples nearest to the training set, nearest first.
            Samples and training images must then be of one size.
    """
    found: list[Features] = [
        compute_features([s], x.batches(0, x.n)) for x in (source, train, heldout)
    ]
    result = measure_memorization(*(f[s.name] for f in found), quantile=quantile)
    if picture is not None:
        order = result.distance[:, 0].argsort(stable=True)[:rows].tolist()
        samples = torch.cat([_one(source, i) for i in order])
        neighbour_sheet(
            samples,
            [torch.cat([_one(train, j) for j in result.index[i].tolist()]) for i in order],
            picture,
        )
    return result


def _one(source: ImageSource, i: int) -> Tensor:
    return torch.cat(list(source.batches(i, i + 1)))
