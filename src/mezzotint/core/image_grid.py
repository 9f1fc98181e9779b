"""Grids of images with captions, and single images, as Pillow images and PNG files."""

from __future__ import annotations

import base64
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mezzotint.core.files import atomic_open

MARGIN = 2  # pixels between images
CAPTION_HEIGHT = 14  # pixels
FONT_SIZE = 10  # pixels


def to_pil(image: Tensor) -> Pillow.Image:
    """Return a uint8 tensor (c, h, w), c 1 or 3, as a Pillow image."""
    array = image.cpu().permute(1, 2, 0).numpy()
    return Pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


@functools.cache
def _open_font() -> tuple[ImageFont.FreeTypeFont, frozenset[int]]:
    """Return the font of the captions, DejaVu Sans, and the code points that it draws."""
    from matplotlib import get_data_path
    from matplotlib.ft2font import FT2Font

    path = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, FONT_SIZE), frozenset(FT2Font(path).get_charmap())


def to_drawable(text: str) -> str:
    """Return the text on one line, with what the font cannot draw transliterated to ASCII."""
    from anyascii import anyascii

    known = _open_font()[1]
    line = " ".join(text.split())
    return "".join(c if ord(c) in known else anyascii(c) for c in line if c.isprintable())


def class_captions(labels: Sequence[int], names: Sequence[str] | None) -> list[str]:
    """Return a caption for each class label.

    It is the class's name, the number where it has none, and both where the name has to be
    transliterated, since two names may become one.
    """

    def caption(label: int) -> str:
        if names is None or label >= len(names):
            return str(label)
        name = names[label]
        drawn = to_drawable(name)
        return name if drawn == name else f"{label} {drawn}".rstrip()

    return [caption(label) for label in labels]


def _shorten(text: str, width: float) -> str:
    """Return the text with its middle left out where it is wider than `width` pixels."""
    font = _open_font()[0]
    kept = len(text)
    shortened = text
    while font.getlength(shortened) > width and kept > 1:
        kept -= 1
        shortened = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return shortened


def _choose_columns(n: int) -> int:
    """Return the columns of a grid of n images, see `make_grid`."""
    squarest = math.ceil(math.sqrt(n))
    widest = math.isqrt(4 * n)
    return next((c for c in range(squarest, widest + 1) if n % c == 0), squarest)


def make_grid(
    images: Tensor,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
    zoom: int | None = None,
) -> Pillow.Image:
    """Arrange images in a grid, row by row.

    Args:
        images: uint8, (n, c, h, w), c 1 or 3.
        columns: None for the squarest grid of full rows, at most four times as wide as high, or
            else the squarest grid.
        captions: one line under each image, shortened to its width.
        zoom: whole-number enlargement (nearest pixel); None enlarges small images to about 64
            pixels.
    """
    n, _, height, width = images.shape
    if not n:
        raise ValueError("a grid needs at least one image")
    columns = columns or _choose_columns(n)
    rows = math.ceil(n / columns)
    zoom = zoom or max(1, round(64 / max(height, width)))
    height, width = height * zoom, width * zoom
    cell_width = width + MARGIN
    cell_height = height + MARGIN + (CAPTION_HEIGHT if captions else 0)
    size = columns * cell_width + MARGIN, rows * cell_height + MARGIN
    grid = Pillow.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = MARGIN + i % columns * cell_width, MARGIN + i // columns * cell_height
        grid.paste(to_pil(image).resize((width, height), Pillow.Resampling.NEAREST), (x, y))
        if captions:
            text = _shorten(to_drawable(captions[i]), width)
            draw.text((x, y + height), text, fill="black", font=_open_font()[0])
    return grid


def save_png(image: Pillow.Image, path: Path, software: str | None = None) -> None:
    """Write a PNG atomically; make its folder if needed. It names the `software` that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if software is not None:
        info.add_text("Software", software)
    with atomic_open(path) as file:
        image.save(file, format="PNG", pnginfo=info)


def data_uri(data: bytes) -> str:
    """Return the bytes of a PNG or JPEG as a data URI, for the src of an <img>."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
