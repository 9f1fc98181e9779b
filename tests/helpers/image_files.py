"""Image files, and the same files as a folder, a zip and tars."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

PICTURE = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def encode(image: Image.Image, format: str, **options) -> bytes:
    """Return an image as a file's content; options as of Pillow's save."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """Return a chunk of a PNG; by default with the right checksum."""
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(seed: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """Return a PNG of noise; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write files below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def write_zip(path: Path, files: Mapping[str, bytes | str]) -> Path:
    """Write a zip with these members, under exactly these names."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            file.writestr(info, content)
    return path


def write_tar(path: Path, files: Mapping[str, bytes | str], mode: str = "w") -> Path:
    """Write a tar; mode "w:gz", "w:bz2" or "w:xz" compresses it."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
