"""Many images from one command: shared over ranks, taken up where it was left, with a card that says how.

An image is a function of its number alone: seed, label and every random draw. So any rank may make any image, and a
run that was killed makes what is missing.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mezzotint import __version__
from mezzotint.core.distributed import (
    World,
    all_ranks,
    init_distributed,
    on_rank0,
    shutdown_distributed,
)
from mezzotint.core.files import format_bytes
from mezzotint.core.tensor_files import sha256_of_module
from mezzotint.data import autoencoder as codecs
from mezzotint.data.transforms import to_uint8
from mezzotint.models import open_model
from mezzotint.process.denoiser import Cond, Model
from mezzotint.sampling import conditioning, protocols
from mezzotint.sampling.conditioning import label_condition, label_indices
from mezzotint.sampling.sample import (
    count_network_calls,
    draw_start_noise,
    generate,
    make_logsnr_steps,
)
from mezzotint.sampling.settings import SamplingSettings
from mezzotint.sampling.writers import SamplingCard, make_writer

T = TypeVar("T")
CARD_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SamplingJob:
    """Everything that decides what image number i looks like.

    model: in eval mode on its device; guide_model: guides it, if given. settings: see `Settings`.
    prompts: what the pictures of a model that reads text show, in turn; the text encoder is `encoder` or the card's.
    classes: those that labels are chosen from, empty for an unconditional model. label_order: of
        `protocols.LABEL_ORDERS`. uint8_rule: of `to_uint8`.
    codec: that decodes, "pixels" or an autoencoder's name (see `mezzotint.data.autoencoder.open_codec`); None leaves latents.
    protocol: the name of the published protocol it follows or departs from.
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

    def labels(self, seeds: Sequence[int]) -> list[int] | None:
        """The class of each image; None for an unconditional model."""
        return (
            protocols.choose_labels(self.label_order, seeds, self.classes) if self.classes else None
        )

    @functools.cached_property
    def decoder(self) -> codecs.Codec | None:
        """What decodes; None leaves latents."""
        found = (
            None
            if self.codec is None
            else codecs.open_codec(self.codec, next(self.model.parameters()).device)
        )
        if found is not None and self.codec != "pixels":
            codecs.check_codec_fits(found, self.model.info.config.channels, "this model")
        return found

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Images by number, (b, c, h, w) uint8 on the CPU; float32 latents where there is no codec."""
        return self.decode(
            generate(self.model, list(seeds), self.cond(seeds), self.settings, self.guide_model)
        )

    def prompt(self, number: int) -> str:
        """The words of an image."""
        return self.prompts[number % len(self.prompts)]

    def cond(self, seeds: Sequence[int]) -> Cond:
        """The labels and words of these images as a condition."""
        label = label_condition(self.model, self.labels(seeds), len(seeds))
        if not self.prompts:
            return Cond(label=label)
        words = conditioning.encode_prompts(
            self.model, [self.prompt(n) for n in seeds], self.encoder
        )
        return dataclasses.replace(words, label=label)

    def decode(self, made: Tensor) -> Tensor:
        """What the model made, as `draw` gives it."""
        if self.decoder is None:
            return made.float().cpu()
        return to_uint8(self.decoder.decode(made), self.uint8_rule).cpu()

    def check(self) -> None:
        """One call of the network on one image, so that a size it does not take is told before anything is written."""
        z = draw_start_noise(self.model, (0,), self.settings)
        with torch.no_grad():
            self.model(z, torch.zeros(1), self.cond((0,)).map(lambda t: t.to(z.device)))

    @functools.cached_property
    def network_calls(self) -> int:
        """Network calls per image, both passes of guidance and calls of a weaker model counted."""
        return count_network_calls(self.model, self.settings, self.guide_model is not None)

    def card(self, num_images: int, first_seed: int) -> SamplingCard:
        """How images first_seed ... first_seed + num_images - 1 are made, as JSON values; any change of a line but `num_images` changes images."""
        s, config = self.settings, self.model.info.config
        named = self.protocol
        return {
            "mezzotint_samples": CARD_FORMAT,
            "protocol": named,
            "deviations": protocols.find_deviations(
                named, s, self.label_order, self.uint8_rule, self.codec or "none"
            )
            if named
            else None,
            "model": _model_lines(self.model),
            "guide_model": None if self.guide_model is None else _model_lines(self.guide_model),
            "num_images": num_images,
            "first_seed": first_seed,
            "seed_rule": protocols.SEED_RULE,
            "label_order": protocols.LABEL_ORDER_RULES[self.label_order] if self.classes else None,
            "classes": _pool_words(self.classes) if self.classes else None,
            "prompts": list(self.prompts) or None,
            "text_encoder": self.model.info.extra.get("text"),
            "sampler": protocols.to_plain(s.sampler),
            "discretization": protocols.to_plain(s.discretization)
            if s.discretization
            else "the family's own",
            "steps": s.steps,
            "logsnr": [
                round(float(v), 6) if v.isfinite() else "inf"
                for v in make_logsnr_steps(self.model, s)[[0, -1]]
            ],
            "guidance": None if s.guidance is None else protocols.to_plain(s.guidance),
            "clip": None if s.clip is None else protocols.to_plain(s.clip),
            "size": list(s.size or (config.size, config.size)),
            "dtype": s.dtype,
            "same_bytes_for_any_batch": self._device == "cpu" if s.exact is None else s.exact,
            "device": self._device,
            "codec": None
            if self.decoder is None
            else {"name": self.decoder.name, "sha256": self.decoder.hash},
            "uint8_rule": None if self.codec is None else self.uint8_rule,
            "network_calls_per_image": self.network_calls,
            "versions": {"mezzotint": __version__, "torch": str(torch.__version__)},
        }

    @property
    def _device(self) -> str:
        return next(self.model.parameters()).device.type


def check_decoder(job: SamplingJob) -> None:
    """Open the job's decoder, so that one that is missing or does not fit fails before sampling."""
    _ = job.decoder  # cached


def _model_lines(model: Model) -> SamplingCard:
    card = model.info
    lines = {
        "preset": card.preset,
        "backbone": card.backbone,
        "training_images": card.images,
        "codec": card.codec,
    }
    return {
        **lines,
        "schedule": protocols.to_plain(card.schedule),
        "sha256": sha256_of_module(model.backbone),
    }


def _pool_words(pool: Sequence[int]) -> str | list[int]:
    return f"0...{len(pool) - 1}" if list(pool) == list(range(len(pool))) else list(pool)


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
    """A Job from names.

    Args:
        source: run folder, model folder or hub name. guide_model: likewise, a weaker model for autoguidance.
        changes: fields of `Settings` that are not as the protocol (or the defaults) have them.
        protocol: of `protocols.PROTOCOLS`. labels: class names or numbers to choose from; all by default.
        label_order: of `protocols.LABEL_ORDERS`; the protocol's, or "turn". codec: decodes instead of the protocol's or the
            model's own. latents: do not decode. prompts: taken in turn, for a model that reads text. encoder: of text,
            where the card's has moved.

    Errors: ValueError for unknown names, for labels of an unconditional model, and for prompts of one that reads none.
    """
    model = open_model(source)
    published = None if protocol is None else protocols.get_protocol(protocol)
    settings = dataclasses.replace(
        SamplingSettings() if published is None else published.settings, **(changes or {})
    )
    own = model.info.codec
    if codec is None:
        # Stable Diffusion's autoencoders share one latent space; any other model needs its own decoder.
        shared = (
            published is not None
            and own in codecs.SD_LATENTS
            and published.codec in codecs.SD_LATENTS
        )
        codec = published.codec if published is not None and shared else own
    elif (codec == "pixels") != (own == "pixels"):
        raise ValueError(
            f"codec {codec} does not fit a model that works in {own}; leave it out for the model's own"
        )
    classes = model.info.config.num_classes
    pool = tuple(label_indices(model, labels)) or tuple(range(classes))
    label_condition(model, list(pool) or None, len(pool))
    job = SamplingJob(
        model=model,
        settings=settings,
        guide_model=None if guide_model is None else _open_guide_model(guide_model, model),
        classes=pool,
        label_order=label_order or (published.label_order if published else "turn"),
        uint8_rule=published.uint8_rule if published else "round",
        codec=None if latents else codec,
        protocol=protocol,
        prompts=tuple(prompts),
        encoder=encoder,
    )
    protocols.choose_labels(job.label_order, (), job.classes)
    if prompts:
        conditioning.text_encoder_for(model, encoder)
    elif "text" in model.info.extra and settings.guidance is not None:
        raise ValueError(
            "guidance of a model that reads text needs words to go towards; give --text or --prompts"
        )
    return job


def _open_guide_model(source: str | Path, model: Model) -> Model:
    weak = open_model(source)
    for what in ("channels", "num_classes"):
        ours, theirs = (getattr(m.info.config, what) for m in (model, weak))
        if ours != theirs:
            raise ValueError(
                f"the guide {source} has {what} {theirs}, the model {ours}; they must agree"
            )
    if weak.info.codec != model.info.codec:
        raise ValueError(
            f"the guide {source} works in {weak.info.codec}, the model in {model.info.codec}"
        )
    return weak


class Progress:
    """Images done, images per second and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int):
        self.total, self.first, self.began = total, done, time.monotonic()
        self.printed = 0.0

    def show(self, done: int) -> None:
        """After each round; always at the end."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if done < self.total and now - self.printed < (0.2 if terminal else 30):
            return
        self.printed = now
        speed = (done - self.first) / max(now - self.began, 1e-9)
        left = math.ceil((self.total - done) / max(speed, 1e-9))
        words = f"{done:,}/{self.total:,} images  {speed:,.2f} images/s  {left // 3600}:{left // 60 % 60:02d}:"
        end = "\r" if terminal and done < self.total else "\n"
        print(f"{words}{left % 60:02d} left", end=end, file=sys.stderr, flush=True)


def generate_images(
    job: SamplingJob,
    out: str | Path,
    num_images: int,
    first_seed: int = 0,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Make images first_seed ... first_seed + num_images - 1 into `out` (see `outputs.output_for`); the same call again resumes.

    Under torchrun every rank makes a share; `out` must be seen by all.

    Errors: ValueError for a bad `num_images`, an `out` that exists or belongs to other settings; OSError when the disk is or
        becomes too full, keeping what is done. An error on one rank ends all of them.
    """
    if num_images < 1 or first_seed < 0:
        raise ValueError(
            f"num_images {num_images} must be at least 1 and seed {first_seed} at least 0"
        )
    world = init_distributed()
    try:
        _generate(
            job, Path(out), range(first_seed, first_seed + num_images), world, overwrite, quiet
        )
    finally:
        shutdown_distributed()
    return Path(out)


def _generate(
    job: SamplingJob, out: Path, seeds: range, world: World, overwrite: bool, quiet: bool
) -> None:
    output = make_writer(out, job.model.info.labels, job.codec is None)

    def prepare() -> list[range]:
        job.check()
        output.begin(job.card(len(seeds), seeds.start), overwrite)
        missing = output.missing(seeds)
        _check_room(out, output.room(seeds, len(missing), _image_bytes(job)))
        return consecutive_batches(missing, job.settings.batch)

    todo = on_rank0(prepare, world)
    progress = Progress(len(seeds), len(seeds) - sum(map(len, todo)))
    for round_start in range(0, len(todo), world.size):
        share = todo[round_start : round_start + world.size]
        mine = share[world.rank] if world.rank < len(share) else None

        def write(mine: range | None = mine) -> None:
            if mine is not None:
                with _explain_full_disk(out):
                    output.put(mine, job.draw(mine), job.labels(mine))

        all_ranks(write, world)
        if world.is_rank0 and not quiet:
            progress.show(len(seeds) - sum(map(len, todo[round_start + world.size :])))

    def finish() -> None:
        with _explain_full_disk(out):
            output.finish(seeds, job.labels(seeds))

    on_rank0(finish, world)


def consecutive_batches(missing: Sequence[int], batch: int) -> list[range]:
    """Runs of consecutive seeds, at most `batch` long."""
    runs: list[range] = []
    for i in missing:
        if runs and runs[-1].stop == i and len(runs[-1]) < batch:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs


@contextmanager
def _explain_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no space left while writing {out}; finished images are kept. "
            "Free some space and run the same command again",
        ) from error


def _image_bytes(job: SamplingJob) -> int:
    height, width = job.settings.size or (job.model.info.config.size,) * 2
    if job.decoder is None:
        return 4 * job.model.info.config.channels * height * width
    channels = job.model.info.config.channels if job.codec == "pixels" else 3
    return channels * height * width * job.decoder.factor**2


def _check_room(out: Path, needed: int) -> None:
    parent = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{out} needs up to {format_bytes(needed)}, of which {format_bytes(free)} are free; choose another --out",
        )
