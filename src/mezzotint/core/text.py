"""Strings of strangers, made harmless: names of files, classes and tensors, captions, errors.

A terminal obeys escape sequences, a Markdown page obeys HTML, and bidirectional overrides reorder
what a reader sees. Escape where text leaves the library: `core.console`, model cards, errors that
list names.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

# Control characters, formatting characters such as bidirectional overrides, lone surrogates (bytes
# of a name that is no UTF-8), line and paragraph separators.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # of Persian, Indic scripts and emoji
# An underscore within a word is one; "://", "www." and "@" become links where they stand.
MARKDOWN = re.compile(
    r"([\\`*\[\]|~$@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[A-Za-z]):(?=//)|(?<=www)\.)"
)
# A path from a root, a home, a drive or a relative folder, at the begin of a text and within one.
PATH_BEGIN = r"(?:file:|~\w*|\.{1,2}|[A-Za-z]:)?[/\\]"
WHOLE_PATH = re.compile(PATH_BEGIN + r"+[^/\\\s]")
INNER_PATH = re.compile(r"(?<![\w/\\.:@-])" + PATH_BEGIN + r"""+[^\s,;:'"()\[\]{}<>|]+""")


def escape_controls(text: str, keep: str = "\n\t") -> str:
    r"""Return text without effect on a terminal: hidden characters become \x1b, \u202e.

    Args:
        keep: characters to leave as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep else _escape(c) for c in text)


def _escape(char: str) -> str:
    if char in JOINERS or unicodedata.category(char) not in HIDDEN:
        return char
    short = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}.get(char)
    code = ord(char)
    if short is None and code < 0x20:
        return f"\\x{code:02x}"
    return short or (f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}")


def escape_name(name: object) -> str:
    """Return a name as one line without effect on a terminal."""
    return escape_controls(str(name), keep="")


def escape_markdown(text: object) -> str:
    """Return text that Markdown and HTML show as it is, in one line."""
    line = escape_name(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN.sub(r"\\\1", line)


def fence(text: str, language: str = "") -> list[str]:
    """Return the lines of a Markdown code block that nothing in `text` can end."""
    runs = re.findall(r"`+", text)
    ticks = "`" * max(3, 1 + max(map(len, runs), default=0))
    return [f"{ticks}{language}", escape_controls(text), ticks]


def last_component(path: object) -> str:
    """Return the last component of a path of any system."""
    return PureWindowsPath(str(path)).name


def hide_local(name: str) -> str:
    """Return the last component of a local path; a name of a hub repository unchanged."""
    is_local = name.count("/") != 1 or Path(name).exists()
    return last_component(name) if is_local else name


def hide_folders(value: Any) -> Any:
    """Return JSON values with every local path in them cut to its last component."""
    if isinstance(value, Mapping):
        return {key: hide_folders(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [hide_folders(v) for v in value]
    if not isinstance(value, str):
        return value
    if WHOLE_PATH.match(value):
        return last_component(value)
    return INNER_PATH.sub(lambda found: last_component(found[0]), value)
