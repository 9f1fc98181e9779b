"""What noise schedules and their shift do to an image."""

from __future__ import annotations

import base64
import binascii
import functools
import io

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.core import rng
from mezzotint.core.image_grid import to_pil
from mezzotint.core.svg_plot import COLOURS, Line, svg_plot
from mezzotint.data.decode import UnreadableImage, decode_image
from mezzotint.data.shapes import open_shapes
from mezzotint.data.transforms import adm_crop, to_mode, to_model_range, to_uint8
from mezzotint.process import schedules
from mezzotint.process.denoiser import Schedule
from mezzotint.process.logsnr import alpha, diffuse, sigma
from mezzotint.web import html
from mezzotint.web.html import Figure
from mezzotint.web.studio import Limits

SIDES = (64, 128, 256, 512)
SHOWN = 64  # pixels; larger noised images are averaged to this, as the eye does from afar
LEVELS = (10.0, 7.5, 5.0, 2.5, 0.0, -2.5, -5.0, -7.5, -10.0)
OTHER_SCHEDULES = (
    "cosine_interpolated",
    "linear_ddpm",
    "scaled_linear",
    "linear_vp",
    "lognormal",
    "flow",
)


@functools.lru_cache(maxsize=8)
def decode_photo(uri: str, limits: Limits) -> Tensor:
    """Return the photo of a data URI as (3, 512, 512) in [-1, 1]; a built-in one if it is empty.

    Errors: ValueError for anything but a PNG, JPEG or WebP within the limits.
    """
    if not uri:
        return builtin_photo()
    head, _, body = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("send the bytes of an image; paths and web addresses are not opened")
    if len(body) * 3 // 4 > limits.photo_bytes:
        raise ValueError(
            f"this photo is larger than {limits.photo_bytes >> 20} MiB; choose a smaller one"
        )
    try:
        photo = decode_image(base64.b64decode(body, validate=True), ("PNG", "JPEG", "WEBP"))
    except (binascii.Error, UnreadableImage):
        raise ValueError("this is not an image; choose a PNG, JPEG or WebP file") from None
    if photo.width * photo.height > limits.photo_pixels:
        raise ValueError(
            f"this photo has more than {limits.photo_pixels:,} pixels; choose a smaller one"
        )
    square = adm_crop(to_mode(photo, 3), SIDES[-1])
    return to_model_range(torch.from_numpy(np.array(square)).permute(2, 0, 1))


@functools.lru_cache(maxsize=1)
def builtin_photo() -> Tensor:
    """Return four images of the built-in shapes dataset as one, (3, 512, 512)."""
    dataset = open_shapes(SIDES[-1] // 2, count=8)
    a, b, c, d = (torch.from_numpy(dataset.read(i)) for i in (1, 2, 4, 6))
    return to_model_range(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1))


def noised_jpeg(photo: Tensor, side: int, logsnr: float) -> bytes:
    """Return the photo at one size and log-SNR, as JPEG bytes of SHOWN pixels a side.

    Averaging blocks of s x s pixels divides the noise's standard deviation by s and keeps the
    image, so the result is a state of log-SNR + 2 log s (simple diffusion section 3.1). It is
    scaled to be variance preserving.
    """
    x = F.adaptive_avg_pool2d(photo[None], side)
    eps = rng.normal("noise", 0, [side], tuple(x.shape[1:]))
    level = torch.full((1,), max(min(logsnr, 40.0), -40.0))
    block = side // SHOWN
    pooled = F.avg_pool2d(diffuse(x, eps, level), block) * block
    # For an image of variance 1, the variance is alpha^2 s^2 + sigma^2.
    z = pooled / (alpha(level) ** 2 * block**2 + sigma(level) ** 2).sqrt()
    file = io.BytesIO()
    to_pil(to_uint8(z)[0]).save(file, format="JPEG", quality=90)
    return file.getvalue()


def shifted_cosine(side: int, reference: int) -> Schedule:
    """Return simple diffusion's cosine, shifted so that `side` pixels look like `reference`."""
    return schedules.cosine(image_d=side, noise_d=reference)


def logsnr_at(schedule: Schedule, u: float) -> float:
    """Return a schedule's log-SNR at one u."""
    return float(schedule(torch.tensor(u, dtype=torch.float64)))


def render_sizes(photo: Tensor, u: float, reference: int) -> str:
    """Return the photo at every size and one u: with one schedule for all, and with the shift."""
    plain = [logsnr_at(schedules.cosine(), u)] * len(SIDES)
    shifted = [logsnr_at(shifted_cosine(side, reference), u) for side in SIDES]
    rows = []
    for title, levels in (
        ("One schedule for every size: noise hides less of a larger image", plain),
        (f"Shifted to {reference} px: noise hides the same at every size", shifted),
    ):
        items = [
            Figure(noised_jpeg(photo, side, level), f"{side} px", f"log-SNR {level:+.1f}")
            for side, level in zip(SIDES, levels, strict=True)
        ]
        rows.append(html.figures(items, "mz-four", title))
    note = "Noise is added at the size named; then the image is averaged to 64 px."
    return f"{''.join(rows)}{html.note(note)}"


def render_levels(photo: Tensor, side: int) -> str:
    """Return the photo at one size and every log-SNR of LEVELS."""
    items = [Figure(noised_jpeg(photo, side, level), f"{level:+.1f}") for level in LEVELS]
    title = f"Each log-SNR at {side} px" + (f", averaged to {SHOWN}" if side > SHOWN else "")
    return html.figures(items, "mz-strip", title)


def plot_schedules(u: float, reference: int, names: list[str]) -> str:
    """Plot log-SNR over u: the cosine, its shifts, and the other schedules named."""
    time = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)

    def line(schedule: Schedule, name: str, i: int, style: str = "-") -> Line:
        y = schedules.continuous(schedule)(time).clamp(-22, 22)
        return Line(time.tolist(), y.tolist(), name, COLOURS[i % len(COLOURS)], style)

    lines = [line(schedules.cosine(), "cosine, no shift", 6, "--")]
    for i, side in enumerate(SIDES):
        lines.append(line(shifted_cosine(side, reference), f"{side} px, shifted", i))
    for i, name in enumerate(n for n in OTHER_SCHEDULES if n in names):
        lines.append(line(schedules.registry[name](), name, i + 4, ":"))
    return svg_plot(lines, "u (0 clean, 1 noise)", "log-SNR", marks=[u], size=(6.4, 3.0))
