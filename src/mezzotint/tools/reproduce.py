"""Reproduce a published result: sample with the paper's protocol, evaluate, print both numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mezzotint.backbones.flops import GIGA
from mezzotint.core.console import open_console
from mezzotint.core.distributed import get_rank
from mezzotint.core.paths import is_hub_name
from mezzotint.core.registry import suggest
from mezzotint.evaluate.evaluate import evaluate, print_evaluation
from mezzotint.evaluate.features import FeatureSet, open_features
from mezzotint.evaluate.image_source import from_job
from mezzotint.evaluate.references import complete_reference, read_reference
from mezzotint.evaluate.results import Evaluation, keep_other_numbers
from mezzotint.models import create_model
from mezzotint.sampling import protocols
from mezzotint.sampling.coco import read_protocol_texts
from mezzotint.sampling.job import SamplingJob, make_job
from mezzotint.tools.summary import read_summary

FID_SETS = ("inception-2048", "inception-sfid", "inception-logits")
FLOPS = 790e12  # per second of one accelerator: a bf16 matrix product, measured on an H200


_256 = "VIRTUAL_imagenet256_labeled.npz of ADM's evaluation suite, about 2 GB"
_512 = "VIRTUAL_imagenet512.npz of ADM's evaluation suite, about 2 GB"


@dataclass(frozen=True, kw_only=True)
class PublishedResult:
    """A paper's numbers and what they need.

    numbers: metric -> number as printed.
    protocol: of `protocols.PROTOCOLS`.
    weights: where to get them, or why they cannot be had.
    reference: the file of real images' statistics.
    guidance: this size's scale, where the protocol's is that of another.
    num_images: that the paper samples.
    prompts: the file of captions that a model of text needs; None for a model of classes.
    """

    numbers: dict[str, str]
    protocol: str
    weights: str
    reference: str = _256
    guidance: float | None = None
    num_images: int = 50_000
    prompts: str | None = None


_DIMR = "the release of qihao067/DiMR (docs/checkpoints.md); research use"
_DIFFIT = "the release of NVlabs/DiffiT (docs/checkpoints.md); CC-BY-NC-SA-4.0, non-commercial"
_JIT = "the release of LTH14/JiT (docs/checkpoints.md); MIT"
_NONE = "none were released; train the recipe of the same name"

# JiT's size -> (FID, guidance) at 256 and 512 pixels; of B at 512 it is 2.9 to 3.0.
_JIT_RESULTS = {
    "b": (("3.66", 3.0), ("4.02", 3.0)),
    "l": (("2.36", 2.4), ("2.53", 2.5)),
    "h": (("1.86", 2.2), ("1.94", 2.3)),
}

# specs/dimr.md section 7, specs/diffit.md section 6, specs/simple-diffusion.md sections 8 and 9.
PUBLISHED: dict[str, PublishedResult] = {
    "dimr-xl-2r-256": PublishedResult(
        numbers={"FID": "1.70", "IS": "289.0"}, protocol="dimr-256", weights=_DIMR
    ),
    "dimr-g-2r-256": PublishedResult(
        numbers={"FID": "1.63", "IS": "292.5"}, protocol="dimr-256", weights=_DIMR
    ),
    "dimr-xl-3r-512": PublishedResult(
        numbers={"FID": "2.89", "IS": "289.8"},
        protocol="dimr-256",
        weights=_DIMR,
        reference=_512,
    ),
    "diffit-256": PublishedResult(
        numbers={"FID": "1.73", "sFID": "4.54", "IS": "276.49"},
        protocol="diffit-256",
        weights=_DIFFIT,
    ),
    "diffit-512": PublishedResult(
        numbers={"FID": "2.67", "sFID": "4.99", "IS": "252.12"},
        protocol="diffit-512",
        weights=_DIFFIT,
        reference=_512,
    ),
    "uvit-256": PublishedResult(
        numbers={"FID": "2.77", "IS": "211.8"},
        protocol="simple-diffusion-512steps",
        weights=_NONE,
    ),
    "uvit-512": PublishedResult(
        numbers={"FID": "3.54", "IS": "205.3"},
        protocol="simple-diffusion-512steps",
        weights=_NONE,
        reference=_512,
    ),
    # Zero-shot on COCO; the paper's guidance, steps and captions are not known.
    "uvit-text-256": PublishedResult(
        numbers={"FID": "8.30"},
        protocol="coco-fid-30k",
        weights=_NONE,
        reference="of all of COCO 2014's validation images: mezzotint reference COCO/val2014 FILE "
        "--size 256",
        num_images=30_000,
        prompts="captions_val2014.json of COCO 2014; the text encoder T5-XXL",
    ),
} | {
    # specs/jit.md sections 2 and 4.
    f"jit-{letter}-{size}": PublishedResult(
        numbers={"FID": fid},
        protocol=f"jit-{size}",
        weights=_JIT,
        guidance=scale,
        reference=_512 if size == 512 else _256,
    )
    for letter, results in _JIT_RESULTS.items()
    for size, (fid, scale) in zip((256, 512), results, strict=True)
}


def get_published(name: str) -> PublishedResult:
    """Return the published result of a preset; ValueError lists near names."""
    if name not in PUBLISHED:
        raise ValueError(f"no published result for {name!r}; {suggest(name, PUBLISHED)}")
    return PUBLISHED[name]


def _render_requirements(
    name: str, model: str | None, reference: str | None, prompts: str | None
) -> Table:
    """Lay out what the protocol needs, and whether it was given and exists."""
    published = get_published(name)
    protocol = protocols.get_protocol(published.protocol)
    table = Table("needed", "what", "found", title=f"to reproduce {name}", title_justify="left")
    table.add_row("weights", published.weights, _describe_path("--model", model))
    codec = "not needed for pixels" if protocol.codec == "pixels" else "see mezzotint download"
    table.add_row("autoencoder", protocol.codec, codec)
    table.add_row("reference", published.reference, _describe_path("--reference", reference))
    if published.prompts:
        table.add_row("prompts", published.prompts, _describe_path("--prompts", prompts))
    inception = "pt_inception-2015-12-05-6726825d.pth, 91 MB"
    table.add_row("features", inception, "--weights, or the cache")
    table.add_row("protocol", f"{published.protocol}: {protocol.source}", "built in")
    table.add_row("not published", protocol.chosen, "our choice")
    return table


def _describe_path(option: str, path: str | None) -> str:
    if path is None:
        return f"not given: {option}"
    if is_hub_name(path) and not Path(path).exists():
        return "on the hub"
    return "yes" if Path(path).exists() else f"no file at {path}"


def _describe_cost(name: str, num_images: int, steps: int | None) -> str:
    """Return the multiply-accumulates of the whole protocol and the hours they take."""
    calls, gmac = _make_job(name, None, steps).network_calls, read_summary(name)["gmac"]
    total = gmac * GIGA * calls * num_images
    hours = ", ".join(f"{2 * total / (f * FLOPS) / 3600:,.1f} h at {f:.0%}" for f in (0.6, 0.4))
    return (
        f"{num_images:,} images x {calls} network calls x {gmac:.1f} GMAC "
        f"= {total / 1e18:,.2f} EMAC; "
        f"on one accelerator of {FLOPS / 1e12:.0f} TFLOP/s "
        f"(bf16 matrix product, measured on an H200): {hours} of that"
    )


def reproduce(
    name: str,
    *,
    model: str | None = None,
    reference: str | None = None,
    num_images: int | None = None,
    out: Path = Path("runs/reproduce"),
    weights: Path | None = None,
    features: tuple[str, ...] = FID_SETS,
    steps: int | None = None,
    prompts: str | None = None,
    dry_run: bool = False,
) -> Evaluation | None:
    """Print the published numbers, what they need and the cost; then sample, evaluate and compare.

    All ranks call it together; rank 0 prints and writes.

    Args:
        name: key of `PUBLISHED`.
        model: a model folder (see `mezzotint convert`).
        reference: file of real images' statistics.
        num_images: the paper's by default, see `PublishedResult`.
        out: folder for the result and for features of an interrupted evaluation.
        weights: of the feature network; from the cache by default.
        features: other sets than the paper's, for a rehearsal; the result records them.
        steps: fewer than the protocol's, for a rehearsal; the result records them.
        prompts: file of captions, for a model of text; see `read_protocol_texts`.
        dry_run: print the cost and stop.

    Errors: ValueError for an unknown name and for a missing model or reference.
    """
    published = get_published(name)
    num_images = published.num_images if num_images is None else num_images
    console = open_console()
    if get_rank() == 0:
        numbers = ", ".join(f"{metric} {number}" for metric, number in published.numbers.items())
        console.print(f"published for {name}: {numbers}")
        console.print(_render_requirements(name, model, reference, prompts))
        if dry_run:
            console.print(_describe_cost(name, num_images, steps))
    if dry_run:
        return None
    if model is None or reference is None:
        raise ValueError("give --model FOLDER and --reference FILE (see the table), or --dry-run")
    if (published.prompts is None) != (prompts is None):
        needed = "needs" if published.prompts else "takes no"
        raise ValueError(f"{name} {needed} --prompts FILE")
    sets = open_features(features, weights)
    job = _make_job(name, model, steps, prompts)
    return _evaluate_job(job, published, reference, sets, num_images, out)


def _make_job(
    name: str, model: str | None, steps: int | None = None, prompts: str | None = None
) -> SamplingJob:
    """Make the protocol's job for a model, or for the preset without weights to count its cost."""
    result = get_published(name)
    published = protocols.get_protocol(result.protocol)
    settings = published.settings
    if result.guidance is not None and settings.guidance is not None:
        settings = replace(settings, guidance=replace(settings.guidance, scale=result.guidance))
    if model is not None:
        changes: dict[str, Any] = {} if steps is None else {"steps": steps}
        if settings != published.settings:
            changes["guidance"] = settings.guidance
        texts = read_protocol_texts(Path(prompts), result.protocol) if prompts else ()
        return make_job(model, changes, protocol=result.protocol, prompts=texts)
    if steps is not None:
        settings = replace(settings, steps=steps)
    with torch.device("meta"):
        meta_model = create_model(name)
    return SamplingJob(
        model=meta_model,
        settings=settings,
        classes=tuple(range(meta_model.info.config.num_classes)),
        label_order=published.label_order,
        uint8_rule=published.uint8_rule,
        codec=None,
        protocol=result.protocol,
    )


def _evaluate_job(
    job: SamplingJob,
    published: PublishedResult,
    reference: str,
    sets: list[FeatureSet],
    num_images: int,
    out: Path,
) -> Evaluation:
    real = complete_reference(read_reference(reference), sets)
    evaluation = evaluate(from_job(job, num_images), real, sets, folder=out / "pieces", show=True)
    if get_rank() == 0:
        keep_other_numbers(out / "evaluation.json", evaluation.to_json())
        evaluation.save(out / "evaluation.json")
        print_evaluation(evaluation, published.numbers)
        open_console().print(f"saved: {out / 'evaluation.json'}")
    return evaluation
