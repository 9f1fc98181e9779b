"""Pictures for people: grids of images with captions, written as PNG."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from torch import Tensor

from mezzotint.core.files import atomic_open

MARGIN = 2  # pixels between images


def to_pil(image: Tensor) -> Pillow.Image:
    """A uint8 tensor (c, h, w), c 1 or 3, as a Pillow image."""
    array = image.cpu().permute(1, 2, 0).numpy()
    return Pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def make_grid(
    images: Tensor,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    zoom: int | None = None,
) -> Pillow.Image:
    """Images side by side, row by row.

    Args:
        images: uint8, (n, c, h, w), c 1 or 3.
        columns: None for as square as possible.
        captions: one line under each image.
        zoom: whole-number enlargement (nearest pixel); None enlarges small images to about 64 pixels.
    """
    n, _, height, width = images.shape
    if not n:
        raise ValueError("a grid needs at least one image")
    columns = columns or math.ceil(math.sqrt(n))
    zoom = zoom or max(1, round(64 / max(height, width)))
    cell_w, cell_h = width * zoom + MARGIN, height * zoom + MARGIN
    line = 14 if captions else 0
    rows = math.ceil(n / columns)
    sheet = Pillow.new("RGB", (columns * cell_w + MARGIN, rows * (cell_h + line) + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for i, image in enumerate(images):
        x, y = MARGIN + i % columns * cell_w, MARGIN + i // columns * (cell_h + line)
        picture = to_pil(image).resize((width * zoom, height * zoom), Pillow.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        if captions:
            draw.text(
                (x, y + height * zoom), captions[i][: max(1, cell_w // 5)], fill="black", font=font
            )
    return sheet


def save_png(picture: Pillow.Image, path: Path) -> None:
    """Write a PNG beside `path` and rename it into place, so that a half-written one is never seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        picture.save(file, format="PNG")


def data_uri(data: bytes) -> str:
    """Return the bytes of a PNG or JPEG as a data URI, for the src of an <img>."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
