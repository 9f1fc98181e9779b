"""Printing: tables and lines on standard output and error. What is printed never ends a command.

Nothing that is printed is read as rich markup, and control characters in it are escaped. A stream
that is closed, full or of a narrow encoding loses words and raises nothing: results are files.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from mezzotint.core.text import escape_controls

# Wide enough for every table. A pipe or a file has no width of its own, and 80 columns would cut
# the numbers.
PIPE_COLUMNS = 160
# A closed pipe, a dead terminal, a closed descriptor: they do not come back, a full disk may.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


class TolerantStream:
    """A text stream that drops what cannot be written and escapes what cannot be encoded.

    error: the first failure, if any.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: Exception | None = None

    def write(self, text: str) -> int:
        """Write text, or drop it."""
        try:
            encoding = self.stream.encoding or "utf-8"
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError, LookupError) as error:  # ValueError: closed
            self.error = self.error or error
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what is left."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error
            if isinstance(error, OSError) and error.errno in GONE:
                self.discard()

    def discard(self) -> None:
        """Send everything from now on to the null device, what is left in the buffer too."""
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        except (OSError, ValueError):
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class EscapingConsole(Console):
    """A console on which strings are text: no markup, no emoji codes, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console`; cells and titles of tables come here too."""
        return super().render_str(escape_controls(text), **options)


def _tolerant(stream: Any) -> Any:
    if stream is None or isinstance(stream, TolerantStream):
        return stream
    return TolerantStream(stream)


def open_console(*, stderr: bool = False) -> Console:
    """Open standard output or error: as wide as the terminal or `COLUMNS`, else `PIPE_COLUMNS`.

    Lines on standard error are not wrapped.
    """
    file = _tolerant(sys.stderr if stderr else sys.stdout)
    console = EscapingConsole(file=file, stderr=stderr, markup=False, emoji=False, soft_wrap=stderr)
    if not stderr and not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_COLUMNS
    return console


def echo(*parts: object, stderr: bool = False) -> None:
    """Print a line of text on standard output or error, with control characters escaped."""
    stream = _tolerant(sys.stderr if stderr else sys.stdout)
    if stream is not None:
        print(escape_controls(" ".join(map(str, parts))), file=stream, flush=True)


def protect_output() -> None:
    """Make standard output and error tolerant for everything in this process.

    A closed descriptor becomes the null device, or the next file that is opened would take its
    place and receive what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        setattr(sys, name, _tolerant(stream))


def finish_output() -> Exception | None:
    """Flush standard output and error; return why standard output lost words, if it did."""
    lost: dict[str, Exception | None] = {}
    for name in ("stderr", "stdout"):
        stream = getattr(sys, name)
        stream.flush()
        lost[name] = getattr(stream, "error", None)
        if lost[name] is not None:
            stream.discard()  # the interpreter flushes once more when it exits
    return lost["stdout"]
