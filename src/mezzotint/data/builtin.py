"""The built-in dataset `digits`: real handwriting that needs no download."""

from __future__ import annotations

import importlib.util
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mezzotint.core.rng import philox
from mezzotint.data.sources import hash_parts

DIGITS_TRAIN = 1500  # of 1,797; the other 297 are the test split
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class DigitSource:
    """The 1,797 handwritten digits of scikit-learn (8 x 8 pixels, 17 grey levels)."""

    numbers: np.ndarray = field(repr=False)  # in scikit-learn's order
    pixels: np.ndarray = field(repr=False)  # uint8 (n, 8, 8)
    labels: np.ndarray = field(repr=False)
    label_names: tuple[str, ...] = tuple("0123456789")
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, i: int) -> str:
        """Return the digit's number in scikit-learn's order."""
        return f"digit {self.numbers[i]}"

    def read(self, i: int) -> Image.Image:
        """Return an 8 x 8 grey image."""
        return Image.fromarray(self.pixels[i])

    def text(self, i: int) -> str:
        """Return a caption, e.g. "a handwritten digit three"."""
        return f"a handwritten digit {NUMERALS[self.labels[i]]}"

    def identity(self) -> str:
        """Return the hash of the pixels and labels."""
        return hash_parts([self.pixels.tobytes(), self.labels.tobytes()])

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return names, and 64 bytes each."""
        return [self.name(i) for i in range(len(self))], np.full(len(self), 64, np.int64)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of the pixels."""
        return zlib.crc32(self.pixels[i].tobytes())


def open_digits(split: str = "train") -> DigitSource:
    """Open the split "train" (1,500), "test" (297) or "all", chosen by a fixed permutation."""
    # The file that its `load_digits` reads: importing scikit-learn takes as long as torch.
    spec = importlib.util.find_spec("sklearn")
    file = spec and spec.origin and Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file or not file.is_file():
        raise ValueError("the built-in digits need scikit-learn: pip install 'mezzotint[demo]'")
    rows = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 64 grey levels, then the label
    target, images = rows[:, -1], rows[:, :-1].reshape(-1, 8, 8)
    permutation = philox("order", 0, 0).permutation(len(target))
    stop = {"train": DIGITS_TRAIN, "test": None, "all": None}[split]
    chosen = np.sort(permutation[DIGITS_TRAIN if split == "test" else 0 : stop])
    pixels = np.round(images[chosen] * (255 / 16)).astype(np.uint8)  # grey levels are 0...16
    return DigitSource(chosen, pixels, target[chosen])
