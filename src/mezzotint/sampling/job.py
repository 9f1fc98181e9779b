"""Sampling jobs: a model and all settings that determine its samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint import __version__
from mezzotint.backbones import native_size
from mezzotint.core.tensor_files import sha256_of_module
from mezzotint.data import autoencoder
from mezzotint.data.transforms import to_uint8
from mezzotint.models import open_model
from mezzotint.process.denoiser import Cond, Denoiser, Image, Model
from mezzotint.process.samplers import Grid
from mezzotint.sampling import parse, protocols
from mezzotint.sampling.conditioning import (
    encode_prompts,
    label_condition,
    label_indices,
    text_encoder_for,
)
from mezzotint.sampling.denoisers import check_cuda_graphs, is_exact
from mezzotint.sampling.sample import (
    count_network_calls,
    draw_start_noise,
    make_denoiser,
    make_logsnr_steps,
    run_sampler,
    sample_batches,
)
from mezzotint.sampling.settings import SamplingSettings, resolve_dtype
from mezzotint.sampling.tuned import WIDTH, TunedSettings, read_tuned

CARD_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """Everything that decides what the image of a seed looks like.

    model: in eval mode on its device.
    guide_model: a weaker model for autoguidance.
    prompts: of a model with text conditioning, taken in turn by seed.
    encoder: folder of the text encoder, if it is not where the model's info says.
    classes: the classes to choose labels from; empty for no class.
    label_order: of `protocols.LABEL_ORDERS`.
    uint8_rule: of `to_uint8`.
    codec: "pixels" or the autoencoder that decodes (`mezzotint.data.autoencoder.open_codec`); None
        leaves latents.
    protocol: the published protocol that the settings follow or deviate from.
    tuned: the model's own settings, if any; tuned_fields: those of them that the job uses.
    """

    model: Model
    settings: SamplingSettings
    guide_model: Model | None = None
    prompts: tuple[str, ...] = ()
    encoder: str | None = None
    classes: tuple[int, ...] = ()
    label_order: str = "turn"
    uint8_rule: str = "round"
    codec: str | None = "pixels"
    protocol: str | None = None
    tuned: TunedSettings | None = None
    tuned_fields: tuple[str, ...] = ()

    @functools.cached_property
    def decoder(self) -> autoencoder.Codec | None:
        """The codec that decodes; None leaves latents."""
        if self.codec is None:
            return None
        codec = autoencoder.open_codec(self.codec, next(self.model.parameters()).device)
        if self.codec != "pixels":
            autoencoder.check_codec_fits(codec, self.model.info.config.channels, "this model")
        return codec

    @functools.cached_property
    def denoiser(self) -> Denoiser:
        """The model as the settings ask for it, guided and clipped."""
        return make_denoiser(self.model, self.settings, self.guide_model)

    @functools.cached_property
    def network_calls(self) -> int:
        """Network calls per image; guidance and a guide model count as calls of their own."""
        return count_network_calls(self.model, self.settings, self.guide_model is not None)

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """Return the class of each image; None for no class."""
        if not self.classes:
            return None
        return protocols.choose_labels(self.label_order, seeds, self.classes)

    def prompt(self, seed: int) -> str:
        """Return the prompt of an image."""
        return self.prompts[seed % len(self.prompts)]

    def cond(self, seeds: Sequence[int]) -> Cond:
        """Return the labels and prompts of these images as a condition."""
        label = label_condition(self.model, self.labels(seeds), len(seeds))
        if not self.prompts:
            return Cond(label=label)
        text = encode_prompts(self.model, [self.prompt(seed) for seed in seeds], self.encoder)
        return dataclasses.replace(text, label=label)

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Sample images: (b, c, h, w) uint8 on the CPU, or float32 latents without a codec."""
        cond = self.cond(seeds)
        return self.decode(
            sample_batches(self.denoiser, self.model, list(seeds), cond, self.settings)
        )

    def run_sampler(
        self,
        z: Image,
        logsnr_steps: Grid,
        seeds: Sequence[int],
        wrap: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Image:
        """Run the sampler on one batch, from the state z at logsnr_steps[0]; not decoded.

        Args:
            wrap: wraps the guided and clipped denoiser once more.
        """
        denoise = self.denoiser if wrap is None else wrap(self.denoiser)
        return run_sampler(denoise, z, logsnr_steps, seeds, self.cond(seeds), self.settings)

    def decode(self, x: Tensor) -> Tensor:
        """Decode the model's samples, in the form that `draw` returns."""
        if self.decoder is None:
            return x.float().cpu()
        return to_uint8(self.decoder.decode(x), self.uint8_rule).cpu()

    def card(self, num_images: int, first_seed: int) -> dict[str, Any]:
        """Return how these images are made, as JSON values.

        A change of any value but `num_images` changes the images.
        """
        device = next(self.model.parameters()).device
        dtype = resolve_dtype(self.settings.dtype, device)
        s, config = dataclasses.replace(self.settings, dtype=dtype), self.model.info.config
        ends = make_logsnr_steps(self.model, s)[[0, -1]]
        deviations = self.protocol and protocols.find_deviations(
            self.protocol, s, self.label_order, self.uint8_rule, self.codec or "none"
        )
        return {
            "mezzotint_samples": CARD_FORMAT,
            "protocol": self.protocol,
            "deviations": deviations,
            "tuned": _describe_tuned(self.tuned, self.tuned_fields),
            "model": _describe_model(self.model),
            "guide_model": None if self.guide_model is None else _describe_model(self.guide_model),
            "num_images": num_images,
            "first_seed": first_seed,
            "seed_rule": protocols.SEED_RULE,
            "label_order": protocols.LABEL_ORDER_RULES[self.label_order] if self.classes else None,
            "classes": _describe_classes(self.classes),
            "prompts": list(self.prompts) or None,
            "text_encoder": self.model.info.extra.get("text"),
            "sampler": parse.to_plain(s.sampler),
            "discretization": parse.to_plain(s.discretization) or "the family's own",
            "steps": s.steps,
            "logsnr": [round(float(v), 6) if v.isfinite() else "inf" for v in ends],
            "guidance": parse.to_plain(s.guidance),
            "clip": parse.to_plain(s.clip),
            "size": list(s.size or native_size(config)),
            "dtype": s.dtype,
            "compiled": s.compile or None,
            "same_bytes_for_any_batch": is_exact(s, device),
            "device": device.type,
            "codec": None
            if self.decoder is None
            else {"name": self.decoder.name, "sha256": self.decoder.hash},
            "uint8_rule": None if self.codec is None else self.uint8_rule,
            "network_calls_per_image": self.network_calls,
            "versions": {"mezzotint": __version__, "torch": str(torch.__version__)},
        }


def _describe_model(model: Model) -> dict[str, Any]:
    info = model.info
    return {
        "preset": info.preset,
        "backbone": info.backbone,
        "training_images": info.images,
        "codec": info.codec,
        "schedule": parse.to_plain(info.schedule),
        "ema_width": info.extra.get("ema_width"),
        "sha256": sha256_of_module(model.backbone),
    }


def _describe_tuned(tuned: TunedSettings | None, fields: Sequence[str]) -> str | None:
    """Return what is as `mezzotint tune` chose it, and by what; None for nothing."""
    if tuned is None or not fields:
        return None
    by = tuned.measured
    return f"{', '.join(fields)} by {by.metric} against {by.reference_hash[:16]}"


def _describe_classes(classes: Sequence[int]) -> str | list[int] | None:
    is_range = list(classes) == list(range(len(classes)))
    return (f"0...{len(classes) - 1}" if is_range else list(classes)) if classes else None


def check_sampler(job: SamplingJob) -> None:
    """Raise ValueError for a sampler, options or guidance that the job's model cannot use."""
    check_cuda_graphs(job.settings, next(job.model.parameters()).device)
    count_network_calls(job.model, job.settings, job.guide_model is not None)


def check_decoder(job: SamplingJob) -> None:
    """Open the job's autoencoder now, so that a missing one raises before anything is sampled."""
    decoder = job.decoder
    assert decoder is not None or job.codec is None


def check_network(job: SamplingJob) -> None:
    """Call the network on one image, so that a size it cannot take raises before files are made."""
    z = draw_start_noise(job.model, (0,), job.settings)
    with torch.no_grad():
        job.model(z, torch.zeros(1), job.cond((0,)).map(lambda t: t.to(z.device)))


def make_job(
    source: str | Path,
    changes: dict[str, Any] | None = None,
    *,
    protocol: str | None = None,
    labels: Sequence[str] = (),
    label_order: str | None = None,
    guide_model: str | Path | None = None,
    codec: str | None = None,
    latents: bool = False,
    prompts: Sequence[str] = (),
    encoder: str | None = None,
) -> SamplingJob:
    """Open models by name and return a SamplingJob.

    Args:
        source: run folder, model folder or hub name.
        changes: fields of `SamplingSettings` that replace the protocol's, or the model's tuned
            settings (`mezzotint tune`), or the defaults.
        protocol: of `protocols.PROTOCOLS`; nothing that was tuned is used then.
        labels: class names or numbers to choose from; all by default.
        label_order: of `protocols.LABEL_ORDERS`; by default the protocol's, or "turn".
        guide_model: run folder, model folder or hub name of a weaker model (autoguidance).
        codec: autoencoder that decodes; by default the protocol's, or the model's own.
        latents: do not decode.
        prompts: for a model with text conditioning, taken in turn.
        encoder: folder of the text encoder, if it is not where the model's info says.

    Errors: ValueError for unknown names, labels of an unconditional model, prompts of a model
        without text conditioning, and tuned settings that are damaged.
    """
    model = open_model(source, tuned=protocol is None)
    published = None if protocol is None else protocols.get_protocol(protocol)
    settings = SamplingSettings() if published is None else published.settings
    reads_text = "text" in model.info.extra
    tuned = None if protocol else read_tuned(model.info)
    guided = guide_model is None and (bool(prompts) or not reads_text)
    free = {} if tuned is None else tuned.fields(guided)
    free = {name: value for name, value in free.items() if name not in (changes or {})}
    settings = dataclasses.replace(settings, **free, **(changes or {}))
    own = model.info.codec
    if codec is None:
        # Stable Diffusion's autoencoders share one latent space, so a model of one may be decoded
        # with the protocol's. Any other model needs its own decoder.
        shared = autoencoder.SD_LATENTS
        codec = own
        if published is not None and own in shared and published.codec in shared:
            codec = published.codec
    elif (codec == "pixels") != (own == "pixels"):
        raise ValueError(
            f"codec {codec} does not fit a model that works in {own}; leave it out for its own"
        )
    classes = tuple(label_indices(model, labels)) or tuple(range(model.info.config.num_classes))
    label_condition(model, list(classes) or None, len(classes))
    job = SamplingJob(
        model=model,
        settings=settings,
        guide_model=None if guide_model is None else _open_guide_model(guide_model, model),
        classes=classes,
        label_order=label_order or (published.label_order if published else "turn"),
        uint8_rule=published.uint8_rule if published else "round",
        codec=None if latents else codec,
        protocol=protocol,
        prompts=tuple(prompts),
        encoder=encoder,
        tuned=tuned,
        tuned_fields=tuple(free) if tuned is None or tuned.width is None else (*free, WIDTH),
    )
    protocols.choose_labels(job.label_order, (), job.classes)  # raises for an unknown order
    if prompts:
        text_encoder_for(model, encoder)
    elif reads_text and settings.guidance is not None:
        raise ValueError(
            "guidance of a model with text conditioning needs prompts; give --text or --prompts"
        )
    return job


def _open_guide_model(source: str | Path, model: Model) -> Model:
    guide_model = open_model(source)
    for name in ("channels", "num_classes"):
        ours, theirs = (getattr(m.info.config, name) for m in (model, guide_model))
        if ours != theirs:
            raise ValueError(
                f"the guide model {source} has {name} {theirs}, the model {ours}; they must agree"
            )
    if guide_model.info.codec != model.info.codec:
        raise ValueError(
            f"the guide model {source} works in {guide_model.info.codec}, "
            f"the model in {model.info.codec}; they must agree"
        )
    return guide_model
