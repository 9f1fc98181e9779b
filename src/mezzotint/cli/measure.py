"""What `mezzotint evaluate` runs: samples or images, sweeps, likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.core.console import echo

if TYPE_CHECKING:
    from mezzotint.evaluate.clip import Clip
    from mezzotint.evaluate.features import FeatureSet
    from mezzotint.evaluate.image_source import ImageSource
    from mezzotint.evaluate.references import Reference
    from mezzotint.evaluate.results import Evaluation
    from mezzotint.sampling.job import SamplingJob


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is evaluated, as given to the command: a model and how it is sampled, or images."""

    name: str
    num_images: int | None = None
    channels: int | None = None
    protocol: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: str | None = None
    prompts: Path | None = None
    encoder: str | None = None
    dtype: str | None = None

    @property
    def is_model(self) -> bool:
        """Whether the name is of a model."""
        from mezzotint.core.boxed import boxed_folder
        from mezzotint.core.object_store import is_address
        from mezzotint.core.paths import is_hub_name

        # A class of images may be named "model".
        parts = ("config.json", "model/config.json", "recipe.yaml")
        has_model = any((Path(self.name) / part).exists() for part in parts)
        is_named = is_address(self.name) or is_hub_name(self.name)
        return has_model or is_named or boxed_folder(self.name) is not None

    @property
    def samples(self) -> int:
        """How many samples of a model are evaluated."""
        from mezzotint.sampling.protocols import get_protocol

        drawn = None if self.protocol is None else get_protocol(self.protocol).coco_captions
        return self.num_images or drawn or 50_000

    def open_job(self, sweep: bool = False) -> SamplingJob:
        """Open the model; for a sweep, without tuned guidance."""
        from mezzotint.sampling import parse
        from mezzotint.sampling.coco import read_protocol_texts
        from mezzotint.sampling.job import make_job

        changes: dict[str, Any] = {
            "steps": self.steps,
            "sampler": self.sampler and parse.parse_sampler(self.sampler),
            "guidance": self.guidance and parse.parse_guidance(self.guidance),
            "dtype": self.dtype,
        }
        changes = {k: v for k, v in changes.items() if v}
        if sweep and self.protocol is None:
            changes.setdefault("guidance", None)
        texts = () if self.prompts is None else read_protocol_texts(self.prompts, self.protocol)
        return make_job(
            self.name, changes, protocol=self.protocol, prompts=texts, encoder=self.encoder
        )

    def open(self) -> ImageSource:
        """Open the images, or samples of the model."""
        from mezzotint.evaluate.image_source import caption_images, from_job, open_image_source
        from mezzotint.sampling.coco import read_protocol_prompts

        if self.is_model:
            return from_job(self.open_job(), self.samples)
        images = open_image_source(self.name, self.channels or 3)
        options = {
            "--num-images": self.num_images,
            "--sampler": self.sampler,
            "--steps": self.steps,
            "--guidance": self.guidance,
            "--encoder": self.encoder,
            "--dtype": self.dtype,
            # With prompts it says which of their captions the images show.
            "--protocol": self.protocol if self.prompts is None else None,
        }
        if given := [name for name, value in options.items() if value is not None]:
            raise ValueError(
                f"{self.name} holds images, and {' and '.join(given)} are of a model's samples; "
                "leave them out"
            )
        if self.prompts is None:
            return images
        prompts = read_protocol_prompts(self.prompts, self.protocol)
        return caption_images(images, [prompt.text for prompt in prompts])


FEATURES = ("inception-2048", "inception-sfid", "inception-logits")


def choose_features(given: Sequence[str] | None, reference: Reference) -> Sequence[str]:
    """Return the feature sets to measure in: those given, else FID's, else the reference's own."""
    from mezzotint.evaluate.evaluate import LOGITS
    from mezzotint.evaluate.features import OTHER_SETS

    own = [*reference.statistics, *reference.features]
    if given:
        return given
    if any(name in FEATURES for name in own):
        # The Inception Score needs no reference; those of EDM have no sFID.
        return [name for name in FEATURES if name in own or name == LOGITS]
    known = [name for name in dict.fromkeys(own) if name in OTHER_SETS]
    return known or [n for n in dict.fromkeys(own) if n.startswith("inception-")] or FEATURES


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured, as given to the command."""

    reference: str | None
    reference_source: str | None
    heldout: str | None
    features: Sequence[str] | None
    weights: Path | None
    clip: Sequence[str] | None

    def open_references(self) -> tuple[Reference | None, Reference | None]:
        """Open the reference and that of held-out images."""
        from mezzotint.evaluate.references import read_reference

        real, heldout = None, None
        if self.reference is not None:
            real = read_reference(self.reference, self.reference_source)
        if self.heldout is not None:
            heldout = read_reference(self.heldout, self.reference_source)
        return real, heldout

    def open_networks(
        self, reference: Reference | None
    ) -> tuple[Reference | None, list[FeatureSet], list[Clip]]:
        """Open the networks, and complete the reference with features of its own images."""
        from mezzotint.evaluate.clip import VIT_L14, open_clip
        from mezzotint.evaluate.features import open_features
        from mezzotint.evaluate.references import complete_reference

        clips = (
            [open_clip(name) for name in self.clip or (VIT_L14,)] if self.clip is not None else []
        )
        if reference is None:
            return None, [], clips
        sets = open_features(choose_features(self.features, reference), self.weights)
        return complete_reference(reference, sets), sets, clips


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Sets of real images, for a copy rate; size: in pixels, None as stored."""

    train: str
    heldout: str
    size: int | None

    def open(self, samples: ImageSource) -> tuple[ImageSource, ImageSource]:
        """Open the training images and those held out, grey where the samples are.

        samples: with their resolution and channels.

        Errors: ValueError for images of another size, for too few held out, and for images held out
            that are in the training set.
        """
        from mezzotint.data.image_dataset import split_source
        from mezzotint.evaluate.extract import with_resolution
        from mezzotint.evaluate.image_source import open_real_images
        from mezzotint.evaluate.memorization import QUANTILE, check_quantile

        (base, split), (other, part) = split_source(self.train), split_source(self.heldout)
        if base == other and (split == part or "all" in (split, part)):
            raise ValueError(
                f"--train-images {self.train} and --heldout-images {self.heldout} have images in "
                f"common; give {base}:train and {base}:test, for a run on {base}:train"
            )
        train, heldout = (
            open_real_images(name, self.size, samples.channels or 3)
            for name in (self.train, self.heldout)
        )
        check_quantile(QUANTILE, heldout.num_images)
        wanted = samples.resolution
        what = "give images of that size"
        if wanted is not None and wanted[0] == wanted[1]:
            what = f"give --size {wanted[0]}"
        for images in (train, heldout):
            found = with_resolution(images).resolution
            if found is not None and wanted is not None and found != wanted:
                raise ValueError(
                    f"{images.name} holds images of {found[0]}x{found[1]} pixels, and "
                    f"{samples.name} of {wanted[0]}x{wanted[1]}; {what}"
                )
        return train, heldout


def evaluate_images(
    source: Source, measures: Measures, out: Path, base: Path, copies: Copies | None
) -> None:
    """Evaluate images or samples; write the numbers to `out`, pieces and sheets beside `base`."""
    from mezzotint.core.distributed import process_group
    from mezzotint.evaluate import evaluate
    from mezzotint.evaluate.clip_score import check_captions
    from mezzotint.evaluate.extract import with_resolution
    from mezzotint.evaluate.results import keep_other_numbers

    pieces = base.with_suffix(".pieces")
    with process_group() as world:
        # All files are opened first, since opening a feature network may mean a download.
        real, heldout = measures.open_references()
        images = source.open()
        if measures.clip is not None:
            check_captions(images)
        real, sets, clips = measures.open_networks(real)
        training, every = None, [*sets, *(clip.features for clip in clips)]
        if copies is not None:
            images = with_resolution(images)
            training = copies.open(images)
            evaluate.check_held_out_images(*training, every, folder=pieces, show=True)
        evaluation = evaluate.evaluate(
            images, real, sets, heldout=heldout, clips=clips, folder=pieces, show=True
        )
        if world.is_rank0:
            keep_other_numbers(out, evaluation.to_json())
            evaluation.save(out)
            evaluate.print_evaluation(evaluation)
            _print_cut_captions(evaluation, clips)
            echo(f"saved: {out}")
        if training is None:
            return
        sheet = base.with_suffix(".copies.png")
        found = evaluate.evaluate_memorization(
            images, *training, every, sheet, folder=pieces, show=True
        )
        if world.is_rank0:
            echo(f"copy rate: {found.copy_rate:.4g} ({found.quantile:g} without copying)")
            echo(f"probability of being closer: {found.closer:.4g} (0.5 without copying)")
            echo(found.verdict)
            echo(f"nearest training images: {sheet}")


def _print_cut_captions(evaluation: Evaluation, clips: Sequence[Clip]) -> None:
    """Say how many captions were too long for each network."""
    from mezzotint.evaluate.clip_score import metric_name

    for clip in clips:
        cut = (evaluation[metric_name(clip)].reference or {})["cut"]
        if cut:
            echo(f"{cut:,} captions are longer than {clip.max_tokens} tokens and were cut")


def evaluate_sweep(source: Source, measures: Measures, sweep: str, out: Path, base: Path) -> None:
    """Evaluate a model at each guidance scale; write the numbers to `out`, the curve beside `base`.

    Args:
        sweep: as `parse_sweep` takes it.
    """
    from mezzotint.core.distributed import all_ranks, process_group
    from mezzotint.evaluate.results import SWEEP_FIGURES, keep_other_numbers
    from mezzotint.evaluate.sweep import choose_axes, parse_sweep, run_sweep, sweep_jobs

    scales = parse_sweep(sweep)
    if not source.is_model:
        raise ValueError(f"--sweep samples a model, and {source.name} is none")
    if measures.reference is None:
        raise ValueError("--sweep needs --reference: it draws a distance for each scale")

    def open_all() -> tuple[Any, ...]:
        real, _ = measures.open_references()
        jobs = sweep_jobs(source.open_job(sweep=True), scales)
        real, sets, clips = measures.open_networks(real)
        assert real is not None, "it was given"
        choose_axes(real, sets, clips)
        return jobs, real, sets, clips

    with process_group() as world:
        jobs, real, sets, clips = all_ranks(open_all)
        found = run_sweep(
            jobs, source.samples, real, sets, clips=clips, folder=base.with_suffix(".pieces"),
            say=echo if world.is_rank0 else lambda line: None, show=True,
        )  # fmt: skip
    if world.is_rank0:
        keep_other_numbers(out, found.to_json())
        found.save(out)
        figures = [base.with_suffix(suffix) for suffix in SWEEP_FIGURES]
        for figure in figures:
            found.draw(figure)
        echo(f"{found.y} over {found.x}: {', '.join(map(str, figures))}")
        echo(f"saved: {out}")


def evaluate_likelihood(
    source: str, data: str, changes: dict[str, Any], out: Path, pieces: Path
) -> None:
    """Measure bits per dimension of the model at `source`, write them to `out` and print them."""
    from mezzotint.core.distributed import all_ranks, process_group
    from mezzotint.data.image_dataset import ImageDataset, open_images
    from mezzotint.evaluate import likelihood
    from mezzotint.evaluate.results import keep_other_numbers
    from mezzotint.models import open_model
    from mezzotint.process.denoiser import Model

    settings = likelihood.LikelihoodSettings(**changes)

    def open_both() -> tuple[Model, ImageDataset]:
        model = open_model(source)
        config = model.info.config
        likelihood.check_pixels(model.info.codec, config, source)
        return model, open_images(data, size=config.size, channels=config.channels)

    with process_group() as world:
        model, images = all_ranks(open_both)
        found = likelihood.bits_per_dim(
            model, images, settings, name=data, folder=pieces, show=True
        )
    if world.is_rank0:
        keep_other_numbers(out, found.to_json())
        found.save(out)
        likelihood.print_bits_per_dim(found)
        echo(f"saved: {out}")
