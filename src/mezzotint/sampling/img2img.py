"""Images that start from a given one: image to image and inpainting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from torch import Tensor

from mezzotint.data.transforms import to_mode, to_model_range, to_pixels
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage
from mezzotint.process.guidance import with_image
from mezzotint.process.logsnr import diffuse
from mezzotint.sampling.generate_images import SamplingJob
from mezzotint.sampling.sample import draw_start_noise, integrate, make_logsnr_steps


def inpaint_denoiser(denoise: Denoiser, known: Image, keep: Tensor) -> Denoiser:
    """The denoiser with `known` in place of its image where `keep`, the noise recomputed (inpainting).

    Replacing the image's known part at every level (DDNM, arXiv 2212.00490 eq. 13, whose A is here the mask) keeps the
    state's known part at alpha known + sigma eps, what score-SDE (arXiv 2011.13456, appendix I.2) and RePaint (arXiv
    2201.09865 eq. 8) write into it; there is no resampling. With no noise left at the end the known part is exact.

    Args:
        known: (b, c, h, w), in the model's space. keep: True where `known` holds, broadcastable to it.
    """

    def guess(z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        raw = denoise(z, logsnr, cond)
        return with_image(z, logsnr, raw, torch.where(keep, known.to(raw.x), raw.x))

    return guess


def img2img(
    job: SamplingJob,
    seeds: Sequence[int],
    picture: Tensor,
    logsnr: float | None = None,
    paint: Tensor | None = None,
) -> Tensor:
    """Pictures that start from a given one: noised to a log-SNR (SDEdit, arXiv 2108.01073), inpainted, or both.

    Args:
        picture: (c, h, w) uint8, see `read_picture`.
        logsnr: where to start; lower forgets more. None starts from noise, which needs `paint`.
        paint: (h, w) bool, True where to paint anew; the rest stays as it is. For latents a cell stays if no pixel of
            it is painted.

    Returns:
        (len(seeds), c, h, w) uint8.

    Errors: ValueError for a log-SNR outside the sampler's grid.
    """
    if job.decoder is None:
        raise ValueError("starting from a picture makes pictures; leave latents out")
    if logsnr is None and paint is None:
        raise ValueError("a picture to start from needs a log-SNR to noise it to, a mask, or both")
    stops = make_logsnr_steps(job.model, job.settings)
    device = next(job.model.parameters()).device
    x = job.decoder.encode_moments(to_model_range(picture)[None].to(device))[0].expand(
        len(seeds), -1, -1, -1
    )
    keep = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    if paint is not None:
        cells = torch.nn.functional.max_pool2d(paint[None, None].float(), job.decoder.factor)
        keep = (cells == 0).to(device)
    if logsnr is not None:
        first, last = float(stops[0]), float(stops[stops.isfinite()][-1])
        if not first <= logsnr <= last:
            raise ValueError(
                f"log-SNR {logsnr:g} is outside the sampler's grid, {first:.4g} (noise) to {last:.4g}"
            )
        stops = torch.cat([torch.tensor([logsnr], dtype=stops.dtype), stops[stops > logsnr]])
    eps = draw_start_noise(job.model, seeds, job.settings)
    known = x if logsnr is not None else torch.where(keep, x, torch.zeros_like(x))
    z = diffuse(known, eps, stops[:1].expand(len(seeds)).to(eps))

    def around(denoise: Denoiser) -> Denoiser:
        return inpaint_denoiser(denoise, x, keep)

    wrap = around if paint is not None else None
    return job.decode(
        integrate(job.model, z, stops, seeds, job.cond(seeds), job.settings, job.guide_model, wrap)
    )


def read_image(
    job: SamplingJob, path: Path, mask: Path | None = None
) -> tuple[Tensor, Tensor | None]:
    """A picture and a mask in the size that the job makes: (c, h, w) uint8, and (h, w) bool, True where white.

    Pictures of another size are centre-cropped to a square and resized, as ADM does, the mask with them.

    Errors: ValueError for unreadable files, a mask of another size than its picture, and a non-square size that the
        picture does not have.
    """
    opened = [_open(p) for p in (path, *([] if mask is None else [mask]))]
    if len({p.size for p in opened}) > 1:
        raise ValueError(
            f"{mask} is {opened[1].size}, {path} {opened[0].size} (width, height); they must be alike"
        )
    factor = 1 if job.decoder is None else job.decoder.factor
    config = job.model.info.config
    height, width = (side * factor for side in job.settings.size or (config.size, config.size))
    channels = config.channels if job.codec == "pixels" else 3

    def fitted(image: Pillow.Image, channels: int) -> Tensor:
        if image.size == (width, height):
            array = np.array(to_mode(image, channels))
            return (
                torch.from_numpy(array)[None]
                if channels == 1
                else torch.from_numpy(array).permute(2, 0, 1)
            )
        if height != width:
            raise ValueError(
                f"{path} is {image.width} x {image.height}; for this size it must be {width} x {height}"
            )
        return torch.from_numpy(np.array(to_pixels(image, height, channels, "adm")))

    return fitted(opened[0], channels), None if mask is None else fitted(opened[1], 1)[0] > 127


def _open(path: Path) -> Pillow.Image:
    try:
        with Pillow.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
