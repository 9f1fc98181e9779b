"""Image preprocessing: crop, resize, conversion to and from [-1, 1].

There is no colour management, on purpose: an embedded ICC profile is ignored.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from mezzotint.core import rng
from mezzotint.core.registry import suggest

RULES = ("round", "truncate")  # of to_uint8
MAX_INTERMEDIATE_PIXELS = 1 << 27  # 128 Mpixel; a 1 x 60000 strip would be enlarged to gigabytes


class UnreadableImage(ValueError):
    """An image that cannot become pixels; the message is the reason, for a report."""


def to_model_range(pixels: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Return float32 -1...1 of uint8 0...255: x / 127.5 - 1 (specs/dimr.md section 4)."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(x: Float[Tensor, "..."], rule: str = "round") -> UInt8[Tensor, "..."]:
    """Return uint8 0...255 of -1...1, clamped.

    Args:
        x: any shape, any floating dtype; computed in float32 or wider.
        rule: "round" inverts `to_model_range` exactly; "truncate" drops the fraction, as ADM's
            sampling script does and as the reference statistics of its evaluator expect.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; {suggest(rule, RULES)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = ((x + 1) * 127.5).clamp(0, 255)
    return (scaled.round() if rule == "round" else scaled).to(torch.uint8)


def flip(images: Tensor, mask: Bool[Tensor, " b"]) -> Tensor:
    """Return images (b, ..., w), those where `mask` is True mirrored left to right."""
    mask = mask.to(images.device).reshape(-1, *[1] * (images.ndim - 1))
    return torch.where(mask, images.flip(-1), images)


def draw_flips(seed: int, image_numbers: list[int]) -> Bool[Tensor, " b"]:
    """Draw which image numbers of a run are mirrored, each with probability 1/2."""
    return rng.uniform("augment", seed, image_numbers) < 0.5


def _scaled_to_uint8(image: Image.Image) -> Image.Image:
    """Scale a grey image of more than 8 bits; Pillow's own convert clips at 255."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage(f"mode {image.mode} with non-finite values")
    low, high = float(values.min()), float(values.max())
    # Pillow defines no full scale for I and F. Ours is the smallest usual one that holds the
    # values: 16 bits then 32 for integers, 1 then 8 then 16 bits for floats.
    scales = {"I": (65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    full_scale = next((s for s in scales if high <= s), None)
    if full_scale is None or low < 0:
        raise UnreadableImage(
            f"mode {image.mode} with values {low:g}...{high:g}, outside every usual range"
        )
    return Image.fromarray(np.round(values * (255.0 / full_scale)).astype(np.uint8))


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """Return the first frame, upright and opaque, in mode RGB (3 channels) or L (1 channel).

    EXIF orientation is applied, transparency becomes white, and more than 8 bits are scaled. Pillow
    converts CMYK, palette, YCbCr, LAB, HSV and bilevel.

    Errors: `UnreadableImage` for truncated or damaged data.
    """
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata of an intact image: keep the stored orientation
        image = image.copy()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _scaled_to_uint8(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    target = {1: "L", 3: "RGB"}[channels]
    # Pillow has no direct conversion from CMYK, LAB or HSV to grey.
    if target == "L" and image.mode not in ("1", "L", "P", "RGB", "RGBA", "YCbCr"):
        image = image.convert("RGB")
    return image if image.mode == target else image.convert(target)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """Return ADM's centre crop to (size, size) (specs/dimr.md section 4, preprocessing).

    Halve with BOX while the short side is at least twice `size`, bicubic to short side = size,
    centre crop.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_INTERMEDIATE_PIXELS:
        raise UnreadableImage(
            f"sides {image.width} x {image.height} are too unequal for crop 'adm'; use crop 'plain'"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def plain_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square, resized in one antialiased (Lanczos) step."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )


CROPS = {"adm": adm_crop, "plain": plain_crop}


def to_pixels(image: Image.Image, size: int, channels: int, crop: str) -> np.ndarray:
    """Return uint8 (channels, size, size) of a Pillow image; `UnreadableImage` if damaged."""
    return to_array(CROPS[crop](to_mode(image, channels), size))


def to_array(image: Image.Image) -> np.ndarray:
    """Return a Pillow image of mode L or RGB as a new uint8 array (c, h, w)."""
    array = np.asarray(image)
    return array[None].copy() if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def to_pillow(pixels: np.ndarray) -> Image.Image:
    """Return uint8 pixels (c, h, w), c 1 or 3, as a Pillow image."""
    is_grey = len(pixels) == 1
    return Image.fromarray(
        pixels[0] if is_grey else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    )
