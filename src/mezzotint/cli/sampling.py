"""Commands that sample: sample, edit, serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg, subcommand

from mezzotint.cli.arguments import (
    NUMBER,
    NumImages,
    OptionalBatch,
    OptionalFile,
    OptionalNumImages,
    OptionalText,
    Seed,
    Steps,
    Switch,
)
from mezzotint.cli.outputs import check_outside_run
from mezzotint.core.console import echo
from mezzotint.core.fields import Range

if TYPE_CHECKING:
    from mezzotint.sampling.job import SamplingJob

MODEL = arg(
    metavar="MODEL", help_behavior_hint="", help="Run folder, model folder, eurosat-64 or hub name."
)
PromptArgs = tyro.conf.UseAppendAction[
    Annotated[tuple[str, ...], arg(metavar="PROMPT", help_behavior_hint="")]
]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How to sample; by default as the model and the protocol say."""

    seed: Seed = 0
    """Seed of the first image, 0 by default; image i has seed --seed + i."""
    label: Annotated[tuple[str, ...], arg(metavar="[A B ...]", help_behavior_hint="")] = ()
    """Class names or numbers to choose from; all by default."""
    label_order: OptionalText = None
    """turn (default), random, or balanced: 50 in a row of each class."""
    text: PromptArgs = ()
    """Prompt of a model with text conditioning; may be repeated."""
    prompts: OptionalFile = None
    """File of prompts in turn: one a line, or .jsonl: text, negative, seed, guidance, size."""
    negative_text: OptionalText = None
    """Guide away from these words instead of from the empty caption."""
    encoder: OptionalText = None
    """Folder of the text encoder, if it moved."""
    protocol: OptionalText = None
    """simple-diffusion-512steps, coco-fid-30k, diffit-256/512, dimr-256, jit-256/512, adm, edm2."""
    sampler: OptionalText = None
    """With options: ddim (default), ddim:eta=0.5, heun:s_churn=40; consistency for few steps."""
    discretization: OptionalText = None
    """even, quadratic, even_logsnr, karras:rho=5, respaced; by default the family's."""
    steps: Steps = None
    """Intervals of the discretization; 50 by default."""
    guidance: OptionalText = None
    """1.5, or scale=0.4,convention=dimr; and low=-3,high=5, power=4, channels=3."""
    guide_model: OptionalText = None
    """A weaker model to guide away from (autoguidance)."""
    clip: OptionalText = None
    """none (default), static, dynamic:quantile=0.995."""
    size: OptionalText = None
    """Of the network's input: 64, or 48x64 (height first)."""
    dtype: OptionalText = None
    """auto (default: bfloat16 on a GPU that has it), float32, bfloat16, float16."""
    batch: OptionalBatch = None
    """Images per network call; 64 by default."""
    graphs: Annotated[Literal["auto", "on", "off"], arg(metavar="TEXT", help_behavior_hint="")] = (
        "auto"
    )
    """CUDA graphs: auto (default: on a GPU), on, off."""
    compile: Switch = False
    """torch.compile: faster on a GPU, after a minute or more."""
    codec: OptionalText = None
    """Autoencoder to decode with; by default the model's."""

    def make_job(self, model: str, latents: bool = False) -> SamplingJob:
        """Open the model and return the job that these options describe."""
        from mezzotint.sampling import parse
        from mezzotint.sampling.coco import read_protocol_prompts
        from mezzotint.sampling.job import make_job

        parsers = {
            "sampler": parse.parse_sampler,
            "discretization": parse.parse_discretization,
            "guidance": parse.parse_guidance,
            "size": parse.parse_size,
            "clip": parse.parse_clip,
        }
        graphs = {"auto": None, "on": True, "off": False}[self.graphs]
        changes: dict[str, Any] = {"cuda_graphs": graphs, "compile": self.compile}
        for name in (*parsers, "steps", "dtype", "batch"):
            value = getattr(self, name)
            if value is not None:
                changes[name] = parsers[name](value) if name in parsers else value
        prompts = () if self.prompts is None else read_protocol_prompts(self.prompts, self.protocol)
        return make_job(
            model,
            changes,
            protocol=self.protocol,
            labels=self.label,
            label_order=self.label_order,
            guide_model=self.guide_model,
            codec=self.codec,
            latents=latents,
            prompts=(*self.text, *prompts),
            negative_text=self.negative_text,
            encoder=self.encoder,
        )


def tell_tuned(job: SamplingJob, source: str) -> None:
    """Print which tuned settings the samples have, or that those of a run are outdated."""
    from mezzotint.models import TUNED, find_tuned
    from mezzotint.sampling.tuned import describe_tuned

    if job.tuned is not None and job.tuned_fields:
        echo(f"tuned settings: {describe_tuned(job.tuned, job.tuned_fields)}")
        return
    folder = Path(source)
    if job.protocol is None and (folder / TUNED).is_dir() and find_tuned(folder) is None:
        echo(f"{folder / TUNED} is of earlier weights and not used; run mezzotint tune again")


def tell_cut(job: SamplingJob) -> None:
    """Print what the model does not read of its prompts."""
    from mezzotint.sampling.conditioning import text_encoder_for
    from mezzotint.sampling.prompts import describe_cut

    if job.prompts:
        for line in describe_cut(text_encoder_for(job.model, job.encoder), job.prompts):
            echo(line)


def sample(
    model: Positional[Annotated[str, MODEL]],
    /,
    *,
    out: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="")] = Path(
        "samples.png"
    ),
    num_images: OptionalNumImages = None,
    latents: Switch = False,
    overwrite: Switch = False,
    sampling: OmitArgPrefixes[SamplingOptions] = SamplingOptions(),
) -> None:
    """Sample images from a run, a model folder or a hub repository. The same command resumes.

    Args:
        out: FILE.png (one grid, the default), a folder of PNGs, .npz (ADM's), .tar.
        num_images: Number of images; 16 by default, with --prompts one per prompt.
        latents: Write latents (.npz) instead of images.
        overwrite: Replace an output that exists or has other settings.
    """
    from mezzotint.core.distributed import WorkShare
    from mezzotint.sampling.generate_images import generate_images

    check_outside_run(out)
    job = sampling.make_job(model, latents)
    is_first = WorkShare.from_environment().rank == 0
    if is_first:
        tell_tuned(job, model)
        tell_cut(job)
    if num_images is None:
        num_images = len(job.prompts) if sampling.prompts else 16
    written = generate_images(job, out, num_images, sampling.seed, overwrite)
    if is_first:
        echo(f"{num_images} images, {job.network_calls} network calls each:", written)


@dataclass(frozen=True, kw_only=True)
class Edit(SamplingOptions):
    """Options of every edit."""

    model: Positional[Annotated[str, MODEL]]
    out: Annotated[Path, arg(aliases=["-o"], metavar="FILE", help_behavior_hint="")] = Path(
        "edited.png"
    )
    """A .png, edited.png by default."""
    num_images: NumImages = 4
    """Number of images; 4 by default."""
    overwrite: Switch = False
    """Replace files that no edit has written."""

    def save(self, job: SamplingJob, seeds: range) -> list[Path]:
        """Write the edit's files and return them."""
        raise NotImplementedError


InputFile = Annotated[Path, arg(metavar="FILE")]
LogSNRRange = Range(-1000, 1000, "a log-SNR")
LogSNR = Annotated[float, arg(metavar="L"), LogSNRRange]


@dataclass(frozen=True, kw_only=True)
class Img2Img(Edit):
    """Noise an image to a log-SNR and sample from there."""

    image: InputFile
    """Image to start from; cropped and resized to the model's size."""
    start_logsnr: LogSNR
    """Log-SNR to start from; lower keeps less of the image."""

    def save(self, job: SamplingJob, seeds: range) -> list[Path]:
        """See `Edit`."""
        from mezzotint.sampling.img2img import save_img2img

        return save_img2img(job, self.image, self.start_logsnr, self.out, seeds, self.overwrite)


@dataclass(frozen=True, kw_only=True)
class Inpaint(Edit):
    """Paint the white part of a mask and keep the rest of an image."""

    image: InputFile
    """Image to keep; cropped and resized to the model's size."""
    mask: InputFile
    """Image of the same size, white where to paint."""
    start_logsnr: Annotated[float | None, arg(metavar="L", help_behavior_hint=""), LogSNRRange] = (
        None
    )
    """Start from the image noised to this log-SNR; by default from noise."""

    def save(self, job: SamplingJob, seeds: range) -> list[Path]:
        """See `Edit`."""
        from mezzotint.sampling.img2img import save_inpainting

        start = self.start_logsnr
        return save_inpainting(job, self.image, self.mask, start, self.out, seeds, self.overwrite)


@dataclass(frozen=True, kw_only=True)
class Interpolate(Edit):
    """Sample images between the noises of consecutive seeds: a grid and a GIF."""

    frames: Annotated[int, NUMBER, Range(2, 10_000)] = 8
    """Images from one seed to the next, both included; 8 by default."""

    def save(self, job: SamplingJob, seeds: range) -> list[Path]:
        """See `Edit`."""
        from mezzotint.sampling.trajectory import save_interpolation

        return save_interpolation(job, self.frames, self.out, seeds, self.overwrite)


@dataclass(frozen=True, kw_only=True)
class Trajectory(Edit):
    """Show the denoised image along the sampler's way: a filmstrip and a GIF."""

    def save(self, job: SamplingJob, seeds: range) -> list[Path]:
        """See `Edit`."""
        from mezzotint.sampling.trajectory import save_trajectory

        return save_trajectory(job, self.out, seeds, self.overwrite)


def edit(
    *,
    mode: OmitArgPrefixes[
        Annotated[Img2Img, subcommand("img2img", prefix_name=False)]
        | Annotated[Inpaint, subcommand("inpaint", prefix_name=False)]
        | Annotated[Interpolate, subcommand("interpolate", prefix_name=False)]
        | Annotated[Trajectory, subcommand("trajectory", prefix_name=False)]
    ],
) -> None:
    """Edit images with a model: from a given image, between seeds, or along the sampler's way."""
    check_outside_run(mode.out)
    job = mode.make_job(mode.model)
    if len(job.sizes()) > 1:
        raise ValueError("an edit makes images of one size; give the prompts one size, or --size")
    tell_tuned(job, mode.model)
    tell_cut(job)
    written = mode.save(job, range(mode.seed, mode.seed + mode.num_images))
    echo(f"{mode.num_images} images, {job.network_calls} network calls each:", *written)


def serve(
    sources: Positional[tuple[str, ...]] = (),
    /,
    *,
    port: Annotated[int | None, NUMBER, Range(1, 65_535, "a TCP port")] = None,
    auth: str = "",
) -> None:
    """Open the studio, a web page on 127.0.0.1: sample, watch runs, look inside models, compare.

    Args:
        sources: Run folders, model folders, eurosat-64 or hub names; by default the models that
            come with mezzotint.
        port: By default a free one from 7860 upwards.
        auth: Name that visitors must give, with the password in $MEZZOTINT_STUDIO_PASSWORD or asked
            for here; or name:password, which other users of this machine can see.
    """
    from mezzotint.web.app import serve as run

    run(sources, port, auth)
