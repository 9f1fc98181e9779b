"""Ranges of the sizes of a network, shared by the configs of all families.

They end where a network makes no sense or no machine holds it; what fits together is checked by
each family.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from mezzotint.core.fields import Checked, Range

Size = Annotated[int, Range(1, 16_384, "height and width of the input")]
Sides = tuple[Size, Size] | Size  # (height, width), or one number for a square
Channels = Annotated[int, Range(1, 4096)]
Classes = Annotated[int, Range(0, 1_000_000, "0 for none")]
Width = Annotated[int, Range(1, 65_536)]
Multiplier = Annotated[int, Range(1, 1024)]
Blocks = Annotated[int, Range(0, 1024)]
Depth = Annotated[int, Range(1, 1024)]
TextWidth = Annotated[int, Range(0, 65_536, "0 for no text")]
Heads = Annotated[int, Range(1, 1024)]
Ratio = Annotated[float, Range(0.01, 1024)]
Dropout = Annotated[float, Range(0, 1, "a probability", below=True)]
Patch = Annotated[int, Range(1, 1024)]
Window = Annotated[int, Range(1, 16_384)]


class CheckedConfig(Checked):
    """Base of the configs: their fields are a recipe's model.*."""

    prefix: ClassVar[str] = "model."
