"""Commands that measure: images against real ones, networks against the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mezzotint.cli.arguments import File, Given, Text


def evaluate(
    source: Positional[Annotated[str, arg(metavar="SOURCE", help_behavior_hint="")]] = "",
    /,
    *,
    reference: Annotated[str, arg(metavar="FILE", help_behavior_hint="")] = "",
    maker: Text = None,
    make_reference: Annotated[
        tuple[str, Path] | None, arg(metavar="DATA OUT", help_behavior_hint="")
    ] = None,
    features: tuple[str, ...] = ("inception-2048", "inception-sfid", "inception-logits"),
    weights: File = None,
    heldout: Text = None,
    n: Annotated[int, arg(aliases=["-n"])] = 50_000,
    size: Given = None,
    channels: int = 3,
    protocol: Text = None,
    sampler: Text = None,
    steps: Given = None,
    guidance: Text = None,
    train_images: Text = None,
    heldout_images: Text = None,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("evaluation.json"),
) -> None:
    """Judge a model, a folder of images or an .npz against a reference; every number comes with its card.

    Args:
        source: Run or model folder, hub name, folder or .zip of PNGs, prepared set, or .npz with arr_0.
        reference: Statistics of real images: ours, or an .npz/.pkl of ADM, EDM, EDM2, pytorch-fid, clean-fid.
        maker: Of a reference of bare mu and sigma: adm, edm, pytorch-fid or clean-fid.
        make_reference: DATA OUT: take the statistics of real images instead, with --size to resize them.
        features: Sets of features, e.g. inception-2048 (FID), inception-768, dinov2, digits.
        weights: Of the features' network; by default the cache, or a download with a pinned hash.
        heldout: A second reference, of real images not trained on: FDr.
        n: Samples to draw of a model.
        size: Height and width real images are cropped and resized to; finished images are taken as they are.
        channels: 3, or 1 for grey.
        protocol: Of sampling, as in `mezzotint sample`; so are sampler, steps and guidance.
        sampler: Of a model.
        steps: Of a model's sampler.
        guidance: Of a model.
        train_images: With --heldout-images: nearest training images beside samples, and a copy rate.
        heldout_images: Real images not trained on.
        out: Where the card goes; pieces of an interrupted evaluation lie beside it.
    """
    from mezzotint.evaluate import evaluate, references
    from mezzotint.evaluate.features import open_features
    from mezzotint.evaluate.image_source import from_job, open_real_images

    # What is asked for is looked at before a network is opened, which may take a download.
    if make_reference is not None:
        pictures = open_real_images(make_reference[0], size, channels)
        made = references.make_reference(
            pictures, make_reference[1], open_features(features, weights)
        )
        print(f"{make_reference[1]}: {', '.join(made.statistics)}, hash {made.hash}")
        return
    if not source or not reference:
        raise ValueError(
            "give what to judge and --reference FILE; --make-reference DATA FILE makes one"
        )
    if (train_images is None) != (heldout_images is None):
        raise ValueError(
            "copies are looked for with both --train-images and --heldout-images; give both or neither"
        )
    real = references.read_reference(reference, maker)
    against = None if heldout is None else references.read_reference(heldout, maker)
    path = Path(source)
    of_a_model = any((path / name).exists() for name in ("config.json", "model", "recipe.yaml"))
    if path.suffix in (".npz", ".zip") or (path.is_dir() and not of_a_model):
        judged = open_real_images(source, None, channels)
    else:
        from mezzotint.sampling import protocols as words
        from mezzotint.sampling.generate_images import make_job

        given = {"steps": steps, "sampler": sampler and words.parse_sampler(sampler)}
        given["guidance"] = guidance and words.parse_guidance(guidance)
        judged = from_job(
            make_job(source, {k: v for k, v in given.items() if v}, protocol=protocol), n
        )
    sets = open_features(features, weights)
    real = references.complete_reference(real, sets)
    found = evaluate.evaluate(
        judged, real, sets, heldout=against, folder=out.with_suffix(".pieces"), show=True
    )
    found.save(out)
    evaluate.print_evaluation(found)
    print(f"card: {out}")
    if train_images is not None and heldout_images is not None:
        shown = [
            open_real_images(images, size, channels) for images in (train_images, heldout_images)
        ]
        copied = evaluate.evaluate_memorization(
            judged, shown[0], shown[1], sets[0], out.with_suffix(".copies.png")
        )
        print(f"copies: {copied}; sheet {out.with_suffix('.copies.png')}")


def compare(first: Positional[Path], second: Positional[Path], /, *, anyway: bool = False) -> None:
    """Compare two evaluations; refused where their cards differ in how the numbers were made.

    Args:
        first: evaluation.json.
        second: evaluation.json.
        anyway: Print the numbers all the same, the differing lines in red.
    """
    from mezzotint.evaluate import results

    a, b = results.load_evaluation(first), results.load_evaluation(second)
    results.print_comparison(
        a, b, results.compare(a, b) if anyway else results.require_comparable(a, b)
    )


def reproduce(
    name: Positional[str],
    /,
    *,
    model: Text = None,
    reference: Text = None,
    n: Annotated[int, arg(aliases=["-n"])] = 50_000,
    steps: Given = None,
    features: tuple[str, ...] = ("inception-2048", "inception-sfid", "inception-logits"),
    weights: File = None,
    out: Annotated[Path, arg(aliases=["-o"])] = Path("runs/reproduce"),
    dry_run: bool = False,
) -> None:
    """A paper's claim, what it needs, and the whole protocol: samples, features, claimed beside measured.

    Args:
        name: dimr-xl-2r-256, dimr-g-2r-256, dimr-xl-3r-512, diffit-256, diffit-512, uvit-256 or uvit-512.
        model: Model folder of the weights (mezzotint convert makes it from the authors' file).
        reference: File of real statistics; the printed table says which.
        n: Images; the papers judge 50,000.
        steps: Fewer than the protocol's, for a rehearsal; the card says so.
        features: Other sets than the papers', for a rehearsal.
        weights: Of the features' network.
        out: Folder for pieces and the card.
        dry_run: Print claim, needs and price; run nothing.
    """
    from mezzotint.tools.reproduce import reproduce as run

    run(
        name, model=model, reference=reference, n=n, steps=steps, features=features, weights=weights, out=out,
        dry_run=dry_run,
    )  # fmt: skip
