"""Looking at a model: the picture along its way, pictures between two seeds, pictures that start from a given one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.core.files import atomic_open, write_json
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage
from mezzotint.sampling.generate_images import SamplingJob
from mezzotint.sampling.img2img import img2img, read_image
from mezzotint.sampling.sample import draw_start_noise, integrate, make_logsnr_steps
from mezzotint.sampling.writers import read_sampling_card

COLUMNS = 10  # of a filmstrip
FRAME_MILLISECONDS = 80  # of a GIF


@dataclass
class TrajectoryRecorder:
    """A denoiser that keeps what it answers: the denoised image of every call and its log-SNR."""

    denoise: Denoiser
    x: list[Tensor]
    logsnr: list[float]

    def __call__(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """The wrapped denoiser's answer."""
        guess = self.denoise(z, logsnr, cond)
        self.x.append(guess.x.cpu())
        self.logsnr.append(float(logsnr[0]))
        return guess


def trajectory(job: SamplingJob, seeds: Sequence[int]) -> tuple[list[Tensor], list[float]]:
    """The denoised images along the way: one (b, c, h, w) uint8 tensor per network call, and the log-SNR of each.

    All `seeds` are one batch. The last frame is the finished picture, at log-SNR +inf.
    """
    films: list[TrajectoryRecorder] = []

    def record(denoise: Denoiser) -> Denoiser:
        films.append(TrajectoryRecorder(denoise, [], []))
        return films[0]

    z = draw_start_noise(job.model, seeds, job.settings)
    stops = make_logsnr_steps(job.model, job.settings)
    last = integrate(
        job.model, z, stops, seeds, job.cond(seeds), job.settings, job.guide_model, record
    )
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


def interpolate(job: SamplingJob, seeds: Sequence[int], frames: int) -> Tensor:
    """Pictures between consecutive seeds: (len(seeds) - 1, frames, c, h, w) uint8, both ends included.

    A row keeps the label, and the sampler's own noise, of its first seed.

    Errors: ValueError for fewer than two seeds or frames.
    """
    if len(seeds) < 2 or frames < 2:
        raise ValueError(
            f"{len(seeds)} images and {frames} frames; interpolation needs two or more of each"
        )
    stops, rows = make_logsnr_steps(job.model, job.settings), []
    ends = draw_start_noise(job.model, seeds, job.settings)
    for i in range(len(seeds) - 1):
        z = torch.stack([slerp(ends[i], ends[i + 1], k / (frames - 1)) for k in range(frames)])
        same = [seeds[i]] * frames
        made = integrate(job.model, z, stops, same, job.cond(same), job.settings, job.guide_model)
        rows.append(job.decode(made))
    return torch.stack(rows)


def save_gif(frames: Sequence[Tensor], path: Path) -> None:
    """Frames of (n, c, h, w) uint8 as an endless GIF, each frame a grid; the last one stays for a second."""
    sheets = [make_grid(frame).convert("RGB") for frame in frames]
    pauses = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [1000]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        sheets[0].save(
            file, format="GIF", save_all=True, append_images=sheets[1:], duration=pauses, loop=0
        )


def check_free(out: Path, gif: Path | None) -> None:
    """ValueError where a file that no look has written would be replaced."""
    card = read_sampling_card(out) or {}
    kept = [out] if out.exists() and not card else []
    if gif is not None and gif.exists() and card.get("look") not in ("trajectory", "interpolate"):
        kept.append(gif)
    if kept:
        raise ValueError(f"{kept[0]} exists already; choose another --out, or add --overwrite")


def look(
    job: SamplingJob,
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
    asked = [
        name
        for name, on in (("trajectory", film), ("interpolate", frames), ("image", picture))
        if on is not None
    ]
    asked = [name for name in asked if name != "trajectory" or film]
    if len(asked) != 1 or (picture is None and (logsnr is not None or mask is not None)):
        raise ValueError(
            f"one look at a time, and a log-SNR or mask only with an image; asked: {', '.join(asked)}"
        )
    if out.suffix != ".png" or job.decoder is None or n < 1:
        raise ValueError(f"a look at one image or more is written as .png; given {out}, n {n}")
    seeds, gif = list(range(first, first + n)), out.with_suffix(".gif")
    if not overwrite:
        check_free(out, None if picture is not None else gif)
    how: dict[str, Any] = {"look": asked[0], "frames": frames, "logsnr": logsnr}
    if film:
        steps, levels = trajectory(job, seeds)
        kept = (
            [round(i * (len(steps) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)]
            if len(steps) > COLUMNS
            else None
        )
        kept = list(range(len(steps))) if kept is None else kept
        strip = torch.stack([steps[i] for i in kept], dim=1).flatten(0, 1)
        save_png(
            make_grid(strip, columns=len(kept), captions=[f"{levels[i]:+.1f}" for i in kept] * n),
            out,
        )
        save_gif(steps, gif)
    elif frames is not None:
        rows = interpolate(job, seeds, frames)
        save_png(make_grid(rows.flatten(0, 1), columns=frames), out)
        save_gif(list(rows.transpose(0, 1)), gif)
    else:
        assert picture is not None
        given, paint = read_image(job, picture, mask)
        made = img2img(job, seeds, given, logsnr, paint)
        before = (
            [given]
            if paint is None
            else [given, torch.where(paint, torch.full_like(given, 127), given)]
        )
        captions = ["given", "masked"][: len(before)] + [str(i) for i in seeds]
        save_png(make_grid(torch.stack([*before, *made]), captions=captions), out)
        how |= {"image": picture.name, "mask": None if mask is None else mask.name}
    write_json(out.with_name(f"{out.name}.json"), {**job.card(n, first), **how})
    return [out] if picture is not None else [out, gif]
