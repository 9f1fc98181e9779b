"""The forms in which `mezzotint prepare` stores resized images: raw pixels, or compressed files."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.core.registry import suggest
from mezzotint.data.decode import decode_image
from mezzotint.data.transforms import to_pillow


@dataclass(frozen=True)
class Form:
    """How the pixels of one image become bytes.

    name: as `prepare --form` takes it, and as the card of the folder states it.
    file_format: Pillow's name of the files; "" for bare uint8 pixels (c, h, w).
    options: of Pillow's writer.
    note: for users of the images; "" where the pixels come out as they went in.
    """

    name: str
    file_format: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def is_raw(self) -> bool:
        """Return whether the bytes are the pixels."""
        return not self.file_format

    @property
    def is_lossless(self) -> bool:
        """Return whether the pixels come out as they went in."""
        return not self.note

    def encode(self, pixels: np.ndarray) -> bytes:
        """Return the stored bytes of uint8 pixels (c, h, w)."""
        if self.is_raw:
            return pixels.tobytes()
        file = io.BytesIO()
        to_pillow(pixels).save(file, self.file_format, **self.options)
        return file.getvalue()

    def decode(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | Image.Image:
        """Return raw pixels as a view of their bytes, or else a Pillow image, not yet decoded.

        Errors: `UnreadableImage` for bytes that are no file of this form.
        """
        if self.is_raw:
            return stored.reshape(shape)
        return decode_image(stored.tobytes(), (self.file_format,))


FORMS = {
    form.name: form
    for form in (
        Form("raw"),
        # WebP's fastest method: 14 % larger than its default and written 20 times as fast.
        Form("webp-lossless", "WEBP", {"lossless": True, "method": 0, "quality": 0}),
        # Colour at full resolution: halved, which is Pillow's default, it costs 3 dB.
        Form(
            "jpeg-95",
            "JPEG",
            {"quality": 95, "subsampling": 0},
            "stored as JPEG of quality 95, which changes pixels: numbers on these images are of "
            "this set, not of its source",
        ),
    )
}


def get_form(name: str) -> Form:
    """Return the form of this name; ValueError with the near ones."""
    if name not in FORMS:
        raise ValueError(f"unknown form {name!r}; {suggest(name, FORMS)}")
    return FORMS[name]
