"""From any decoded picture to uint8 pixels of one size, and between uint8 and the model's range.

Colour management is left out on purpose: an embedded ICC profile changes nothing here.
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
MAX_INTERMEDIATE_PIXELS = (
    1 << 27
)  # 128 Mpixel; a 1 x 60000 strip would otherwise be blown up to gigabytes


class UnreadableImage(ValueError):
    """One sample that cannot become pixels; its message is the reason, for a report."""


def to_model_range(pixels: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """uint8 0...255 to float32 -1...1: x / 127.5 - 1 (specs/dimr.md section 4, preprocessing)."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(x: Float[Tensor, "..."], rule: str = "round") -> UInt8[Tensor, "..."]:
    """-1...1 (clamped) to uint8 0...255.

    Args:
        x: any shape, any floating dtype; computed in float32 or wider.
        rule: "round" inverts `to_model_range` exactly; "truncate" drops the fraction, as ADM's sampling script does
            and as the reference statistics of papers that use its evaluator expect.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; {suggest(rule, RULES)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = ((x + 1) * 127.5).clamp(0, 255)
    return (scaled.round() if rule == "round" else scaled).to(torch.uint8)


def flip(images: Tensor, mask: Bool[Tensor, " b"]) -> Tensor:
    """(b, ..., w) images, those where `mask` is True mirrored left to right; which ones is the caller's draw."""
    mask = mask.to(images.device).reshape(-1, *[1] * (images.ndim - 1))
    return torch.where(mask, images.flip(-1), images)


def draw_flips(seed: int, numbers: list[int]) -> Bool[Tensor, " b"]:
    """Which image numbers of a run are mirrored: each with probability 1/2."""
    return rng.uniform("augment", seed, numbers) < 0.5


def _scaled_to_uint8(image: Image.Image) -> Image.Image:
    """Grey pictures of more than 8 bits, scaled rather than clipped (Pillow's own convert clips at 255)."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UnreadableImage(f"mode {image.mode} with non-finite values")
    low, high = float(values.min()), float(values.max())
    # Pillow states no full scale for I and F, so ours is the smallest usual one that holds the values:
    # 16 bits then 32 for integers, 1 then 8 then 16 bits for floats.
    scales = {"I": (65535.0, 2.0**31 - 1), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    full = next((s for s in scales if high <= s), None)
    if full is None or low < 0:
        raise UnreadableImage(
            f"mode {image.mode} with values {low:g}...{high:g}, outside every usual range"
        )
    return Image.fromarray(np.round(values * (255.0 / full)).astype(np.uint8))


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The first frame, upright, opaque, in mode RGB (channels = 3) or L (channels = 1).

    EXIF orientation is applied; transparency is laid on white; more than 8 bits are scaled; CMYK, palette, YCbCr, LAB,
    HSV and bilevel go through Pillow. Truncated or damaged data is `Unreadable`.
    """
    try:
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ... on damaged data
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata around a sound picture: keep the picture as it lies
        image = image.copy()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _scaled_to_uint8(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    target = {1: "L", 3: "RGB"}[channels]
    # Pillow has no direct road from CMYK, LAB or HSV to grey.
    if target == "L" and image.mode not in ("1", "L", "P", "RGB", "RGBA", "YCbCr"):
        image = image.convert("RGB")
    return image if image.mode == target else image.convert(target)


def adm_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to (size, size) (specs/dimr.md section 4, preprocessing).

    Halve with BOX while the short side is at least twice `size`, bicubic to short side = size, centre crop.
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
    """The central square resized in one antialiased step (Lanczos, whose support grows with the reduction)."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )


CROPS = {"adm": adm_crop, "plain": plain_crop}


def to_pixels(image: Image.Image, size: int, channels: int, crop: str) -> np.ndarray:
    """uint8 (channels, size, size) of any Pillow picture; `Unreadable` says why where that cannot be."""
    image = CROPS[crop](to_mode(image, channels), size)
    array = np.asarray(image)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
