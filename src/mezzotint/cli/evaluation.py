"""Commands of evaluation: reference statistics, metrics of images or models, comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mezzotint.cli import measure
from mezzotint.cli.arguments import (
    NUMBER,
    Channels,
    OptionalBatch,
    OptionalChannels,
    OptionalFile,
    OptionalNumImages,
    OptionalText,
    Size,
    Steps,
    Switch,
)
from mezzotint.cli.outputs import check_outside_run, evaluation_base
from mezzotint.core.console import echo
from mezzotint.core.fields import Range
from mezzotint.core.paths import is_hub_name

OptionalCount = Annotated[int | None, NUMBER, Range(1, 10_000)]
_Json = Positional[Annotated[Path, arg(metavar="FILE", help_behavior_hint="")]]


def reference(
    data: Positional[Annotated[str, arg(metavar="DATA", help_behavior_hint="")]],
    out: Positional[Annotated[Path, arg(metavar="OUT", help_behavior_hint="")]],
    /,
    *,
    size: Size = None,
    channels: Channels = 3,
    features: tuple[str, ...] = measure.FEATURES,
    weights: OptionalFile = None,
) -> None:
    """Compute statistics of real images, once for many evaluations, and write them to OUT (.npz).

    Args:
        data: Dataset as for `mezzotint train`, prepared dataset, folder or .zip of images, or .npz.
        out: File to write.
        size: Height and width to crop and resize to; without it, images are taken as stored.
        channels: 3, or 1 for grey.
        features: Feature sets: inception-2048 (FID), inception-768, efficientnet-lite0, dinov2, ...
        weights: Of the feature network; by default the cache, or a download with a pinned hash.
    """
    from mezzotint.core.files import check_replaceable, is_special
    from mezzotint.evaluate import features as feature_sets
    from mezzotint.evaluate.image_source import open_real_images
    from mezzotint.evaluate.references import is_reference, make_reference

    check_outside_run(out)
    if out.suffix.lower() != ".npz" and not is_special(out):
        raise ValueError(f"a reference is written as .npz; given {out}")
    check_replaceable(out, is_reference, "a reference")
    # Images are opened first, since opening a feature network may mean a download.
    images = open_real_images(data, size, channels)
    written = make_reference(images, out, feature_sets.open_features(features, weights))
    names = ", ".join(written.statistics)
    how = written.metadata["preprocessing"]
    echo(f"{out}: {names} of {images.num_images:,} images ({how}), hash {written.hash}")


def evaluate(
    source: Positional[Annotated[str, arg(metavar="SOURCE", help_behavior_hint="")]],
    /,
    *,
    reference: Annotated[str | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    reference_source: OptionalText = None,
    features: Annotated[tuple[str, ...] | None, arg(metavar="A B", help_behavior_hint="")] = None,
    weights: OptionalFile = None,
    heldout: OptionalText = None,
    num_images: OptionalNumImages = None,
    size: Size = None,
    channels: OptionalChannels = None,
    protocol: OptionalText = None,
    sampler: OptionalText = None,
    steps: Steps = None,
    guidance: Annotated[str | None, arg(metavar="S", help_behavior_hint="")] = None,
    prompts: OptionalFile = None,
    encoder: OptionalText = None,
    dtype: OptionalText = None,
    clip: Annotated[tuple[str, ...] | None, arg(metavar="[M ...]", help_behavior_hint="")] = None,
    sweep: OptionalText = None,
    train_images: OptionalText = None,
    heldout_images: OptionalText = None,
    bits_per_dim: Switch = False,
    data: Annotated[str | None, arg(metavar="DATA", help_behavior_hint="")] = None,
    draws: OptionalCount = None,
    ode_steps: OptionalCount = None,
    logsnr: Annotated[tuple[float, float] | None, arg(metavar="L H", help_behavior_hint="")] = None,
    batch: OptionalBatch = None,
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="FILE", help_behavior_hint="")] = None,
) -> None:
    """Evaluate images or a model: against a reference or captions, or a model's likelihood.

    Args:
        source: Run or model folder, eurosat-64, hub name; folder, .zip or .npz of images.
        reference: Statistics of real images: ours, or of ADM, EDM, EDM2, pytorch-fid, clean-fid.
        reference_source: For a file with only mu and sigma: adm, edm, pytorch-fid or clean-fid.
        features: inception-2048 (FID), efficientnet-lite0, dinov2, ...; the reference's own.
        weights: Of the feature network; by default the cache, or a download with a pinned hash.
        heldout: A reference of real images not trained on, for FDr.
        num_images: Samples of a model; images of --data at most. 50,000 by default.
        size: Height and width that --train-images and --heldout-images are resized to.
        channels: Of images: 3 by default, or 1 for grey.
        protocol: For a model, as in `mezzotint sample`.
        sampler: For a model.
        steps: Of a model's sampler, or of the bound of --bits-per-dim (without: continuous).
        guidance: For a model.
        prompts: One per line; with --protocol coco-fid-30k, COCO's captions (JSON).
        encoder: Folder of a model's text encoder, if it moved.
        dtype: For a model's samples, as in `mezzotint sample`.
        clip: CLIP score, by ViT-L/14 or by these: hub names or folders.
        sweep: guidance=1,2,4: draw CLIP score (else IS, precision) over distance.
        train_images: Training images, for a copy rate and a sheet of nearest neighbours.
        heldout_images: Real images not trained on, needed with --train-images.
        bits_per_dim: Bound the model's negative log-likelihood on --data; for models of pixels.
        data: With --bits-per-dim: images not trained on, e.g. FOLDER:test.
        draws: With --bits-per-dim: noise levels for each image; 16 by default.
        ode_steps: With --bits-per-dim: add the estimate by the probability flow in so many steps.
        logsnr: With --bits-per-dim: the noisy and the clean end; -5 13.3 by default.
        batch: With --bits-per-dim: images at a time; 64 by default.
        out: Results: evaluation.json or sweep.json by default; resumable.
    """
    if (train_images is None) != (heldout_images is None):
        raise ValueError(
            "--train-images and --heldout-images need each other; give both or neither"
        )
    of_likelihood = {
        "--data": data, "--draws": draws, "--ode-steps": ode_steps, "--logsnr": logsnr,
        "--batch": batch,
    }  # fmt: skip
    of_samples = {
        "--reference": reference, "--heldout": heldout, "--protocol": protocol,
        "--sampler": sampler, "--guidance": guidance, "--dtype": dtype, "--size": size,
        "--train-images": train_images, "--prompts": prompts, "--encoder": encoder,
        "--clip": clip, "--sweep": sweep, "--features": features, "--weights": weights,
        "--channels": channels, "--reference-source": reference_source,
    }  # fmt: skip
    for name, value in (of_samples if bits_per_dim else of_likelihood).items():
        if value is not None:
            other = "samples of a model" if bits_per_dim else "--bits-per-dim"
            raise ValueError(f"{name} is of {other}; evaluate samples and likelihood one by one")
    if size is not None and train_images is None:
        raise ValueError(
            "--size is of --train-images and --heldout-images; samples are evaluated in their own"
        )
    if sweep is not None and (heldout is not None or train_images is not None):
        raise ValueError("--sweep takes no --heldout and no --train-images; evaluate one scale")
    kind = "evaluation" if sweep is None else "sweep"
    out = Path(f"{kind}.json") if out is None else out
    base = evaluation_base(out, kind)
    if bits_per_dim:
        if data is None:
            raise ValueError(
                "--bits-per-dim needs --data: images that the model was not trained on, e.g. "
                "FOLDER:test"
            )
        changes = {"draws": draws, "ode_steps": ode_steps, "logsnr": logsnr, "batch": batch}
        changes |= {"num_images": num_images or 50_000, "steps": steps}
        given = {k: v for k, v in changes.items() if v is not None}
        measure.evaluate_likelihood(source, data, given, out, base.with_suffix(".pieces"))
        return
    images = measure.Source(
        name=source, num_images=num_images, channels=channels, protocol=protocol, sampler=sampler,
        steps=steps, guidance=guidance, prompts=prompts, encoder=encoder,
        dtype=dtype,
    )  # fmt: skip
    if channels is not None and images.is_model:
        where = "" if Path(source).exists() or not is_hub_name(source) else ", as no file is there"
        raise ValueError(f"--channels is of images, and {source} is a model{where}; leave it out")
    measures = measure.Measures(
        reference=reference, reference_source=reference_source, heldout=heldout,
        features=features, weights=weights, clip=clip,
    )  # fmt: skip
    if sweep is not None:
        measure.evaluate_sweep(images, measures, sweep, out, base)
        return
    if reference is None and clip is None:
        raise ValueError(
            "--reference is missing: statistics of real images (mezzotint reference makes them); "
            "or measure something else: --clip, or --bits-per-dim --data SET"
        )
    if reference is None and train_images is not None:
        raise ValueError("--train-images needs --reference: copies are sought in its features")
    of_reference = {
        "--reference-source": reference_source, "--heldout": heldout, "--features": features,
        "--weights": weights,
    }  # fmt: skip
    for name, value in of_reference.items():
        if reference is None and value is not None:
            raise ValueError(f"{name} needs --reference; give both or leave it out")
    copies = None
    if train_images is not None and heldout_images is not None:
        copies = measure.Copies(train=train_images, heldout=heldout_images, size=size)
    measure.evaluate_images(images, measures, out, base, copies)


def compare(first: _Json, second: _Json, /, *, anyway: Switch = False) -> None:
    """Compare two evaluations, if their numbers were made in the same way.

    Args:
        first: Written by `mezzotint evaluate`.
        second: Another one.
        anyway: Print the numbers even if they are not comparable, with the reasons in red.
    """
    from mezzotint.evaluate import results

    a, b = results.load_evaluation(first), results.load_evaluation(second)
    check = results.compare if anyway else results.require_comparable
    results.print_comparison(a, b, check(a, b))


def reproduce(
    name: Positional[Annotated[str, arg(metavar="NAME", help_behavior_hint="")]],
    /,
    *,
    model: OptionalText = None,
    reference: OptionalText = None,
    num_images: OptionalNumImages = None,
    steps: Steps = None,
    prompts: OptionalText = None,
    features: tuple[str, ...] = measure.FEATURES,
    weights: OptionalFile = None,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("runs/reproduce"),
    dry_run: Switch = False,
) -> None:
    """Measure a number that a paper reports: sample with its protocol, evaluate, print both.

    Args:
        name: dimr-xl-2r-256, dimr-g-2r-256, dimr-xl-3r-512, diffit-256, diffit-512, uvit-256, ...
        model: Model folder of the weights (mezzotint convert makes it from the authors' file).
        reference: File of real statistics; the printed table says which.
        num_images: By default the paper's: 50,000, or 30,000 of text.
        steps: Fewer than the protocol's, for a rehearsal; the evaluation records it.
        prompts: For a model of text: captions_val2014.json of COCO 2014.
        features: Other feature sets than the papers', for a rehearsal.
        weights: Of the feature network.
        out: Folder for the evaluation and for stored features.
        dry_run: Print the paper's number, what is needed and the cost; run nothing.
    """
    from mezzotint.core.distributed import process_group
    from mezzotint.tools.reproduce import reproduce as run

    if not dry_run:
        evaluation_base(out / "evaluation.json")
    with process_group():
        run(
            name, model=model, reference=reference, num_images=num_images, steps=steps,
            prompts=prompts, features=features, weights=weights, out=out, dry_run=dry_run,
        )  # fmt: skip
