"""Looking at a model: the picture along its way, pictures between two seeds, pictures that start from a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from torch import Tensor

from mezzotint.data.pixels import pixels_of, to_mode, to_model_range
from mezzotint.generate import grid_of, integrate, start_noise
from mezzotint.outputs import card_beside, whole, write_json
from mezzotint.pictures import grid, save_png
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, Level
from mezzotint.process.guidance import with_image
from mezzotint.process.logsnr import diffuse
from mezzotint.produce import Job

COLUMNS = 10  # of a filmstrip
FRAME_MILLISECONDS = 80  # of a GIF


@dataclass
class Film:
    """A denoiser that keeps what it answers: the denoised image of every call and its log-SNR."""

    denoise: Denoiser
    x: list[Tensor]
    logsnr: list[float]

    def __call__(self, z: Image, logsnr: Level, cond: Cond) -> Denoised:
        """The wrapped denoiser's answer."""
        guess = self.denoise(z, logsnr, cond)
        self.x.append(guess.x.cpu())
        self.logsnr.append(float(logsnr[0]))
        return guess


def trajectory(job: Job, numbers: Sequence[int]) -> tuple[list[Tensor], list[float]]:
    """The denoised images along the way: one (b, c, h, w) uint8 tensor per network call, and the log-SNR of each.

    All `numbers` are one batch. The last frame is the finished picture, at log-SNR +inf.
    """
    films: list[Film] = []

    def record(denoise: Denoiser) -> Denoiser:
        films.append(Film(denoise, [], []))
        return films[0]

    z = start_noise(job.model, numbers, job.settings)
    stops = grid_of(job.model, job.settings)
    last = integrate(job.model, z, stops, numbers, job.cond(numbers), job.settings, job.weak, record)
    film = films[0]
    return [job.decode(x) for x in [*film.x, last.cpu()]], [*film.logsnr, float("inf")]


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at t in [0, 1] of the great arc from a to b, of any shape (DDIM, arXiv 2010.02502, appendix D.5).

    Keeps the norm of Gaussian noise, which a straight line would shrink. Parallel a and b are mixed linearly.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if float(angle.sin()) < 1e-6:
        return (1 - t) * a + t * b
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def interpolate(job: Job, numbers: Sequence[int], frames: int) -> Tensor:
    """Pictures between consecutive seeds: (len(numbers) - 1, frames, c, h, w) uint8, both ends included.

    A row keeps the label, and the sampler's own noise, of its first seed.

    Errors: ValueError for fewer than two numbers or frames.
    """
    if len(numbers) < 2 or frames < 2:
        raise ValueError(f"{len(numbers)} images and {frames} frames; interpolation needs two or more of each")
    stops, rows = grid_of(job.model, job.settings), []
    ends = start_noise(job.model, numbers, job.settings)
    for i in range(len(numbers) - 1):
        z = torch.stack([slerp(ends[i], ends[i + 1], k / (frames - 1)) for k in range(frames)])
        seeds = [numbers[i]] * frames
        made = integrate(job.model, z, stops, seeds, job.cond(seeds), job.settings, job.weak)
        rows.append(job.decode(made))
    return torch.stack(rows)


def keeping(denoise: Denoiser, known: Image, keep: Tensor) -> Denoiser:
    """The denoiser with `known` in place of its image where `keep`, the noise recomputed (inpainting).

    Replacing the image's known part at every level (DDNM, arXiv 2212.00490 eq. 13, whose A is here the mask) keeps the
    state's known part at alpha known + sigma eps, what score-SDE (arXiv 2011.13456, appendix I.2) and RePaint (arXiv
    2201.09865 eq. 8) write into it; there is no resampling. With no noise left at the end the known part is exact.

    Args:
        known: (b, c, h, w), in the model's space. keep: True where `known` holds, broadcastable to it.
    """

    def guess(z: Image, logsnr: Level, cond: Cond) -> Denoised:
        raw = denoise(z, logsnr, cond)
        return with_image(z, logsnr, raw, torch.where(keep, known.to(raw.x), raw.x))

    return guess


def from_picture(
    job: Job, numbers: Sequence[int], picture: Tensor, logsnr: float | None = None, paint: Tensor | None = None
) -> Tensor:
    """Pictures that start from a given one: noised to a log-SNR (SDEdit, arXiv 2108.01073), inpainted, or both.

    Args:
        picture: (c, h, w) uint8, see `read_picture`.
        logsnr: where to start; lower forgets more. None starts from noise, which needs `paint`.
        paint: (h, w) bool, True where to paint anew; the rest stays as it is. For latents a cell stays if no pixel of
            it is painted.

    Returns:
        (len(numbers), c, h, w) uint8.

    Errors: ValueError for a log-SNR outside the sampler's grid.
    """
    if job.decoder is None:
        raise ValueError("starting from a picture makes pictures; leave latents out")
    if logsnr is None and paint is None:
        raise ValueError("a picture to start from needs a log-SNR to noise it to, a mask, or both")
    stops = grid_of(job.model, job.settings)
    device = next(job.model.parameters()).device
    x = job.decoder.encode_moments(to_model_range(picture)[None].to(device))[0].expand(len(numbers), -1, -1, -1)
    keep = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    if paint is not None:
        cells = torch.nn.functional.max_pool2d(paint[None, None].float(), job.decoder.factor)
        keep = (cells == 0).to(device)
    if logsnr is not None:
        first, last = float(stops[0]), float(stops[stops.isfinite()][-1])
        if not first <= logsnr <= last:
            raise ValueError(f"log-SNR {logsnr:g} is outside the sampler's grid, {first:.4g} (noise) to {last:.4g}")
        stops = torch.cat([torch.tensor([logsnr], dtype=stops.dtype), stops[stops > logsnr]])
    eps = start_noise(job.model, numbers, job.settings)
    known = x if logsnr is not None else torch.where(keep, x, torch.zeros_like(x))
    z = diffuse(known, eps, stops[:1].expand(len(numbers)).to(eps))

    def around(denoise: Denoiser) -> Denoiser:
        return keeping(denoise, x, keep)

    wrap = around if paint is not None else None
    return job.decode(integrate(job.model, z, stops, numbers, job.cond(numbers), job.settings, job.weak, wrap))


def read_picture(job: Job, path: Path, mask: Path | None = None) -> tuple[Tensor, Tensor | None]:
    """A picture and a mask in the size that the job makes: (c, h, w) uint8, and (h, w) bool, True where white.

    Pictures of another size are centre-cropped to a square and resized, as ADM does, the mask with them.

    Errors: ValueError for unreadable files, a mask of another size than its picture, and a non-square size that the
        picture does not have.
    """
    opened = [_open(p) for p in (path, *([] if mask is None else [mask]))]
    if len({p.size for p in opened}) > 1:
        raise ValueError(f"{mask} is {opened[1].size}, {path} {opened[0].size} (width, height); they must be alike")
    factor = 1 if job.decoder is None else job.decoder.factor
    config = job.model.card.config
    height, width = (side * factor for side in job.settings.size or (config.size, config.size))
    channels = config.channels if job.codec == "pixels" else 3

    def fitted(image: Pillow.Image, channels: int) -> Tensor:
        if image.size == (width, height):
            array = np.array(to_mode(image, channels))
            return torch.from_numpy(array)[None] if channels == 1 else torch.from_numpy(array).permute(2, 0, 1)
        if height != width:
            raise ValueError(f"{path} is {image.width} x {image.height}; for this size it must be {width} x {height}")
        return torch.from_numpy(np.array(pixels_of(image, height, channels, "adm")))

    return fitted(opened[0], channels), None if mask is None else fitted(opened[1], 1)[0] > 127


def _open(path: Path) -> Pillow.Image:
    try:
        with Pillow.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


def save_gif(frames: Sequence[Tensor], path: Path) -> None:
    """Frames of (n, c, h, w) uint8 as an endless GIF, each frame a grid; the last one stays for a second."""
    sheets = [grid(frame).convert("RGB") for frame in frames]
    pauses = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [1000]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as file:
        sheets[0].save(file, format="GIF", save_all=True, append_images=sheets[1:], duration=pauses, loop=0)


def check_free(out: Path, gif: Path | None) -> None:
    """ValueError where a file that no look has written would be replaced."""
    card = card_beside(out) or {}
    kept = [out] if out.exists() and not card else []
    if gif is not None and gif.exists() and card.get("look") not in ("trajectory", "interpolate"):
        kept.append(gif)
    if kept:
        raise ValueError(f"{kept[0]} exists already; choose another --out, or add --overwrite")


def look(
    job: Job,
    out: Path,
    n: int,
    first: int = 0,
    *,
    film: bool = False,
    frames: int | None = None,
    picture: Path | None = None,
    logsnr: float | None = None,
    mask: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write one of the looks at images first ... first + n - 1, with its card beside it; returns the pictures written.

    Args:
        out: ends in .png; a film and an interpolation are written as .gif too.
        film: the way to each image, as a filmstrip and a GIF. frames: between consecutive seeds.
        picture, logsnr, mask: see `from_picture`; white in the mask is painted.
        overwrite: whether files may be replaced that no look has written.

    Errors: ValueError for two looks at once, an `out` that is no .png, and what the looks raise.
    """
    asked = [name for name, on in (("trajectory", film), ("interpolate", frames), ("image", picture)) if on is not None]
    asked = [name for name in asked if name != "trajectory" or film]
    if len(asked) != 1 or (picture is None and (logsnr is not None or mask is not None)):
        raise ValueError(f"one look at a time, and a log-SNR or mask only with an image; asked: {', '.join(asked)}")
    if out.suffix != ".png" or job.decoder is None or n < 1:
        raise ValueError(f"a look at one image or more is written as .png; given {out}, n {n}")
    numbers, gif = list(range(first, first + n)), out.with_suffix(".gif")
    if not overwrite:
        check_free(out, None if picture is not None else gif)
    how: dict[str, Any] = {"look": asked[0], "frames": frames, "logsnr": logsnr}
    if film:
        steps, levels = trajectory(job, numbers)
        kept = [round(i * (len(steps) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)] if len(steps) > COLUMNS else None
        kept = list(range(len(steps))) if kept is None else kept
        strip = torch.stack([steps[i] for i in kept], dim=1).flatten(0, 1)
        save_png(grid(strip, columns=len(kept), captions=[f"{levels[i]:+.1f}" for i in kept] * n), out)
        save_gif(steps, gif)
    elif frames is not None:
        rows = interpolate(job, numbers, frames)
        save_png(grid(rows.flatten(0, 1), columns=frames), out)
        save_gif(list(rows.transpose(0, 1)), gif)
    else:
        assert picture is not None
        given, paint = read_picture(job, picture, mask)
        made = from_picture(job, numbers, given, logsnr, paint)
        before = [given] if paint is None else [given, torch.where(paint, torch.full_like(given, 127), given)]
        captions = ["given", "masked"][: len(before)] + [str(i) for i in numbers]
        save_png(grid(torch.stack([*before, *made]), captions=captions), out)
        how |= {"image": picture.name, "mask": None if mask is None else mask.name}
    write_json(out.with_name(f"{out.name}.json"), {**job.card(n, first), **how})
    return [out] if picture is not None else [out, gif]
