"""The command that tunes the sampling of a trained model: tune."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from mezzotint.cli.arguments import NUMBER, Batch, OptionalFile, OptionalText, Seed, Steps
from mezzotint.cli.outputs import check_outside_run
from mezzotint.core.console import echo
from mezzotint.core.fields import Range

if TYPE_CHECKING:
    from mezzotint.evaluate.references import Reference


def tune(
    model: Positional[Annotated[Path, arg(metavar="RUN", help_behavior_hint="")]],
    /,
    *,
    reference: Annotated[str, arg(metavar="FILE", help_behavior_hint="")],
    calls: Annotated[int, NUMBER, Range(1, 10**15, "network calls")],
    metric: Annotated[Literal["fd", "kid"] | None, arg(help_behavior_hint="")] = None,
    features: OptionalText = None,
    weights: OptionalFile = None,
    reference_source: OptionalText = None,
    sampler: str = "ddim",
    steps: Steps = None,
    prompts: OptionalFile = None,
    encoder: OptionalText = None,
    seed: Seed = 1_000_000,
    batch: Batch = 64,
    resamples: Annotated[int, NUMBER, Range(0, 100_000)] = 100,
) -> None:
    """Tune how a model is sampled: guidance scale, guidance interval and EMA width.

    The best settings become the model's own: `sample`, `edit`, `evaluate` and `serve` use them
    where you give none. The same command resumes.

    Args:
        model: Run folder (RUN/tuned is written) or model folder (its config.json is).
        reference: Statistics of real images (mezzotint reference makes them).
        calls: Network calls to spend in all; a guided step is two for an image.
        metric: fd (Frechet distance) or kid; by default kid where the reference keeps features.
        features: One feature set of the reference; by default its first.
        weights: Of the feature network; by default the cache, or a download with a pinned hash.
        reference_source: For a file with only mu and sigma: adm, edm, pytorch-fid or clean-fid.
        sampler: Of every candidate, as in `mezzotint sample`.
        steps: Of the sampler; 50 by default. Few steps leave calls for more images.
        prompts: File of prompts, one per line, for a model with text conditioning.
        encoder: Folder of the text encoder, if it moved.
        seed: Seed of the first image; 1000000 by default, beyond those of most evaluations.
        batch: Images per network call; 64 by default.
        resamples: For the intervals of the last comparison; 0 for none: the smallest distance wins.
    """
    from mezzotint.core.distributed import process_group
    from mezzotint.evaluate.features import open_features
    from mezzotint.evaluate.references import complete_reference, read_reference
    from mezzotint.evaluate.tune import tune as run
    from mezzotint.evaluate.tune_record import print_record
    from mezzotint.evaluate.tuner import TuneSettings
    from mezzotint.sampling.prompts import read_texts

    check_outside_run(model)
    settings = TuneSettings(
        calls=calls, metric=metric, sampler=sampler, steps=steps or 50, batch=batch, seed=seed,
        prompts=read_texts(prompts) if prompts else (), encoder=encoder, resamples=resamples,
    )  # fmt: skip
    with process_group() as world:
        real = read_reference(reference, reference_source)
        [feature_set] = open_features([features or first_feature_set(real)], weights)
        real = complete_reference(real, [feature_set])
        say = echo if world.is_rank0 else lambda line: None
        folder, record = run(model, real, feature_set, settings, world, say, show=True)
    if not world.is_rank0:
        return
    print_record(record)
    winner = record.winner
    echo(f"chosen: {winner.describe()}")
    default, *others = record.comparison
    if winner is default and any(t.value < default.value for t in others):
        echo("the default stays: smaller distances have intervals that reach 0; give more --calls")
    elif winner is default:
        echo("the default stays: nothing was better on fresh seeds")
    echo(f"saved: {folder}; used where no option is given")
    echo(f"next: mezzotint sample {quote(str(model))} -n 16 --out samples.png")


def first_feature_set(reference: Reference) -> str:
    """Return the first feature set of a reference that gives a distance."""
    names = [*reference.statistics, *reference.features]
    usable = [name for name in names if not name.startswith(("inception-logits", "inception-sfid"))]
    return usable[0] if usable else "inception-2048"
