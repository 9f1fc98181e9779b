"""Progress of long work: a bar on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from mezzotint.core.console import open_console
from mezzotint.core.text import escape_controls

T = TypeVar("T")
LINE_SECONDS = 30.0  # between two lines where there is no terminal


class ProgressBar:
    """Show how much of `total` is done, how fast it goes and how long it takes, on stderr.

    Args:
        description: what is being done, e.g. "encoding".
        total, done: in `unit`s; `done` is what an earlier run left.
        unit: plural noun, e.g. "images" or "bytes".
        show: False prints nothing.
        console: where to print; standard error by default.
    """

    def __init__(
        self,
        description: str,
        total: int,
        done: int = 0,
        *,
        unit: str = "images",
        show: bool = True,
        console: Console | None = None,
    ):
        self.description, self.total, self.unit, self.show = (
            escape_controls(description), total, unit, show,
        )  # fmt: skip
        self.first = self.done = done
        self.started = self.printed = time.monotonic()
        self.console = console or open_console(stderr=True)
        self.bar: Progress | None = None
        if show and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[facts]}", markup=False),
                console=self.console,
            )
            self.task = self.bar.add_task(self.description, total=total, completed=done, facts="")
            self.bar.start()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def update(self, done: int, facts: str = "", *, line: bool = False) -> None:
        """Show that `done` of `total` are done.

        Args:
            facts: more to show, e.g. "loss 0.12".
            line: print a line now where there is no terminal, whatever was printed before.
        """
        self.done = min(done, self.total)
        if not self.show:
            return
        now = time.monotonic()
        speed = (self.done - self.first) / max(now - self.started, 1e-9)
        left = format_duration((self.total - self.done) / max(speed, 1e-9))
        count = f"{self.done:,}/{self.total:,} {self.unit}"
        words = "  ".join(
            filter(
                None, [count, escape_controls(facts), f"{speed:,.1f} {self.unit}/s", f"{left} left"]
            )
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, facts=words)
        elif line or now - self.printed >= LINE_SECONDS:
            self.printed = now
            self.console.print(f"{self.description}: {words}", highlight=False)

    def advance(self, count: int = 1) -> None:
        """Show that `count` more are done."""
        self.update(self.done + count)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def track(
    items: Sequence[T] | Iterable[T],
    description: str,
    total: int,
    *,
    unit: str = "images",
    show: bool = True,
) -> Iterator[T]:
    """Yield `items` and show how many of `total` are done."""
    with ProgressBar(description, total, unit=unit, show=show) as bar:
        for item in items:
            yield item
            bar.advance()


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
