"""Tune how a model is sampled: guidance scale, guidance interval and post-hoc EMA width.

A search on few samples, then a last comparison on fresh seeds, so that luck does not choose.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.core.distributed import World, all_ranks, get_world_size, on_rank0
from mezzotint.core.files import atomic_write, sha256_of_file
from mezzotint.core.progress import ProgressBar
from mezzotint.core.text import last_component
from mezzotint.evaluate.bootstrap import bootstrap
from mezzotint.evaluate.features import FeatureSet
from mezzotint.evaluate.references import Reference
from mezzotint.evaluate.search import Candidate, compass_search
from mezzotint.evaluate.tune_record import Trial, TuneRecord
from mezzotint.evaluate.tuner import FINALISTS, SEARCH_SHARE, Tuner, TuneSettings, open_tuner
from mezzotint.models import README, TUNED, WEIGHTS, load_model, readme, save_info, save_model
from mezzotint.sampling.tuned import Measured, TunedSettings, add_tuned, tuned_section
from mezzotint.train.posthoc_ema import reconstruct_model
from mezzotint.train.run_folder import run_lock

RECORD, PIECES = "tune.json", "tune.pieces"


def tune(
    source: str | Path,
    reference: Reference,
    feature_set: FeatureSet,
    settings: TuneSettings,
    world: World,
    say: Callable[[str], None] = print,
    show: bool = False,
) -> tuple[Path, TuneRecord]:
    """Search, write the winner as the model's default sampling settings, and return its folder.

    Every candidate of the search is measured on the same seeds and labels. Its images are as many
    as two thirds of the calls allow for 8 candidates an axis (scale, both ends of the interval,
    width), and at least 32. The calls that are left go to the last comparison, on fresh seeds: the
    default and the two best of the search. The smallest distance wins whose 95 % interval of the
    difference from the default lies below 0, else the default stays. With resamples=0 there are no
    intervals, and the smallest distance wins.

    A run's winner is written to RUN/tuned, with the weights of its width; RUN/model stays as it is.
    A model folder's goes into its config.json. `tune.json` beside them keeps what was measured: the
    same call again goes on after the last finished candidate. All ranks call this together.

    Args:
        source: run folder or model folder.
        say: receives a line for each thing a user should know. show: show progress.

    Returns: the folder of the tuned model, and the record with all distances.

    Errors: ValueError, before anything is written, for a model with nothing to tune, a reference
        that does not fit, and too few calls.
    """
    folder = Path(source)
    locked = (folder / "recipe.yaml").exists() and world.is_rank0
    with run_lock(folder) if locked else nullcontext():
        tuner = all_ranks(lambda: open_tuner(folder, reference, feature_set, settings))
        arguments = on_rank0(tuner.arguments, world)
        record, lines = on_rank0(lambda: TuneRecord.open(folder / RECORD, arguments), world)
        for line in [*lines, *tuner.describe()]:
            say(line)
        with ProgressBar(
            "tuning", settings.calls, unit="calls", show=show and world.is_rank0
        ) as bar:
            Search(tuner, record, world, bar).run()
        return on_rank0(lambda: write_winner(tuner, record.winner, record), world), record


class Search:
    """A search in progress: it measures candidates within the calls, and records them."""

    def __init__(self, tuner: Tuner, record: TuneRecord, world: World, bar: ProgressBar):
        self.tuner, self.record, self.world, self.bar = tuner, record, world, bar
        self.spent = 0

    def run(self) -> None:
        """Search, then compare the best with the default on fresh seeds."""
        t = self.tuner
        found = compass_search(self.measure, t.space)
        default = Candidate()
        others = [c for c in found if c != default and math.isfinite(found[c])]
        others.sort(key=lambda c: found[c])
        finalists = [default, *others[:FINALISTS]]
        each = sum(t.calls(c) for c in finalists)
        images = (t.settings.calls - self.spent) // each
        self.compare(finalists, t.settings.seed + t.search_images, images)

    def measure(self, candidate: Candidate) -> float | None:
        """Return a candidate's distance on the seeds of the search; None beyond its calls."""
        t, n = self.tuner, self.tuner.search_images
        cost = n * t.calls(candidate)
        if self.spent + cost > SEARCH_SHARE * t.settings.calls:
            return None
        trial = self.record.find(candidate)
        if trial is None:
            trial = self.try_out(candidate, n)
            self.record.search.append(trial)
            on_rank0(self.record.save, self.world)
        self.spent += cost
        best = min(x.value for x in self.record.search)
        self.bar.update(self.spent, f"best {t.metric_name} {best:.4g}")
        return trial.value

    def try_out(self, candidate: Candidate, images: int) -> Trial:
        """Sample and measure a candidate; an infinite distance for samples that are not finite."""
        t = self.tuner
        try:
            rows = t.rows(candidate, t.settings.seed, images, None)
        except FloatingPointError:
            if get_world_size() > 1:  # the other ranks have ended their part
                raise
            return self.trial(candidate, images, t.settings.seed, math.inf)

        def judge() -> float:
            assert rows is not None, "rank 0 has them"
            return t.statistic(rows)(torch.arange(images))

        return self.trial(candidate, images, t.settings.seed, on_rank0(judge, self.world))

    def trial(self, candidate: Candidate, images: int, first_seed: int, value: float) -> Trial:
        """Return a candidate's record."""
        return Trial(
            candidate=candidate,
            guidance=self.tuner.guidance(candidate),
            images=images,
            first_seed=first_seed,
            calls=self.tuner.calls(candidate),
            value=value,
        )

    def compare(self, finalists: Sequence[Candidate], first_seed: int, images: int) -> None:
        """Measure the finalists on the same fresh seeds; finished pieces are kept until the end."""
        if self.record.comparison:
            return
        t, pieces = self.tuner, self.tuner.folder / PIECES
        rows: list[Tensor | None] = []
        for candidate in finalists:
            rows.append(t.rows(candidate, first_seed, images, pieces))
            self.spent += images * t.calls(candidate)
            self.bar.update(self.spent, "last comparison")

        def judge() -> list[Trial]:
            statistics = [t.statistic(r) for r in rows if r is not None]
            trials = []
            for candidate, distance in zip(finalists, statistics, strict=True):
                trial = self.trial(candidate, images, first_seed, distance(torch.arange(images)))
                if trials and t.settings.resamples:
                    # Seeds are resampled in pairs: what both share cancels.
                    low, high, _ = bootstrap(
                        lambda chosen, d=distance: d(chosen) - statistics[0](chosen),
                        torch.arange(images),
                        t.settings.resamples,
                    )
                    trial = dataclasses.replace(trial, low=low, high=high)
                trials.append(trial)
            return trials

        self.record.comparison.extend(on_rank0(judge, self.world))
        on_rank0(self.record.save, self.world)
        on_rank0(lambda: shutil.rmtree(pieces, ignore_errors=True), self.world)


def write_winner(tuner: Tuner, winner: Trial, record: TuneRecord) -> Path:
    """Write the winner as the model's tuned settings; return the model's folder."""
    width = winner.candidate.width
    tuned = TunedSettings(
        sampler=tuner.job.settings.sampler,
        steps=tuner.job.settings.steps,
        guidance=winner.guidance,
        width=width,
        measured=Measured(
            metric=tuner.metric_name,
            value=winner.value,
            default=record.comparison[0].value,
            low=winner.low,
            high=winner.high,
            images=winner.images,
            first_seed=winner.first_seed,
            calls=record.calls,
            reference=last_component(tuner.reference.name),
            reference_hash=tuner.reference.hash,
        ),
        source=sha256_of_file(tuner.model_folder / WEIGHTS) if tuner.is_run else None,
    )
    if not tuner.is_run:
        save_info(add_tuned(load_model(tuner.folder).info, tuned), tuner.folder)
        return tuner.folder
    model, target = load_model(tuner.model_folder), tuner.folder / TUNED
    if width is not None:
        model, _ = reconstruct_model(tuner.folder, width, tuner.ema_images)
    model.info = add_tuned(model.info, tuned)
    save_model(model, target)
    atomic_write(target / README, readme(model, sections=tuned_section(model.info)))
    return target
