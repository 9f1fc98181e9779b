"""What a person sees while training: one progress bar with loss, speed and time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class ProgressDisplay:
    """A progress bar on a terminal; a line per log record where there is none; nothing when quiet."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.terminal = Terminal(stderr=True, soft_wrap=True)
        self.bar: Progress | None = None
        self.total = 0
        self.begun = (0, 0.0)
        self.loss = ""

    def say(self, sentence: str) -> None:
        """One line to the person."""
        if not self.quiet:
            self.terminal.print(sentence, highlight=False)

    def start(self, total: int, done: int) -> None:
        """Show the bar; `total` and `done` in images."""
        self.total, self.begun = total, (done, time.monotonic())
        if self.quiet or not sys.stderr.isatty():
            return
        self.bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            console=self.terminal,
        )
        self.task = self.bar.add_task("", total=total, completed=done, facts="")
        self.bar.start()

    def progress(self, images: int, record: dict[str, Any] | None = None) -> None:
        """After each step; `record` is the log line when one was written."""
        if record is not None:
            self.loss = f"loss {record['loss']:.4f}"
        done, since = self.begun
        speed = (images - done) / max(time.monotonic() - since, 1e-9)
        facts = f"{self.loss}  {speed:,.1f} images/s  {clock((self.total - images) / max(speed, 1e-9))} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=min(images, self.total), facts=facts)
        elif record is not None:
            self.say(f"{images:,}/{self.total:,} images  {facts}")

    def event(self, record: dict[str, Any]) -> None:
        """What is out of the ordinary, as events.jsonl has it."""
        facts = ", ".join(f"{k} {v}" for k, v in record.items() if k not in ("images", "event"))
        self.say(f"{record['event']} at {record['images']:,} images: {facts}")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def clock(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
