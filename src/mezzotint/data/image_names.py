"""Which image of a dataset a cell or a file name of strangers means. Nothing is opened."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from mezzotint.data.splits import common_folder

MAX_LENGTH = 4096  # of a path
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
ABSOLUTE = re.compile(r"/|[A-Za-z]:/")


def loose_key(name: str) -> str:
    """Return a name in lower case and composed: systems differ in both ("é" has two forms)."""
    return unicodedata.normalize("NFC", name).lower()


class ImageNames:
    """Finds the image that a cell names: by path, else by a name or stem that only one has."""

    def __init__(self, images: Sequence[str]):
        self.exact = set(images)
        self.images = images
        self._loose: dict[str, str | None] | None = None

    def find(self, cell: Any, folder: str) -> str | None:
        """Return the image that a cell of a file in `folder` names, or None."""
        plain = _plain(cell)
        if plain is None or ABSOLUTE.match(plain):
            return None
        for base in dict.fromkeys((folder, "")):
            for path in (str(cell).strip(), plain):
                if (name := _normal(f"{base}/{path}" if base else path)) in self.exact:
                    return name
        if _normal(plain) is None or not plain:
            return None
        return self._loosely().get(loose_key(plain.removeprefix("./")))

    def find_all(self, cells: Sequence[Any], folder: str) -> list[str | None]:
        """Return the image that each cell of a column names, or None.

        Where none is found, leading folders that all cells share are left out: "/home/me/set/",
        "C:\\set\\", or the name of the folder that was given.
        """
        images = [self.find(cell, folder) for cell in cells]
        paths = [_plain(cell) for cell in cells]
        named = [path for path in paths if path]
        shared = common_folder(named).count("/") if named else 0
        for k in range(1, shared + 1):
            if any(images):
                break
            images = [path and self.find(path.split("/", k)[-1], folder) for path in paths]
        return images

    def may_name(self, cell: Any, folder: str) -> bool:
        """Return whether `find_all` may find an image for a cell: its last part names one."""
        if self.find(cell, folder) is not None:
            return True
        _, slash, name = (_plain(cell) or "").rpartition("/")
        return bool(slash) and loose_key(name) in self._loosely()

    def _loosely(self) -> dict[str, str | None]:
        """Return image by loose path, name and stem; None for what several have."""
        if self._loose is None:
            self._loose = {}
            for image in self.images:
                path = PurePosixPath(loose_key(image))
                keys = {str(path), path.name, path.stem, str(path.with_suffix(""))}
                parts = path.parts
                keys |= {"/".join(parts[i:]) for i in range(1, len(parts) - 1)}
                for key in keys:
                    self._loose[key] = None if key in self._loose else image
        return self._loose


def _plain(cell: Any) -> str | None:
    """Return a cell as a path with forward slashes; None for an address, and for no text."""
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        return None
    text = str(cell).strip()
    return None if len(text) > MAX_LENGTH or ADDRESS.match(text) else text.replace("\\", "/")


def _normal(path: str) -> str | None:
    """Return a path without "." and ".."; None if it leads out of the dataset."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
