"""Edits that start from a given image: image to image, and inpainting."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data.decode import open_image_file
from mezzotint.data.transforms import to_mode, to_model_range, to_pixels
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage
from mezzotint.process.guidance import with_image
from mezzotint.process.logsnr import diffuse
from mezzotint.process.samplers import Grid
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.sample import make_logsnr_steps
from mezzotint.sampling.writers import check_edit_output, write_card


def inpaint_denoiser(denoise: Denoiser, known: Image, keep: Tensor) -> Denoiser:
    """Return the denoiser with `known` in place of its image where `keep`, the noise recomputed.

    Replacing the known part of the image at every level (DDNM, arXiv 2212.00490 eq. 13, whose A is
    here the mask) keeps that part of the state at alpha known + sigma eps, which score-SDE (arXiv
    2011.13456, appendix I.2) and RePaint (arXiv 2201.09865 eq. 8) write into it. There is no
    resampling. With no noise left at the end the known part is exact.

    Args:
        known: (b, c, h, w), or (1, c, h, w) for all images alike, in the model's space.
        keep: True where `known` holds, broadcastable to it.
    """

    def denoise_unknown(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        raw = denoise(z, logsnr, cond)
        return with_image(logsnr, raw, torch.where(keep, known.to(raw.x), raw.x))

    return denoise_unknown


def img2img(job: SamplingJob, seeds: Sequence[int], image: Tensor, start_logsnr: float) -> Tensor:
    """Noise an image to a log-SNR and sample from there (SDEdit, arXiv 2108.01073).

    Args:
        image: (c, h, w) uint8, see `read_image`.
        start_logsnr: lower keeps less of the image.

    Returns:
        (len(seeds), c, h, w) uint8.

    Errors: ValueError for a log-SNR outside the sampler's steps, and for a job without a codec.
    """
    x = _encode(job, image)
    steps = _steps_from(job, start_logsnr)
    images = [
        job.run_sampler(_noise(job, part, x, steps), steps, part) for part in job.split(seeds)
    ]
    return job.decode(torch.cat(images))


def inpaint(
    job: SamplingJob,
    seeds: Sequence[int],
    image: Tensor,
    mask: Tensor,
    start_logsnr: float | None = None,
) -> Tensor:
    """Paint the masked part of an image and keep the rest.

    Args:
        image: (c, h, w) uint8, see `read_image`.
        mask: (h, w) bool, True where to paint. A cell of latents is painted if one of its pixels
            is.
        start_logsnr: start the masked part from the image noised to this log-SNR; None starts it
            from noise alone.

    Returns:
        (len(seeds), c, h, w) uint8.

    Errors: as `img2img`.
    """
    x = _encode(job, image)
    assert job.decoder is not None
    painted = torch.nn.functional.max_pool2d(mask[None, None].float(), job.decoder.factor)
    keep = (painted == 0).to(x.device)
    if start_logsnr is None:
        steps = make_logsnr_steps(job.model, job.settings)
        start = torch.where(keep, x, torch.zeros_like(x))
    else:
        steps, start = _steps_from(job, start_logsnr), x
    wrap = functools.partial(inpaint_denoiser, known=x, keep=keep)
    images = [
        job.run_sampler(_noise(job, part, start, steps), steps, part, wrap)
        for part in job.split(seeds)
    ]
    return job.decode(torch.cat(images))


def _encode(job: SamplingJob, image: Tensor) -> Tensor:
    """Return an image in the model's space, (1, c, h, w)."""
    if job.decoder is None:
        raise ValueError("editing an image needs the model's codec; leave latents out")
    device = next(job.model.parameters()).device
    return job.decoder.encode_moments(to_model_range(image)[None].to(device))[0]


def _steps_from(job: SamplingJob, start_logsnr: float) -> Grid:
    """Return the sampler's log-SNRs from `start_logsnr` on."""
    steps = make_logsnr_steps(job.model, job.settings)
    first, last = float(steps[0]), float(steps[steps.isfinite()][-1])
    if not first <= start_logsnr <= last:
        raise ValueError(
            f"start log-SNR {start_logsnr:g} is outside the sampler's steps, {first:.4g} (noise) "
            f"to {last:.4g}"
        )
    return torch.cat([torch.tensor([start_logsnr], dtype=steps.dtype), steps[steps > start_logsnr]])


def _noise(job: SamplingJob, seeds: Sequence[int], x: Tensor, steps: Grid) -> Image:
    """Return x at the first log-SNR of `steps`, with each seed's noise."""
    eps = job.start_noise(seeds)
    return diffuse(x.expand(len(seeds), -1, -1, -1), eps, steps[:1].expand(len(seeds)).to(eps))


def read_image(job: SamplingJob, path: Path) -> Tensor:
    """Read an image in the size that the job makes: (c, h, w) uint8.

    An image of another size is centre-cropped to a square and resized, as ADM does.

    Errors: ValueError for a file that cannot be read, and for an image of another size if the job's
        is not square.
    """
    channels = job.model.info.config.channels if job.codec == "pixels" else 3
    return _fit(job, open_image_file(path), path, channels)


def read_image_and_mask(job: SamplingJob, path: Path, mask: Path) -> tuple[Tensor, Tensor]:
    """Read an image as `read_image` does, and its mask: (h, w) bool, True where white.

    Errors: as `read_image`; ValueError for a mask of another size than its image.
    """
    image, white = open_image_file(path), open_image_file(mask)
    if image.size != white.size:
        raise ValueError(
            f"{mask} is {white.size}, {path} {image.size} (width, height); they must be equal"
        )
    return read_image(job, path), _fit(job, white, mask, 1)[0] > 127


def _fit(job: SamplingJob, image: Pillow.Image, path: Path, channels: int) -> Tensor:
    """Return an image as (channels, h, w) uint8 in the job's size."""
    factor = 1 if job.decoder is None else job.decoder.factor
    height, width = (side * factor for side in job.size(0))
    if image.size == (width, height):
        array = torch.from_numpy(np.array(to_mode(image, channels)))
        return array[None] if channels == 1 else array.permute(2, 0, 1)
    if height != width:
        raise ValueError(
            f"{path} is {image.width} x {image.height}; for this size it must be {width} x {height}"
        )
    return torch.from_numpy(np.array(to_pixels(image, height, channels, "adm")))


def save_img2img(
    job: SamplingJob, image: Path, start_logsnr: float, out: Path, seeds: range, overwrite: bool
) -> list[Path]:
    """Write a grid of the given image and its `img2img` versions, with a card."""
    check_edit_output(out, overwrite)
    given = read_image(job, image)
    edited = img2img(job, seeds, given, start_logsnr)
    how = {"edit": "img2img", "image": image.name, "start_logsnr": start_logsnr}
    # The card first: a file with its final name always has one.
    write_card(out, {**job.card(len(seeds), seeds.start), **how})
    save_png(_captioned(["given"], [given], seeds, edited), out)
    return [out]


def save_inpainting(
    job: SamplingJob,
    image: Path,
    mask: Path,
    start_logsnr: float | None,
    out: Path,
    seeds: range,
    overwrite: bool,
) -> list[Path]:
    """Write a grid of the image, its mask and its `inpaint` versions, with a card."""
    check_edit_output(out, overwrite)
    given, painted = read_image_and_mask(job, image, mask)
    edited = inpaint(job, seeds, given, painted, start_logsnr)
    masked = torch.where(painted, torch.full_like(given, 127), given)
    how = {"edit": "inpaint", "image": image.name, "mask": mask.name, "start_logsnr": start_logsnr}
    write_card(out, {**job.card(len(seeds), seeds.start), **how})
    save_png(_captioned(["given", "masked"], [given, masked], seeds, edited), out)
    return [out]


def _captioned(
    names: list[str], given: list[Tensor], seeds: Sequence[int], edited: Tensor
) -> Pillow.Image:
    captions = [*names, *map(str, seeds)]
    return make_grid(torch.stack([*given, *edited]), captions=captions)
