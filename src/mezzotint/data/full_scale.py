"""The value that means white in grey images of more than 8 bits: one per dataset, not per image.

Files do not state it: 12-bit data lies in 16-bit files, and floats are 0...1 or 0...255. It is the
smallest usual value that holds the largest one of a sample of the dataset, or what the user says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import SAMPLEFORMAT, TiffImageFile

from mezzotint.data.decode import UnreadableImage, load_image, reserve_pixels

FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535, 2**24 - 1, 2**31 - 1, 2**32 - 1)
OVERSHOOT = 0.25  # of the full scale, for floats: resizing leaves values outside; they are clipped
SAMPLE = 256  # images, evenly spaced
STRIP_PIXELS = 1 << 22  # converted at a time
DEFAULTS = {"16 bits": 65535.0, "32 bits": 65535.0, "floats": 1.0}  # where the sample has none


def grey_kind(image: Image.Image) -> str | None:
    """Return "16 bits", "32 bits" or "floats" for a grey image of that kind, None for others."""
    if image.mode == "F":
        return "floats"
    # Pillow opens 16-bit PNG and PGM as I;16 or as I, depending on its version.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return "16 bits"
    return "32 bits" if image.mode == "I" else None


def _values(image: Image.Image) -> Iterator[np.ndarray]:
    """Yield the values of a loaded grey image as float64, in strips of rows."""
    sample_format = image.tag_v2.get(SAMPLEFORMAT, 1) if isinstance(image, TiffImageFile) else None
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        values = np.asarray(image.crop((0, top, image.width, bottom)))
        if image.mode == "I" and sample_format in (1, (1,)):  # unsigned
            values = values.view(np.uint32)  # Pillow has no mode for it
        yield values.astype(np.float64)


def _value_range(image: Image.Image) -> tuple[float, float]:
    """Return the smallest and the largest value of a loaded image; `UnreadableImage` for NaN."""
    lows, highs = zip(*((v.min(), v.max()) for v in _values(image)), strict=True)
    low, high = float(min(lows)), float(max(highs))
    if not np.isfinite([low, high]).all():
        raise UnreadableImage(f"mode {image.mode} with non-finite values")
    return low, high


@dataclass(frozen=True)
class FullScale:
    """The full scale of each kind of grey image of more than 8 bits in a dataset.

    stated: by the user, for every kind; None to take those measured.
    measured: kind -> full scale. notes: sentences for reports.
    """

    stated: int | None = None
    measured: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.stated is not None and self.stated < 1:
            raise ValueError(
                f"full scale {self.stated}; give the value that is white, e.g. 4095 for 12 bits"
            )

    @property
    def key(self) -> str:
        """What a dataset's fingerprint takes: the stated scale; the others follow from the data."""
        return "" if self.stated is None else f" full scale {self.stated}"

    @classmethod
    def of_image(cls, image: Image.Image) -> FullScale:
        """Return the full scale of a loaded image that belongs to no dataset."""
        kind = grey_kind(image)
        assert kind is not None, "an image of more than 8 bits"
        return cls(measured={kind: _choose(kind, _value_range(image)[1])})

    def to_uint8(self, image: Image.Image) -> Image.Image:
        """Return a loaded image of a `grey_kind` as 0...255, mode L.

        Errors: `UnreadableImage` for values that do not fit the dataset's full scale, and for NaN.
        """
        kind = grey_kind(image)
        assert kind is not None, "an image of more than 8 bits"
        white = self.stated or self.measured.get(kind, DEFAULTS[kind])
        low, high = _value_range(image)
        margin = OVERSHOOT if kind == "floats" else 0.0
        if low < -margin * white or (high > (1 + margin) * white and self.stated is None):
            raise UnreadableImage(
                f"mode {image.mode} with values {low:g}...{high:g}, outside 0...{white:g}, the "
                "dataset's full scale; state it, e.g. data.full_scale=65535, or rescale the image"
            )
        strips = [
            np.round(np.clip(v * (255.0 / white), 0, 255)).astype(np.uint8) for v in _values(image)
        ]
        return Image.fromarray(np.concatenate(strips))


def measure_full_scale(
    read: Callable[[int], Image.Image | np.ndarray], count: int, stated: int | None = None
) -> FullScale:
    """Return the full scales of a dataset, from at most SAMPLE evenly spaced images of it.

    Args:
        read: returns image i of `count`; images that raise `UnreadableImage` are passed over.
        stated: by the user, for every kind.
    """
    highest: dict[str, float] = {}
    seen: dict[str, int] = {}
    for i in np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).astype(int)).tolist():
        try:
            image = read(i)
            if isinstance(image, np.ndarray):  # uint8, as all images of its source
                break
            if (kind := grey_kind(image)) is None:
                continue
            with reserve_pixels(image):
                high = _value_range(load_image(image))[1]
        except UnreadableImage:
            continue
        highest[kind] = max(high, highest.get(kind, 0.0))
        seen[kind] = seen.get(kind, 0) + 1
    measured = {kind: _choose(kind, high) for kind, high in highest.items()}
    notes = tuple(
        f"grey of {kind}: full scale {stated or white:g}"
        + (", as stated" if stated else " (data.full_scale states another)")
        + f"; the largest value of {seen[kind]:,} images is {highest[kind]:g}"
        for kind, white in sorted(measured.items())
    )
    return FullScale(stated, measured, notes)


def _choose(kind: str, high: float) -> float:
    """Return the smallest usual full scale that holds `high`."""
    margin = OVERSHOOT if kind == "floats" else 0.0
    fitting = (float(s) for s in FULL_SCALES if high <= (1 + margin) * s)
    return next(fitting, DEFAULTS[kind]) if high > 0 else DEFAULTS[kind]
