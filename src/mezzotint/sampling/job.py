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
from mezzotint.core.fields import shorten
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
from mezzotint.sampling.denoisers import check_cuda_graphs, is_exact, model_denoiser
from mezzotint.sampling.prompts import Prompt, make_prompts
from mezzotint.sampling.sample import (
    ImageGuidance,
    build_denoiser,
    count_network_calls,
    draw_start_noise,
    get_discretization,
    make_logsnr_steps,
    run_sampler,
)
from mezzotint.sampling.settings import Guidance, SamplingSettings, resolve_dtype
from mezzotint.sampling.tuned import WIDTH, TunedSettings, read_tuned

CARD_FORMAT = 1
PROMPT_SEEDS = "; a prompt's own seed replaces i, plus 1 each time the prompts come round again"


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """Everything that decides what the image of a seed looks like.

    model: in eval mode on its device.
    guide_model: a weaker model for autoguidance.
    prompts: of a model with text conditioning, taken in turn by seed. What a prompt sets by itself
        replaces the settings for its images.
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
    prompts: tuple[Prompt, ...] = ()
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
    def networks(self) -> tuple[Denoiser, Denoiser | None]:
        """The model and the guide model, unguided."""
        weak = self.guide_model and model_denoiser(self.guide_model, self.settings)
        return model_denoiser(self.model, self.settings), weak

    def denoiser(self, seeds: Sequence[int]) -> Denoiser:
        """Return the model as the settings and the prompts of these images ask for it."""
        strong, weak = self.networks
        own = self.image_guidance([self.prompt(seed) for seed in seeds] if self.prompts else ())
        return build_denoiser(strong, self.model, self.guided_settings, weak, own)

    @functools.cached_property
    def guided_settings(self) -> SamplingSettings:
        """The settings, with a guidance if any prompt has its own."""
        if self.settings.guidance or all(p.guidance is None for p in self.prompts):
            return self.settings
        return dataclasses.replace(self.settings, guidance=Guidance(scale=1.0))

    def image_guidance(self, prompts: Sequence[Prompt]) -> ImageGuidance:
        """Return what guides the images of these prompts by itself, if any of the job's does."""
        guidance, peak, negative = self.guided_settings.guidance, None, None
        if guidance is not None and any(p.guidance is not None for p in self.prompts):
            peaks = [self._guidance(prompt).peak for prompt in prompts]
            peak = torch.tensor(peaks, dtype=torch.float64)
        if guidance is not None and any(p.negative for p in self.prompts):
            texts = [p.negative or "" for p in prompts]
            negative = encode_prompts(self.model, texts, self.encoder).map(self._to_device)
        return ImageGuidance(peak=peak, negative=negative)

    def _guidance(self, prompt: Prompt) -> Guidance:
        """Return the guidance of a prompt's image, of a job that guides."""
        guidance = self.guided_settings.guidance
        assert guidance is not None
        own = prompt.guidance
        return guidance if own is None else dataclasses.replace(guidance, scale=own)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self.model.parameters()).device)

    @functools.cached_property
    def network_calls(self) -> int:
        """Network calls per image; guidance and a guide model count as calls of their own."""
        settings, scales = self.guided_settings, [p.guidance for p in self.prompts]
        if settings.guidance is not None and any(scale is not None for scale in scales):
            # An image whose own scale is 1 shares its batch with guided ones, and so their calls.
            guided = [s for p in self.prompts for s in [self._guidance(p)] if s.peak != 1]
            settings = dataclasses.replace(settings, guidance=guided[0] if guided else None)
        return count_network_calls(self.model, settings, self.guide_model is not None)

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """Return the class of each image; None for no class."""
        if not self.classes:
            return None
        return protocols.choose_labels(self.label_order, seeds, self.classes)

    def prompt(self, seed: int) -> Prompt:
        """Return the prompt of an image."""
        return self.prompts[seed % len(self.prompts)]

    def noise_seeds(self, seeds: Sequence[int]) -> list[int]:
        """Return the seed of each image's noise: its own, or one that its prompt sets.

        When the prompts come round again, such a seed grows by one.
        """
        if not self.prompts:
            return list(seeds)
        own = [(self.prompt(seed).seed, seed // len(self.prompts)) for seed in seeds]
        return [s if o is None else o + r for s, (o, r) in zip(seeds, own, strict=True)]

    def size(self, seed: int) -> tuple[int, int]:
        """Return the height and width of the network's input for an image."""
        own = self.prompt(seed).size if self.prompts else None
        return own or self.settings.size or native_size(self.model.info.config)

    def describe_image(self, seed: int) -> dict[str, Any]:
        """Return the row of an image: its prompt with everything it was made with.

        A file of such rows (`read_prompts`) makes the same images again, under the same settings.
        """
        prompt = self.prompt(seed)
        scale = self.guided_settings.guidance and self._guidance(prompt).scale
        row = dataclasses.replace(
            prompt, seed=self.noise_seeds((seed,))[0], guidance=scale, size=self.size(seed)
        ).to_json()
        assert isinstance(row, dict)
        return row

    def sizes(self) -> list[tuple[int, int]]:
        """Return the sizes that the images have."""
        return sorted({self.size(i) for i in range(max(1, len(self.prompts)))})

    def start_noise(self, seeds: Sequence[int]) -> Image:
        """Draw the noise from which these images start; ValueError for images of several sizes."""
        sizes = {self.size(seed) for seed in seeds} or {self.size(0)}
        if len(sizes) > 1:
            raise ValueError(f"images of sizes {sorted(sizes)} in one batch; draw each size alone")
        settings = dataclasses.replace(self.settings, size=sizes.pop())
        return draw_start_noise(self.model, self.noise_seeds(seeds), settings)

    def cond(self, seeds: Sequence[int]) -> Cond:
        """Return the labels and prompts of these images as a condition."""
        label = label_condition(self.model, self.labels(seeds), len(seeds))
        if not self.prompts:
            return Cond(label=label)
        texts = [self.prompt(seed).text for seed in seeds]
        text = encode_prompts(self.model, texts, self.encoder)
        return dataclasses.replace(text, label=label)

    def split(self, seeds: Sequence[int]) -> list[Sequence[int]]:
        """Return the seeds in batches of at most `settings.batch`."""
        batch = self.settings.batch
        return [seeds[i : i + batch] for i in range(0, len(seeds), batch)]

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Sample images: (b, c, h, w) uint8 on the CPU, or float32 latents without a codec."""
        steps = make_logsnr_steps(self.model, self.settings)
        parts = self.split(seeds)
        images = [self.run_sampler(self.start_noise(part), steps, part) for part in parts]
        return self.decode(torch.cat(images or [self.start_noise(())]))

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
        denoise = self.denoiser(seeds)
        denoise = denoise if wrap is None else wrap(denoise)
        noise_seeds = self.noise_seeds(seeds)
        return run_sampler(denoise, z, logsnr_steps, noise_seeds, self.cond(seeds), self.settings)

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
        s, sizes = dataclasses.replace(self.settings, dtype=dtype), self.sizes()
        own_seeds = any(p.seed is not None for p in self.prompts)
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
            "seed_rule": protocols.SEED_RULE + (PROMPT_SEEDS if own_seeds else ""),
            "label_order": protocols.LABEL_ORDER_RULES[self.label_order] if self.classes else None,
            "classes": _describe_classes(self.classes),
            "prompts": [p.to_json() for p in self.prompts] or None,
            "text_encoder": self.model.info.extra.get("text"),
            "sampler": parse.to_plain(s.sampler),
            "discretization": parse.to_plain(get_discretization(self.model, s)),
            "steps": s.steps,
            "logsnr": [round(float(v), 6) if v.isfinite() else "inf" for v in ends],
            "guidance": parse.to_plain(s.guidance),
            "clip": parse.to_plain(s.clip),
            "size": list(sizes[0]) if len(sizes) == 1 else "of each prompt",
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
        "raw_weights": info.extra.get("raw_weights", False),
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
    assert job.network_calls > 0


def check_decoder(job: SamplingJob) -> None:
    """Open the job's autoencoder now, so that a missing one raises before anything is sampled."""
    decoder = job.decoder
    assert decoder is not None or job.codec is None


def check_network(job: SamplingJob) -> None:
    """Call the network on one image of each size, so that a wrong one raises before any file."""
    device = next(job.model.parameters()).device
    for i in {job.size(i): i for i in range(max(1, len(job.prompts)))}.values():
        with torch.no_grad():
            cond = job.cond((i,)).map(lambda t: t.to(device))
            job.model(job.start_noise((i,)), torch.zeros(1), cond)


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
    prompts: Sequence[str | Prompt] = (),
    negative_text: str | None = None,
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
        negative_text: guides away from these words, for prompts without such of their own.
        encoder: folder of the text encoder, if it is not where the model's info says.

    Errors: ValueError for unknown names, labels of an unconditional model, prompts of a model
        without text conditioning, and tuned settings that are damaged.
    """
    if latents and codec is not None:
        raise ValueError(f"latents are not decoded, and codec {codec} decodes; leave one out")
    model = open_model(source, tuned=protocol is None)
    if latents and model.info.codec == "pixels":
        raise ValueError("this model works on pixels and has no latents; leave latents out")
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
        prompts=make_prompts(prompts, negative_text),
        encoder=encoder,
        tuned=tuned,
        tuned_fields=tuple(free) if tuned is None or tuned.width is None else (*free, WIDTH),
    )
    protocols.choose_labels(job.label_order, (), job.classes)  # raises for an unknown order
    _check_negative(job, negative_text)
    if encoder is not None and not prompts:
        raise ValueError(f"the text encoder {encoder} needs prompts; give --text or --prompts")
    if prompts:
        text_encoder_for(model, encoder)
    elif reads_text and settings.guidance is not None:
        raise ValueError(
            "guidance of a model with text conditioning needs prompts; give --text or --prompts"
        )
    return job


def _check_negative(job: SamplingJob, negative_text: str | None) -> None:
    """Raise ValueError for negative words that cannot act."""
    if negative_text is not None and not job.prompts:
        raise ValueError("a negative text needs prompts; give --text or --prompts")
    negative = [p for p in job.prompts if p.negative]
    if negative and job.guide_model is not None:
        raise ValueError("a guide model takes the place of the negative text; leave one out")
    for prompt in negative:
        if prompt.guidance is None and job.settings.guidance is None:
            raise ValueError(
                f"the negative text {shorten(prompt.negative)} acts through guidance; give "
                "--guidance 3, or so"
            )


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
