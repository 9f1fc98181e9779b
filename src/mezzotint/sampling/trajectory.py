"""Denoising trajectories and interpolation between seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.core.files import atomic_open, is_special
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Image, PerImage
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.sample import make_logsnr_steps
from mezzotint.sampling.writers import check_edit_output, write_card

FILMSTRIP_COLUMNS = 10
FRAME_MILLISECONDS = 80  # of a GIF; its last frame is shown for a second


@dataclass
class TrajectoryRecorder:
    """A denoiser that keeps its answers: the denoised image and the log-SNR of every call."""

    denoise: Denoiser
    x: list[Tensor] = field(default_factory=list)
    logsnr: list[float] = field(default_factory=list)

    def __call__(self, z: Image, logsnr: PerImage, cond: Cond) -> Denoised:
        """Return the wrapped denoiser's answer."""
        guess = self.denoise(z, logsnr, cond)
        self.x.append(guess.x.cpu())
        self.logsnr.append(float(logsnr[0]))
        return guess


def trajectory(job: SamplingJob, seeds: Sequence[int]) -> tuple[list[Tensor], list[float]]:
    """Sample images and return the denoised ones along the way.

    Returns:
        One (b, c, h, w) uint8 tensor per network call, and the log-SNR of each. The last one is the
        finished image, at log-SNR +inf.
    """
    steps = make_logsnr_steps(job.model, job.settings)
    batches, levels = [], []
    for part in job.split(seeds):
        recorder = TrajectoryRecorder(job.denoiser(part))
        last = job.run_sampler(job.start_noise(part), steps, part, lambda _, r=recorder: r)
        batches.append([job.decode(x) for x in [*recorder.x, last.cpu()]])
        levels = [*recorder.logsnr, float("inf")]
    # All batches take the same steps.
    return [torch.cat(frame) for frame in zip(*batches, strict=True)], levels


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate spherically from a (t = 0) to b (t = 1); any shape.

    DDIM, arXiv 2010.02502, appendix D.5. Keeps the norm of Gaussian noise, which a straight line
    would shrink. Parallel a and b are mixed linearly.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if float(angle.sin()) < 1e-6:
        return (1 - t) * a + t * b
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def interpolate(job: SamplingJob, seeds: Sequence[int], frames: int) -> Tensor:
    """Sample images between the noises of consecutive seeds, both ends included.

    A row keeps the label, and the sampler's own noise, of its first seed.

    Returns:
        (len(seeds) - 1, frames, c, h, w) uint8.

    Errors: ValueError for fewer than two seeds or frames.
    """
    if len(seeds) < 2 or frames < 2:
        raise ValueError(
            f"{len(seeds)} images and {frames} frames; interpolation needs two or more of each"
        )
    steps, rows = make_logsnr_steps(job.model, job.settings), []
    noise = job.start_noise(seeds)
    for seed, start, end in zip(seeds[:-1], noise[:-1], noise[1:], strict=True):
        row = []
        for part in job.split(range(frames)):
            z = torch.stack([slerp(start, end, k / (frames - 1)) for k in part])
            row.append(job.run_sampler(z, steps, [seed] * len(part)))
        rows.append(job.decode(torch.cat(row)))
    return torch.stack(rows)


def save_gif(frames: Sequence[Tensor], path: Path) -> None:
    """Write frames of (n, c, h, w) uint8, each as a grid, to an endless GIF."""
    sheets = [make_grid(frame).convert("RGB") for frame in frames]
    durations = [FRAME_MILLISECONDS] * (len(sheets) - 1) + [1000]
    with atomic_open(path) as file:
        sheets[0].save(
            file, format="GIF", save_all=True, append_images=sheets[1:], duration=durations, loop=0
        )


def _gif_path(out: Path) -> Path:
    """Return the path of the GIF of an edit: beside it, for a device in the current folder."""
    return (Path(out.name) if is_special(out) else out).with_suffix(".gif")


def save_trajectory(job: SamplingJob, out: Path, seeds: range, overwrite: bool) -> list[Path]:
    """Write each seed's `trajectory` as a filmstrip and a GIF, with a card."""
    gif = _gif_path(out)
    check_edit_output(out, overwrite, gif)
    frames, levels = trajectory(job, seeds)
    columns = min(len(frames), FILMSTRIP_COLUMNS)
    shown = [round(i * (len(frames) - 1) / (columns - 1)) for i in range(columns)]
    strip = torch.stack([frames[i] for i in shown], dim=1).flatten(0, 1)
    captions = [f"{levels[i]:+.1f}" for i in shown] * len(seeds)
    how = {"edit": "trajectory"}
    # The card first: a file with its final name always has one.
    write_card(out, {**job.card(len(seeds), seeds.start), **how})
    save_gif(frames, gif)
    save_png(make_grid(strip, columns=columns, captions=captions), out)
    return [out, gif]


def save_interpolation(
    job: SamplingJob, frames: int, out: Path, seeds: range, overwrite: bool
) -> list[Path]:
    """Write `interpolate` as a grid, one row per pair of seeds, and as a GIF, with a card."""
    gif = _gif_path(out)
    check_edit_output(out, overwrite, gif)
    rows = interpolate(job, seeds, frames)
    how = {"edit": "interpolate", "frames": frames}
    write_card(out, {**job.card(len(seeds), seeds.start), **how})
    save_gif(list(rows.transpose(0, 1)), gif)
    save_png(make_grid(rows.flatten(0, 1), columns=frames), out)
    return [out, gif]
