"""`mezzotint reproduce`: a claim, what it takes, and the whole protocol from weights to the number beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import mezzotint.backbones as backbones
from mezzotint import models
from mezzotint.core.registry import suggest
from mezzotint.evaluate.evaluate import MetricSettings as Metrics
from mezzotint.evaluate.evaluate import evaluate, print_evaluation
from mezzotint.evaluate.features import FeatureSet, open_features
from mezzotint.evaluate.image_source import from_job
from mezzotint.evaluate.references import complete_reference, read_reference
from mezzotint.evaluate.results import Evaluation
from mezzotint.sampling import protocols
from mezzotint.sampling.job import SamplingJob, make_job
from mezzotint.tools.summary import read_summary

FID_SETS = ("inception-2048", "inception-sfid", "inception-logits")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A paper's result and the protocol behind it. metric -> the number as printed; None of `changes` is ours.

    protocol: of `protocols.PROTOCOLS`, with `changes` to its settings. reference: the file of real images' statistics.
    weights: where they are to be had, or why not.
    """

    numbers: dict[str, str]
    protocol: str
    weights: str
    reference: str = "VIRTUAL_imagenet256_labeled.npz of ADM's evaluation suite, about 2 GB"


_DIMR = "the release of qihao067/DiMR (docs/checkpoints.md); research use"
_DIFFIT = "the release of NVlabs/DiffiT (docs/checkpoints.md); CC-BY-NC-SA-4.0, non-commercial"
_NONE = "none were released; train the recipe of the same name"
_512 = "VIRTUAL_imagenet512.npz of ADM's evaluation suite, about 2 GB"

# specs/dimr.md section 7, specs/diffit.md section 6, specs/simple-diffusion.md sections 8 and 9.
CLAIMS: dict[str, Claim] = {
    "dimr-xl-2r-256": Claim(
        numbers={"FID": "1.70", "Inception Score": "289.0"}, protocol="dimr-256", weights=_DIMR
    ),
    "dimr-g-2r-256": Claim(
        numbers={"FID": "1.63", "Inception Score": "292.5"}, protocol="dimr-256", weights=_DIMR
    ),
    "dimr-xl-3r-512": Claim(
        numbers={"FID": "2.89", "Inception Score": "289.8"},
        protocol="dimr-256",
        weights=_DIMR,
        reference=_512,
    ),
    "diffit-256": Claim(
        numbers={"FID": "1.73", "sFID": "4.54", "Inception Score": "276.49"},
        protocol="diffit-256",
        weights=_DIFFIT,
    ),
    "diffit-512": Claim(
        numbers={"FID": "2.67", "sFID": "4.99", "Inception Score": "252.12"},
        protocol="diffit-512",
        weights=_DIFFIT,
        reference=_512,
    ),
    "uvit-256": Claim(
        numbers={"FID": "2.77", "Inception Score": "211.8"},
        protocol="simple-diffusion-512steps",
        weights=_NONE,
    ),
    "uvit-512": Claim(
        numbers={"FID": "3.54", "Inception Score": "205.3"},
        protocol="simple-diffusion-512steps",
        weights=_NONE,
        reference=_512,
    ),
}


def claim_of(name: str) -> Claim:
    """The claim of a preset; ValueError lists near names."""
    if name not in CLAIMS:
        raise ValueError(f"no claim to reproduce for {name!r}; {suggest(name, CLAIMS)}")
    return CLAIMS[name]


def needs(name: str, model: str | None, reference: str | None) -> Table:
    """What the protocol takes, and whether it was given and is there."""
    claim = claim_of(name)
    protocol = protocols.get_protocol(claim.protocol)
    table = Table("needed", "what", "here", title=f"to reproduce {name}", title_justify="left")
    state = (
        "not given: --model"
        if model is None
        else ("yes" if Path(model).exists() else f"no file at {model}")
    )
    table.add_row("weights", claim.weights, state)
    table.add_row(
        "autoencoder",
        protocol.codec,
        "pixels need none" if protocol.codec == "pixels" else "see prefetch",
    )
    state = (
        "not given: --reference"
        if reference is None
        else ("yes" if Path(reference).exists() else "no such file")
    )
    table.add_row("reference", claim.reference, state)
    table.add_row(
        "features", "pt_inception-2015-12-05-6726825d.pth, 91 MB", "--weights, or the cache"
    )
    table.add_row("protocol", f"{claim.protocol}: {protocol.source}", "built in")
    table.add_row("left open", protocol.chosen, "our choice")
    return table


def price(name: str, n: int) -> str:
    """Multiply-accumulates of the whole protocol for n images, in words."""
    job = _job(name, None)
    total = read_summary(name)["gmac"] * job.network_calls * n
    ceilings = ", ".join(
        f"{total * 2e9 / (f * 790e12) / 3600:,.1f} h at {f:.0%}" for f in (0.6, 0.4)
    )
    return (
        f"{n:,} images x {job.network_calls} network calls x {read_summary(name)['gmac']:.1f} GMAC = {total / 1e9:,.2f} EMAC; "
        f"on one accelerator of 790 TFLOP/s (bf16 matrix product, measured on an H200): {ceilings} of that"
    )


def reproduce(
    name: str,
    *,
    model: str | None = None,
    reference: str | None = None,
    n: int = 50_000,
    out: Path = Path("runs/reproduce"),
    weights: Path | None = None,
    features: tuple[str, ...] = FID_SETS,
    steps: int | None = None,
    dry_run: bool = False,
) -> Evaluation | None:
    """Print the claim, what it needs and its price; then sample, judge, and print claimed beside measured.

    Args:
        name: of `CLAIMS`. model: a model folder (see `mezzotint convert`). reference: file of real statistics.
        n: images; the papers' is 50,000. out: folder for pieces and the result. dry_run: print and stop.
        weights: of the features' network; the cache by default. features: other sets than the paper's, and
        steps: fewer than the protocol's, to rehearse; the card says both.

    Errors: ValueError for an unknown name and for what is missing.
    """
    claim = claim_of(name)
    console = Console()
    console.print(f"{name} claims " + ", ".join(f"{k} {v}" for k, v in claim.numbers.items()))
    console.print(needs(name, model, reference))
    if dry_run:
        console.print(price(name, n))
        return None
    if model is None or reference is None:
        raise ValueError(
            "give --model FOLDER and --reference FILE (the table says where they are), or --dry-run"
        )
    sets = open_features(features, weights)
    return run_protocol(_job(name, model, steps), claim, reference, sets, n, out)


def _job(name: str, model: str | None, steps: int | None = None) -> SamplingJob:
    protocol = claim_of(name).protocol
    if model is not None:
        return make_job(model, {} if steps is None else {"steps": steps}, protocol=protocol)
    published = protocols.get_protocol(protocol)
    with torch.device("meta"):
        dummy = models.create_model(name)
    return SamplingJob(
        model=dummy,
        settings=published.settings,
        classes=tuple(range(dummy.info.config.num_classes)),
        label_order=published.label_order,
        uint8_rule=published.uint8_rule,
        codec=None,
        protocol=protocol,
    )


def run_protocol(
    job: SamplingJob, claim: Claim, reference: str, sets: list[FeatureSet], n: int, out: Path
) -> Evaluation:
    """Sample n images under the job, judge them against the reference, save and print the result beside the claim."""
    real = complete_reference(read_reference(reference), sets)
    evaluation = evaluate(from_job(job, n), real, sets, Metrics(), folder=out / "pieces", show=True)
    evaluation.save(out / "evaluation.json")
    print_evaluation(evaluation, claim.numbers)
    Console().print(f"card: {out / 'evaluation.json'}")
    return evaluation


def known() -> list[str]:
    """Names that can be reproduced; every one is a preset."""
    assert all(name in backbones.presets() for name in CLAIMS)
    return sorted(CLAIMS)
