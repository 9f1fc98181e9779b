"""Types of the command line's arguments that keep a help page on one screen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

# Without tyro's "{None}|STR" and "(default: None)", which would double the length of the help.
Text = Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")]
Count = Annotated[int, arg(metavar="N", help_behavior_hint="")]
Given = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Switch = tyro.conf.FlagCreatePairsOff[Annotated[bool, arg(help_behavior_hint="")]]
