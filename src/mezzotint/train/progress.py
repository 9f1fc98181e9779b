"""Progress bar, messages and events of a training run."""

from __future__ import annotations

from typing import Any

from mezzotint.core.console import open_console
from mezzotint.core.progress import ProgressBar


class ProgressDisplay:
    """Progress on standard error: a bar on a terminal, elsewhere a line per log record.

    Args:
        show: False prints nothing.
    """

    def __init__(self, show: bool):
        self.show = show
        self.console = open_console(stderr=True)
        self.bar: ProgressBar | None = None
        self.loss = ""

    def print_line(self, line: str) -> None:
        """Print one line above the bar."""
        if self.show:
            self.console.print(line, highlight=False)

    def start(self, total: int, done: int) -> None:
        """Show the bar.

        Args:
            total, done: length of the run and images seen so far.
        """
        self.bar = ProgressBar("training", total, done, show=self.show, console=self.console)

    def update(self, images: int, record: dict[str, Any] | None = None) -> None:
        """Show the images seen after a step, and the loss of `record` where a log line was due."""
        assert self.bar is not None, "start comes first"
        if record is not None:
            self.loss = f"loss {record['loss']:.4f}"
        self.bar.update(images, self.loss, line=record is not None)

    def print_event(self, record: dict[str, Any]) -> None:
        """Print a record of events.jsonl."""
        facts = ", ".join(f"{k} {v}" for k, v in record.items() if k not in ("images", "event"))
        self.print_line(f"{record['event']} at {record['images']:,} images: {facts}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.close()
