"""A photo at several sizes and noise levels: what a schedule, and its shift, do to the picture of one's own."""

from __future__ import annotations

import base64
import binascii
import functools
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as Pillow
from torch import Tensor

from mezzotint.core import rng
from mezzotint.core.image_grid import to_pil
from mezzotint.data.shapes import shapes
from mezzotint.data.transforms import adm_crop, to_mode, to_model_range, to_uint8
from mezzotint.process import schedules
from mezzotint.process.denoiser import Schedule
from mezzotint.process.logsnr import alpha, diffuse, sigma
from mezzotint.web import html
from mezzotint.web.html import COLOURS, Figure, Line
from mezzotint.web.studio import Limits

SIDES = (64, 128, 256, 512)
SHOWN = 64  # pixels to which larger noised pictures are averaged, as the eye does from afar
LEVELS = (10.0, 7.5, 5.0, 2.5, 0.0, -2.5, -5.0, -7.5, -10.0)
OTHERS = ("cosine_interpolated", "linear_ddpm", "scaled_linear", "linear_vp", "lognormal", "flow")


@functools.lru_cache(maxsize=8)
def photo_of(text: str, limits: Limits) -> Tensor:
    """The photo in a data address as (3, 512, 512) in -1...1; a drawing of our own where there is none.

    Errors: ValueError for anything but a PNG, JPEG or WebP picture within the limits.
    """
    if not text:
        return own_picture()
    head, _, body = text.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError(
            "a photo comes as the bytes of a picture; a name or an address is not opened"
        )
    if len(body) * 3 // 4 > limits.photo_bytes:
        raise ValueError(
            f"this photo is larger than {limits.photo_bytes >> 20} MiB; choose a smaller one"
        )
    try:
        picture = Pillow.open(
            io.BytesIO(base64.b64decode(body, validate=True)), formats=("PNG", "JPEG", "WEBP")
        )
    except (binascii.Error, OSError, SyntaxError, Pillow.DecompressionBombError):
        raise ValueError("this is no picture; a PNG, JPEG or WebP is needed") from None
    if picture.width * picture.height > limits.photo_pixels:
        raise ValueError(
            f"this photo has more than {limits.photo_pixels:,} pixels; choose a smaller one"
        )
    square = adm_crop(to_mode(picture, 3), SIDES[-1])
    return to_model_range(torch.from_numpy(np.array(square)).permute(2, 0, 1))


@functools.lru_cache(maxsize=1)
def own_picture() -> Tensor:
    """Four of the built-in drawings as one picture, (3, 512, 512)."""
    drawn = shapes(SIDES[-1] // 2, count=8)
    four = [torch.from_numpy(drawn.read(i)) for i in (1, 2, 4, 6)]
    return to_model_range(torch.cat([torch.cat(four[:2], 2), torch.cat(four[2:], 2)], 1))


def at_side(photo: Tensor, side: int) -> Tensor:
    """The photo averaged down to side x side, (1, 3, side, side)."""
    return F.adaptive_avg_pool2d(photo[None], side)


def noised(photo: Tensor, side: int, logsnr: float) -> bytes:
    """The photo at one size and log-SNR, as JPEG bytes of SHOWN pixels.

    Averaging blocks of s x s pixels divides the noise's standard deviation by s and leaves the picture, so the result
    is a state of log-SNR + 2 log s (simple diffusion section 3.1); it is scaled to variance preserving like any other.
    """
    x = at_side(photo, side)
    eps = rng.normal("noise", 0, [side], tuple(x.shape[1:]))
    level = torch.full((1,), max(min(logsnr, 40.0), -40.0))
    block = side // SHOWN
    pooled = F.avg_pool2d(diffuse(x, eps, level), block) * block
    # Of variance alpha^2 s^2 + sigma^2 for a picture of variance 1.
    z = pooled / (alpha(level) ** 2 * block**2 + sigma(level) ** 2).sqrt()
    file = io.BytesIO()
    to_pil(to_uint8(z)[0]).save(file, format="JPEG", quality=90)
    return file.getvalue()


def shifted(side: int, reference: int) -> Schedule:
    """simple diffusion's cosine, shifted so that `side` pixels look like `reference` pixels."""
    return schedules.cosine(image_d=side, noise_d=reference)


def at(schedule: Schedule, u: float) -> float:
    """A schedule's log-SNR at one u."""
    return float(schedule(torch.tensor(u, dtype=torch.float64)))


def sizes(photo: Tensor, u: float, reference: int) -> str:
    """The same photo at every size and one u: with one schedule for all, and with the shift."""
    plain, rows = at(schedules.cosine(), u), []
    for title, levels in (
        ("One schedule for every size: the larger, the less is hidden", [plain] * len(SIDES)),
        (
            f"Shifted to {reference} px: every size hides as much",
            [at(shifted(s, reference), u) for s in SIDES],
        ),
    ):
        found = zip(SIDES, levels, strict=True)
        items = [
            Figure(noised(photo, s, level), f"{s} px", f"log-SNR {level:+.1f}")
            for s, level in found
        ]
        rows.append(html.figures(items, "mz-four", title))
    words = (
        "Pixels are noised at the size named and then averaged to 64 px, as the eye does from afar."
    )
    return f"{''.join(rows)}{html.note(words)}"


def levels(photo: Tensor, side: int) -> str:
    """What each log-SNR looks like at one size."""
    items = [Figure(noised(photo, side, level), f"{level:+.1f}") for level in LEVELS]
    return html.figures(
        items,
        "mz-strip",
        f"What each log-SNR looks like at {side} px" + (", averaged to 64" if side > SHOWN else ""),
    )


def curves(u: float, reference: int, others: list[str]) -> str:
    """Log-SNR over u: the cosine, its shifts, and whatever else is asked for."""
    time = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)

    def line(schedule: Schedule, name: str, i: int, style: str = "-") -> Line:
        y = schedules.continuous(schedule)(time).clamp(-22, 22)
        return Line(time.tolist(), y.tolist(), name, COLOURS[i % len(COLOURS)], style)

    lines = [line(schedules.cosine(), "cosine, no shift", 6, "--")]
    lines += [line(shifted(s, reference), f"{s} px, shifted", i) for i, s in enumerate(SIDES)]
    for i, name in enumerate(n for n in OTHERS if n in others):
        lines.append(line(schedules.registry[name](), name, i + 4, ":"))
    return html.plot(lines, "u (0 clean, 1 noise)", "log-SNR", marks=[u], size=(6.4, 3.0))
