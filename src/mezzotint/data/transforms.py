"""Image preprocessing: crop, resize, conversion to and from [-1, 1].

There is no colour management, on purpose: an embedded ICC profile is ignored.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import ExifTags, Image
from torch import Tensor

from mezzotint.core import rng
from mezzotint.core.registry import suggest
from mezzotint.data.decode import MAX_PIXELS, UnreadableImage, load_image, reserve_pixels
from mezzotint.data.full_scale import STRIP_PIXELS, FullScale, grey_kind
from mezzotint.data.salvage import exif_orientation

RULES = ("round", "truncate")  # of to_uint8
# EXIF orientation -> what sets the image upright.
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_model_range(pixels: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """Return float32 -1...1 of uint8 0...255: x / 127.5 - 1 (specs/dimr.md section 4)."""
    # In place: a new tensor of float32 costs more than the arithmetic.
    return pixels.to(torch.float32, copy=True).div_(127.5).sub_(1)


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


def flip(images: Tensor, mask: Bool[Tensor, " b"], dim: int = -1) -> Tensor:
    """Return images (b, ..., h, w), those where `mask` is True mirrored along `dim`."""
    if images.device.type == "cpu":  # row by row, which mirrors no image in vain
        mirrored = images.clone()
        for i in mask.nonzero()[:, 0].tolist():
            mirrored[i] = images[i].flip(dim)
        return mirrored
    mask = mask.to(images.device).reshape(-1, *[1] * (images.ndim - 1))
    return torch.where(mask, images.flip(dim), images)


def draw_flips(draws: rng.Draws, image_numbers: list[int]) -> Bool[Tensor, " b"]:
    """Draw which image numbers of a run are mirrored, each with probability 1/2."""
    return draws.uniform("augment", image_numbers) < 0.5


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation that Pillow has not applied, 1...8; damaged metadata gives 1."""
    if image.format == "TIFF":  # applied by Pillow
        return 1
    block = image.info.get("exif")
    if isinstance(block, bytes):
        return exif_orientation(block)
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    """Return a transparent image on white, mode RGB; in strips of rows, which take less memory."""
    result, rows = Image.new("RGB", image.size), max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def to_mode(image: Image.Image, channels: int, full_scale: FullScale | None = None) -> Image.Image:
    """Return the first frame, upright and opaque, in mode RGB (3 channels) or L (1 channel).

    EXIF orientation is applied, transparency becomes white, and more than 8 bits are scaled. Pillow
    converts CMYK, palette, YCbCr, LAB, HSV and bilevel.

    Args:
        full_scale: of the image's dataset; by default measured on this image alone.

    Errors: `UnreadableImage` for truncated or damaged data.
    """
    image = load_image(image)
    transpose = TRANSPOSES.get(orientation_of(image))
    if grey_kind(image) is not None:
        image = (full_scale or FullScale.of_image(image)).to_uint8(image)
    if transpose is not None:
        image = image.transpose(transpose)
    if image.has_transparency_data:
        image = _on_white(image)
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
    if width * height > MAX_PIXELS:
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


def to_pixels(
    image: Image.Image, size: int, channels: int, crop: str, full_scale: FullScale | None = None
) -> np.ndarray:
    """Return uint8 (channels, size, size) of a Pillow image; `UnreadableImage` if damaged."""
    with reserve_pixels(image):
        image = to_mode(image, channels, full_scale)
        # Both crops return an image of the right size as it is.
        return to_array(image if image.size == (size, size) else CROPS[crop](image, size))


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
