"""Argument types shared by the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

# They leave out tyro's "{None}|STR" and "(default: None)", which would double the help's length.
Preset = Positional[Annotated[str, arg(metavar="PRESET", help_behavior_hint="")]]
Overrides = Positional[
    Annotated[tuple[str, ...], arg(metavar="[FIELD=VALUE ...]", help_behavior_hint="")]
]
OptionalText = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int, arg(metavar="N", help_behavior_hint="")]
OptionalCount = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
OptionalFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Out = Annotated[Path | None, arg(aliases=["-o"], metavar="PATH", help_behavior_hint="")]
Data = Annotated[str, arg(aliases=["-d"], metavar="DATA", help_behavior_hint="")]
Switch = tyro.conf.FlagCreatePairsOff[Annotated[bool, arg(help_behavior_hint="")]]
