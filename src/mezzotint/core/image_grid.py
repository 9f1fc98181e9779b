"""Grids of images with captions, and single images, as Pillow images and PNG files."""

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
CAPTION_HEIGHT = 14  # pixels


def to_pil(image: Tensor) -> Pillow.Image:
    """Return a uint8 tensor (c, h, w), c 1 or 3, as a Pillow image."""
    array = image.cpu().permute(1, 2, 0).numpy()
    return Pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def make_grid(
    images: Tensor,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    zoom: int | None = None,
) -> Pillow.Image:
    """Arrange images in a grid, row by row.

    Args:
        images: uint8, (n, c, h, w), c 1 or 3.
        columns: None for a grid that is as square as possible.
        captions: one line under each image.
        zoom: whole-number enlargement (nearest pixel); None enlarges small images to about 64
        pixels.
    """
    n, _, height, width = images.shape
    if not n:
        raise ValueError("a grid needs at least one image")
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    zoom = zoom or max(1, round(64 / max(height, width)))
    height, width = height * zoom, width * zoom
    cell_width = width + MARGIN
    cell_height = height + MARGIN + (CAPTION_HEIGHT if captions else 0)
    size = columns * cell_width + MARGIN, rows * cell_height + MARGIN
    grid = Pillow.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=10)
    for i, image in enumerate(images):
        x, y = MARGIN + i % columns * cell_width, MARGIN + i // columns * cell_height
        grid.paste(to_pil(image).resize((width, height), Pillow.Resampling.NEAREST), (x, y))
        if captions:
            text = captions[i][: max(1, cell_width // 5)]  # a letter is about 5 pixels wide
            draw.text((x, y + height), text, fill="black", font=font)
    return grid


def save_png(image: Pillow.Image, path: Path) -> None:
    """Write a PNG atomically; make its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(path) as file:
        image.save(file, format="PNG")


def data_uri(data: bytes) -> str:
    """Return the bytes of a PNG or JPEG as a data URI, for the src of an <img>."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
