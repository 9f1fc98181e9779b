"""Likelihood of a model of pixels in bits per dimension: variational bound, and an ODE estimate.

A dimension is one colour value of one pixel. `process.likelihood` has the mathematics.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from mezzotint import __version__
from mezzotint.backbones import native_size, needs_label, text_width
from mezzotint.core import rng
from mezzotint.core.console import echo
from mezzotint.core.distributed import all_ranks, on_rank0
from mezzotint.core.fields import MOST_SEED, Checked, Range
from mezzotint.core.tensor_files import sha256_of_module
from mezzotint.data.caption_embeddings import CaptionEmbeddings, embed_captions
from mezzotint.data.dataset import renumber
from mezzotint.data.image_dataset import ImageDataset
from mezzotint.data.labels import NO_LABEL
from mezzotint.data.shuffle import shuffled_indices
from mezzotint.data.sources import hash_parts
from mezzotint.data.transforms import to_model_range
from mezzotint.evaluate.evaluate import print_evaluation
from mezzotint.evaluate.extract import compute_by_piece
from mezzotint.evaluate.image_source import check_readable, describe_average
from mezzotint.evaluate.results import Evaluation, Number, Protocol
from mezzotint.models import ModelInfo
from mezzotint.process.denoiser import Cond, Denoiser, Model
from mezzotint.process.likelihood import (
    diffusion_levels,
    diffusion_term,
    flow_log_density,
    prior_term,
    reconstruction_term,
)
from mezzotint.sampling.conditioning import text_encoder_for
from mezzotint.sampling.denoisers import model_denoiser
from mezzotint.sampling.settings import SamplingSettings

BOUND, ODE = "bits/dim", "bits/dim by ODE"
TERMS = ("reconstruction", "prior", "diffusion")
# `to_model_range` of k: what the network is trained on. VDM's is 2 (k + 1/2) / 256 - 1.
RULE = "x = k / 127.5 - 1 for k = 0...255"
SPACING = 2 / 255  # of neighbouring values

LogSNR = Annotated[float, Range(-30, 30, "a log-SNR; VDM learnt -5 and 13.3")]


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings(Checked):
    """Settings of the likelihood.

    num_images: at most so many, evenly spaced over the dataset; None for all.
    draws: noise levels of each image, evenly spaced with a stratified offset.
    steps: of an ancestral sampler, even in log-SNR, whose bound it is; None for infinitely many.
    ode_steps: of the probability flow; None leaves out its estimate.
    logsnr: the noisy and the clean end. Any give a bound.
    seed: of every draw. batch: images at a time.
    """

    num_images: Annotated[int, Range(1, 10_000_000)] | None = None
    draws: Annotated[int, Range(1, 10_000)] = 16
    steps: Annotated[int, Range(1, 1_000_000)] | None = None
    ode_steps: Annotated[int, Range(1, 10_000)] | None = None
    logsnr: tuple[LogSNR, LogSNR] = (-5.0, 13.3)
    seed: Annotated[int, Range(0, MOST_SEED)] = 0
    batch: Annotated[int, Range(1, 1_000_000, "images at a time")] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.logsnr
        if not low < high:
            raise ValueError(
                f"logsnr {low:g} {high:g}: the noisy end must lie below the clean end; VDM's are "
                "-5 13.3"
            )


def check_pixels(codec: str, config: Any, name: str) -> None:
    """Raise ValueError for a model of latents, or of images that are no square."""
    height, width = native_size(config)
    if height != width:
        raise ValueError(
            f"{name} makes images of {height}x{width}; the likelihood is measured on square ones"
        )
    if codec != "pixels":
        raise ValueError(
            f"{name} works in latents of {codec}, whose density is not that of images: the "
            "autoencoder loses detail and has no likelihood; give a model of pixels, or compare "
            "samples (--reference)"
        )


def bits_per_dim(
    model: Model,
    images: ImageDataset,
    settings: LikelihoodSettings | None = None,
    *,
    name: str = "images",
    folder: str | Path | None = None,
    show: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Return an upper bound on -log2 p(image) per colour value, its three terms and their errors.

    The model gets the labels or captions of the images, if it reads them: p is conditional then.
    Every draw is a function of the seed and the image's number, so the result does not depend on
    the number of ranks; nor on the batch, on a GPU up to rounding. Errors are standard errors over
    images. All ranks call this together and get the same.

    Args:
        images: of the model's size and channels; ones that it was not trained on.
        name: of the data set, for the card.
        folder: for finished pieces, to resume; all ranks must see it.
        show: show progress.
        stopping: read before every batch; RuntimeError once it is true.

    Errors: ValueError for a model of latents and for images that do not fit the model;
        FloatingPointError for a result that is not finite.
    """
    settings = settings or LikelihoodSettings()
    count = min(len(images), settings.num_images or len(images))
    used = _choose_images(len(images), count)
    condition = all_ranks(lambda: check_fits(model.info, images, name))
    model_hash = sha256_of_module(model.backbone)
    captions = _open_captions(model, images, used)
    names = [*TERMS, *([ODE] if settings.ode_steps else [])]
    # Neither the batch nor the ranks change a value.
    essence = dataclasses.asdict(dataclasses.replace(settings, num_images=count, batch=1))
    data_hash = _hash_data(model.info, images, used)
    key = json.dumps(["bits per dim 1", model_hash, data_hash, essence])
    # Graphs have no gradients, which the probability flow needs.
    denoise = model_denoiser(model, SamplingSettings(dtype="float32", cuda_graphs=False))
    training = model.training

    def compute(start: int, stop: int) -> dict[str, Tensor]:
        parts = []
        for first in range(start, stop, settings.batch):
            if stopping():
                raise RuntimeError("the run was asked to stop")
            numbers = list(range(first, min(stop, first + settings.batch)))
            chosen = [used[i] for i in numbers]
            codes, labels = images.batch(chosen)
            check_readable(images, chosen)
            cond = _condition(model.info, images, labels, captions, numbers)
            parts.append(_image_terms(model, denoise, codes, cond, numbers, count, settings))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    model.eval()
    try:
        title = f"bits per dimension of {name}"
        terms = compute_by_piece(compute, names, count, title, folder, lambda: key, show)
    finally:
        model.train(training)

    def summarise() -> Evaluation:
        assert terms is not None, "rank 0 has them"
        data = {"name": name, "hash": data_hash, "num_images": len(images)}
        details = _describe(settings, condition)
        numbers = _summarise(terms, images.channels * images.size**2, details, data)
        return Evaluation(protocol=_make_protocol(model, images, count), numbers=tuple(numbers))

    return on_rank0(summarise)


def is_of(
    evaluation: Evaluation, model: Model, images: ImageDataset, settings: LikelihoodSettings
) -> bool:
    """Return whether an evaluation is what `bits_per_dim` returns for these arguments."""
    first, count = evaluation.numbers[0], min(len(images), settings.num_images or len(images))
    condition = check_fits(model.info, images, "the data set")
    data_hash = _hash_data(model.info, images, _choose_images(len(images), count))
    return (
        evaluation.protocol == _make_protocol(model, images, count)
        and first.settings == _describe(settings, condition)
        and (first.reference or {}).get("hash") == data_hash
        and any(n.metric == ODE for n in evaluation.numbers) == bool(settings.ode_steps)
    )


def _choose_images(total: int, count: int) -> list[int]:
    """Return numbers of images, evenly spaced: datasets are often sorted by class."""
    return [i * total // count for i in range(count)]


def _hash_data(info: ModelInfo, images: ImageDataset, used: Sequence[int]) -> str:
    """Return a hash of the images, and of the captions of those used if the model reads text."""
    if not text_width(info.config):
        return images.fingerprint
    return hash_parts([images.fingerprint, *(images.text(i) or "" for i in used)])


def _make_protocol(model: Model, images: ImageDataset, count: int) -> Protocol:
    """Return the protocol of a model's likelihood on `count` of these images."""
    info = model.info
    return Protocol(
        source=f"{info.preset or info.backbone} {sha256_of_module(model.backbone)[:16]}",
        num_images=count,
        code_version=__version__,
        resolution=(images.size, images.size),
        ema=describe_average(info.extra),
        training_images=info.images,
        dtype="float32",
        uint8_rule=RULE,
        preprocessing=f"crop {images.crop} to {images.size} px",
    )


def _describe(settings: LikelihoodSettings, condition: str) -> dict[str, Any]:
    """Return the settings of the bound as JSON values."""
    return {
        "logsnr": list(settings.logsnr),
        "steps": settings.steps or "continuous",
        "draws": settings.draws,
        "condition": condition,
        "seed": settings.seed,
    } | ({"ode_steps": settings.ode_steps} if settings.ode_steps else {})


def check_fits(info: ModelInfo, images: ImageDataset, name: str) -> str:
    """Check that the images fit the model; return what the model is conditioned on."""
    config = info.config
    check_pixels(info.codec, config, info.preset or info.backbone)
    wanted, given = (config.channels, config.size), (images.channels, images.size)
    if wanted != given:
        raise ValueError(
            f"{name} has images of {given[0]} channels and {given[1]} pixels, the model is of "
            f"{wanted[0]} and {wanted[1]}; open them with size={wanted[1]}, channels={wanted[0]}"
        )
    reads = ["captions"] if text_width(config) else []
    if not config.num_classes:
        return reads[0] if reads else "nothing"
    if needs_label(config) and (images.labels is None or images.count_unlabelled()):
        raise ValueError(
            f"the model has no null label and {name} has images without a label; give every image "
            "its class"
        )
    if images.labels is None:
        return " and ".join([*reads, "no class"])
    unknown = sorted({*(images.label_names or ())} - {*(info.labels or images.label_names or ())})
    if unknown or images.num_classes > config.num_classes:
        what = f"class {unknown[0]!r}" if unknown else f"{images.num_classes} classes"
        raise ValueError(
            f"{name} has {what}, and the model was trained on {config.num_classes} others; give "
            "images of its classes, in folders of the same names"
        )
    return " and ".join([*reads, "class labels"])


def _open_captions(
    model: Model, images: ImageDataset, used: Sequence[int]
) -> CaptionEmbeddings | None:
    """Return the embedded captions of the images used, for a model that reads text."""
    if not text_width(model.info.config):
        return None

    def embed() -> CaptionEmbeddings:
        return embed_captions([images.text(i) for i in used], text_encoder_for(model))

    def fill_cache() -> None:
        embed()

    on_rank0(fill_cache)
    return all_ranks(embed)


def _condition(
    info: ModelInfo,
    images: ImageDataset,
    labels: Tensor | None,
    captions: CaptionEmbeddings | None,
    numbers: list[int],
) -> Cond:
    """Return the condition of images by number; an image without a label has the null label."""
    cond = Cond()
    if info.config.num_classes and labels is not None:
        if info.labels is not None:
            named = renumber(labels.numpy(), images.label_names, info.labels)
            labels = torch.from_numpy(named)
        cond = Cond(label=torch.where(labels == NO_LABEL, info.config.num_classes, labels))
    if captions is not None:
        text, mask = captions.batch(numbers)
        cond = dataclasses.replace(cond, text=text, text_mask=mask)
    return cond


def _image_terms(
    model: Model,
    denoise: Denoiser,
    codes: Tensor,
    cond: Cond,
    numbers: list[int],
    count: int,
    settings: LikelihoodSettings,
) -> dict[str, Tensor]:
    """Return the terms of a batch in nats per image, by name, float64 on the CPU.

    Args:
        codes: uint8 (b, c, h, w).
        numbers: of the images, consecutive, of `count`.
    """
    device, shape = next(model.parameters()).device, tuple(codes.shape[1:])
    (low, high), seed = settings.logsnr, settings.seed
    x, cond = to_model_range(codes.to(device)), cond.map(lambda t: t.to(device))
    values = to_model_range(torch.arange(256, dtype=torch.uint8, device=device))

    def noise(draw: int) -> Tensor:
        return rng.normal("noise", seed, numbers, shape, draw=draw).to(device)

    with torch.no_grad():
        terms = {
            "reconstruction": reconstruction_term(codes.to(device), noise(0), high, values),
            "prior": prior_term(x, low),
            "diffusion": torch.zeros(len(numbers)),
        }
        # Every image's levels are evenly spaced, and the offsets of all images are too: a shuffled
        # stratum for each, since datasets are often sorted.
        stratum = shuffled_indices(seed, numbers[0], len(numbers), count)
        offset = (stratum + rng.uniform("time", seed, numbers)) / count
        for k in range(settings.draws):
            u = (k + offset) / settings.draws
            logsnr, measure = diffusion_levels(u, low, high, settings.steps)
            drawn = diffusion_term(denoise, x, noise(1 + k), logsnr, measure, cond)
            terms["diffusion"] = terms["diffusion"] + drawn.cpu() / settings.draws
        if settings.ode_steps:
            # A uniform number within its code's interval has at most the probability of the code,
            # on average (arXiv 1511.01844, section 3.1).
            inside = [rng.philox("sample", seed, i).random(shape, np.float32) for i in numbers]
            dequantised = x + (torch.from_numpy(np.stack(inside)).to(device) - 0.5) * SPACING
            probes = (rng.normal("sampler", seed, numbers, shape) < 0).to(x) * 2 - 1
            falling = torch.linspace(high, low, settings.ode_steps + 1, dtype=torch.float64)
            log_p = flow_log_density(denoise, dequantised, probes, falling, cond)
            terms[ODE] = -(log_p + codes[0].numel() * math.log(SPACING))
    terms = {name: term.double().cpu() for name, term in terms.items()}
    for name, term in terms.items():
        if not term.isfinite().all():
            raise FloatingPointError(
                f"the {name} term of image {numbers[0]} or one of the next {len(numbers) - 1} is "
                "not a finite number; the weights are damaged, or a log-SNR is too large"
            )
    return terms


def _summarise(
    terms: dict[str, Tensor], dims: int, details: dict[str, Any], data: dict[str, Any]
) -> list[Number]:
    """Return means over images in bits per dimension, each with its standard error."""
    bits = {name: term / (dims * math.log(2)) for name, term in terms.items()}
    columns = {BOUND: torch.stack([bits[name] for name in TERMS]).sum(0)}
    columns |= {f"{BOUND} of {name}": bits[name] for name in TERMS}
    columns |= {ODE: bits[ODE]} if ODE in bits else {}
    return [
        Number(
            metric=metric,
            value=float(column.mean()),
            features={},
            reference=data,
            error=float(column.std() / math.sqrt(len(column))) if len(column) > 1 else None,
            settings=details,
        )
        for metric, column in columns.items()
    ]


def print_bits_per_dim(evaluation: Evaluation) -> None:
    """Print the numbers, the protocol, the data set and the settings."""
    # Sampler, guidance and the like have no meaning here.
    print_evaluation(evaluation, show_unknown=False)
    data, settings = evaluation[BOUND].reference or {}, evaluation[BOUND].settings
    echo(f"data set: {data['name']}, {data['num_images']:,} images, hash {data['hash']}")
    low, high = settings["logsnr"]
    echo(
        f"given the model: {settings['condition']}; log-SNR {low:g} to {high:g}, steps: "
        f"{settings['steps']}; {settings['draws']} noise levels for each image, seed "
        f"{settings['seed']}"
    )
