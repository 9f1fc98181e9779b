"""Paths that others give: safe reading, names of any bytes, and what a file is."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from mezzotint.core.files import expand_user
from mezzotint.core.text import escape_name

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What a file is by its suffix; a name that ends in one of them is no name of the hub.
KINDS = {
    "a zip": (".zip",),
    "a tar": (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz"),
    "an archive of another kind": (".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"),
    "a file of arrays": (".npz", ".npy"),
    "a table": (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".xlsx"),
    "a file of weights": (
        ".pth", ".pt", ".ckpt", ".bin", ".pkl", ".pickle", ".safetensors", ".h5", ".onnx", ".gguf",
    ),
    "an image": (
        ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg",
    ),
    "a text file": (".txt", ".json", ".yaml", ".yml", ".md", ".html", ".log"),
}  # fmt: skip


def read_regular_file(path: str | Path, limit: int, head: int | None = None) -> bytes:
    """Return the content of a file, or its first `head` bytes; a pipe or device is never opened.

    Errors: OSError where it cannot be read; ValueError unless it is a regular file of at most
        `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a folder, device, pipe or socket, no file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size:,} bytes; at most {limit:,} are read")
        return file.read(limit if head is None else head)


def printable(name: str) -> str:
    r"""Return a name for print and UTF-8 files: other bytes and control characters as \xNN."""
    with contextlib.suppress(UnicodeEncodeError):  # surrogates that stand for no byte
        name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return escape_name(name)


def kind_of(path: str | Path) -> str:
    """Return what a file is, by its suffix: "a zip", "an image", ... or "a file"."""
    name = str(path).lower()
    return next((kind for kind, suffixes in KINDS.items() if name.endswith(suffixes)), "a file")


def is_hub_name(name: str) -> bool:
    """Return whether `name` can only be OWNER/NAME of the Hugging Face hub, never a path.

    A path that exists, or that ends as a file does (data/set.zip), is no such name.
    """
    return (
        HUB_NAME.fullmatch(name) is not None
        and not os.path.lexists(os.path.expanduser(name))
        and kind_of(name) == "a file"
    )


def explain_path(name: str, wanted: str) -> str:
    """Return one sentence for a name that is neither `wanted` nor a hub name: what it is instead.

    Args:
        wanted: e.g. "a model folder".
    """
    path = expand_user(name)
    if path.is_dir():
        return f"{name} is a folder, but not {wanted}"
    if path.is_file():
        kind = kind_of(name)
        if kind != "a file of weights":
            return f"{name} is {kind}, not {wanted}"
        if (path.parent / "config.json").is_file():
            return f"{name} is {kind}, not {wanted}; give its folder, {path.parent}"
        return f"{name} is {kind}, not {wanted}; mezzotint convert makes a model folder of it"
    if os.path.lexists(path):
        return f"{name} is a device, pipe or broken link, not {wanted}"
    return f"there is no file or folder {name}"
