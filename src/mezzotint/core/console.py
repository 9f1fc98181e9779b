"""Standard output for tables."""

from __future__ import annotations

import os

from rich.console import Console

# Wide enough for every table. A pipe or a file has no width of its own, and 80 columns would cut
# the numbers.
PIPE_COLUMNS = 160


def open_console() -> Console:
    """Open standard output: as wide as the terminal or `COLUMNS`, else `PIPE_COLUMNS` wide."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_COLUMNS
    return console
