"""Argument types shared by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from mezzotint.core.fields import MOST_IMAGES, MOST_SEED, Range

# They leave out tyro's "{None}|STR" and "(default: None)", which would double the help's length.
Preset = Positional[Annotated[str, arg(metavar="PRESET", help_behavior_hint="")]]
Overrides = Positional[
    Annotated[tuple[str, ...], arg(metavar="[FIELD=VALUE ...]", help_behavior_hint="")]
]
NUMBER = arg(metavar="N", help_behavior_hint="")
OptionalText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Seed = Annotated[int, NUMBER, Range(0, MOST_SEED)]
NumImages = Annotated[
    int, arg(aliases=["-n"], metavar="N", help_behavior_hint=""), Range(1, 10_000_000, "images")
]
OptionalNumImages = Annotated[
    int | None,
    arg(aliases=["-n"], metavar="N", help_behavior_hint=""),
    Range(1, 10_000_000, "images"),
]
Images = Annotated[int | None, NUMBER, Range(1, MOST_IMAGES, "images")]
Steps = Annotated[int | None, NUMBER, Range(1, 10_000)]
Hours = Annotated[
    float | None,
    arg(metavar="H", help_behavior_hint=""),
    Range(0, 10_000, "about a year", above=True),
]
Side = Range(1, 16_384, "pixels")
Size = Annotated[int | None, NUMBER, Side]
Channels = Annotated[Literal[1, 3], arg(help_behavior_hint="")]
OptionalChannels = Annotated[Literal[1, 3] | None, arg(metavar="{1,3}", help_behavior_hint="")]
Batch = Annotated[int, NUMBER, Range(1, 1_000_000, "images at a time")]
OptionalBatch = Annotated[int | None, NUMBER, Range(1, 1_000_000, "images at a time")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Out = Annotated[Path | None, arg(aliases=["-o"], metavar="PATH", help_behavior_hint="")]
Data = Annotated[str, arg(aliases=["-d"], metavar="DATA", help_behavior_hint="")]
Switch = tyro.conf.FlagCreatePairsOff[Annotated[bool, arg(help_behavior_hint="")]]
