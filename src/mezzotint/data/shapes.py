"""The built-in dataset `shapes`: one coloured shape on a textured background, drawn by a program.

Image i is a function of (seed, i, split), and looks the same at any size. Backgrounds are nearly
grey and shapes are saturated, so that a program can check each word of a caption: hue gives the
colour, and the saturated pixels give the shape and its position.
"""

from __future__ import annotations

import colorsys
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

from mezzotint.core.rng import philox
from mezzotint.data.sources import hash_parts

# Hue in degrees; neighbours are at least 25 apart and the jitter is 4, so nearest hue is the
# colour.
COLOURS = {
    "red": 0,
    "orange": 30,
    "yellow": 55,
    "green": 120,
    "cyan": 180,
    "blue": 225,
    "purple": 285,
}
HUE_JITTER = 4
POSITIONS = (
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the centre", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
CENTRES = (0.2, 0.5, 0.8)  # of the columns and rows, as fractions of the side
CENTRE_JITTER = 0.03
RADIUS = (0.12, 0.16)  # of the circle that encloses the shape, as fractions of the side
COUNTS = {"train": 100_000, "test": 10_000, "all": 110_000}


# Signed distance to a shape's edge, negative inside, in units of x and y; r is the enclosing
# radius. It is exact near edges, which is enough for antialiasing, but not beyond corners.
def _circle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(x, y) - r


def _square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - r * 0.5**0.5


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    # Equilateral, point up (y grows downwards): its incircle has half the radius of its
    # circumcircle.
    return np.maximum(y, abs(x) * 0.75**0.5 - y * 0.5) - r / 2


def _diamond(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    # Narrower than tall: otherwise it is a rotated square.
    return (abs(x) / 0.6 + abs(y) - r) / np.hypot(1 / 0.6, 1)


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    arm = np.maximum(abs(x) - r * 0.3, abs(y) - r * 0.95)
    return np.minimum(arm, np.maximum(abs(y) - r * 0.3, abs(x) - r * 0.95))


def _ring(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return abs(np.hypot(x, y) - r * 0.75) - r * 0.25


SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}


class Attributes(NamedTuple):
    """What an image shows, as indices into COLOURS, SHAPES and POSITIONS."""

    colour: int
    shape: int
    position: int

    def caption(self) -> str:
        """Return e.g. "a red circle at the top left"."""
        colour, shape = list(COLOURS)[self.colour], list(SHAPES)[self.shape]
        return (
            f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape} {POSITIONS[self.position]}"
        )


@functools.cache
def list_combinations(split: str) -> tuple[Attributes, ...]:
    """Return a split's combinations; "test" has every fifth, so that "train" shows every pair."""
    combinations = [
        Attributes(colour, shape, position)
        for colour in range(len(COLOURS))
        for shape in range(len(SHAPES))
        for position in range(len(POSITIONS))
    ]
    return tuple(
        a for a in combinations if split == "all" or (sum(a) % 5 == 4) == (split == "test")
    )


def _draw_background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw a nearly grey texture (side, side, 3), 0...255: value noise of three octaves."""
    stretch = ((1, 1), (4, 1), (1, 4))[rng.integers(3)]
    grey, tint = rng.uniform(70, 190), rng.uniform(-10, 10, 3)
    texture = np.zeros((side, side), np.float32)
    for octave in range(3):
        rows, columns = (4 * 2**octave * s for s in stretch)
        grid = Image.fromarray(rng.uniform(-1, 1, (rows, columns)).astype(np.float32))
        texture += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) / 2**octave
    return grey + tint + 20 * texture[..., None]


def draw_shape(attributes: Attributes, rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw a uint8 image (side, side, 3); place, size, shade and background vary with `rng`."""
    background = _draw_background(rng, side)
    hue, jitter = list(COLOURS.values())[attributes.colour], rng.uniform(-HUE_JITTER, HUE_JITTER)
    colour = colorsys.hsv_to_rgb(
        (hue + jitter) % 360 / 360, rng.uniform(0.85, 1.0), rng.uniform(0.8, 1.0)
    )
    row, column = divmod(attributes.position, len(CENTRES))
    dx, dy = rng.uniform(-CENTRE_JITTER, CENTRE_JITTER, 2)
    radius = rng.uniform(*RADIUS)
    pixel = (np.arange(side) + 0.5) / side
    x, y = pixel[None, :] - CENTRES[column] - dx, pixel[:, None] - CENTRES[row] - dy
    distance = list(SHAPES.values())[attributes.shape](x, y, radius)
    # Antialiasing: 1/2 where the edge crosses a pixel's centre.
    alpha = np.clip(0.5 - distance * side, 0, 1)[..., None]
    image = background * (1 - alpha) + 255 * np.array(colour) * alpha
    return np.round(np.clip(image, 0, 255)).astype(np.uint8)


@dataclass(frozen=True)
class ShapeSource:
    """`count` images of side `size`, labelled by shape; every block has all combinations."""

    size: int
    count: int
    seed: int
    split: str
    chosen: np.ndarray = field(repr=False)  # index into list_combinations(split), per image
    labels: np.ndarray = field(repr=False)
    label_names: tuple[str, ...] = tuple(SHAPES)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    def attributes(self, i: int) -> Attributes:
        """Return colour, shape and position of image i."""
        return list_combinations(self.split)[self.chosen[i]]

    def name(self, i: int) -> str:
        """Return e.g. "shape 7"."""
        return f"shape {i}"

    def read(self, i: int) -> np.ndarray:
        """Return uint8 pixels (3, size, size)."""
        # Draw number 1: training uses number 0 of this purpose.
        rng = philox("augment", self.seed, i, draw=1)
        return np.ascontiguousarray(
            draw_shape(self.attributes(i), rng, self.size).transpose(2, 0, 1)
        )

    def text(self, i: int) -> str:
        """Return the caption."""
        return self.attributes(i).caption()

    def identity(self) -> str:
        """Return the hash of everything that the images depend on."""
        return hash_parts([f"shapes 1 {self.seed} {self.count} {self.split}"])

    def inventory(self) -> tuple[list[str], np.ndarray]:
        """Return names, and one byte each: nothing is stored."""
        return [self.name(i) for i in range(len(self))], np.ones(len(self), np.int64)

    def checksum(self, i: int) -> int:
        """Return the CRC-32 of all that image i depends on, at any size."""
        return zlib.crc32(f"shapes 1 {self.seed} {self.split} {i}".encode())


def open_shapes(
    size: int, *, split: str = "train", count: int | None = None, seed: int = 0
) -> ShapeSource:
    """Open the split "train", "test" (combinations that "train" never shows) or "all".

    Args:
        size: side in pixels.
        split: which combinations of colour, shape and position.
        count: number of images; by default 100,000, 10,000 and 110,000.
        seed: of everything random in them.
    """
    count = COUNTS[split] if count is None else count
    if size < 8 or count < 1:
        raise ValueError(
            f"shapes of size {size}, count {count}: the size must be at least 8 pixels, the count 1"
        )
    known = list_combinations(split)
    blocks = [
        philox("order", seed, block, draw=1).permutation(len(known))
        for block in range(-(-count // len(known)))
    ]
    chosen = np.concatenate(blocks)[:count]
    labels = np.array([a.shape for a in known], dtype=np.int64)[chosen]
    return ShapeSource(size, count, seed, split, chosen, labels)
