"""PNG and JPEG files whose pixels are whole and something beside them is damaged or too large.

Metadata is dropped except for the orientation, a missing end is added, and nothing of it is read
before. A file that lacks pixels stays unreadable.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
ORIENTATION = 0x0112  # EXIF tag
END = b"\xff\xd9"  # of a JPEG
MAX_RAW_BYTES = 1 << 30  # of a PNG's pixels before the filters, where its stream is rebuilt


Decode = Callable[[bytes], Image.Image]


def salvage(data: bytes, decode: Decode) -> Image.Image | None:
    """Return the loaded image, None for other formats and where pixels are missing or damaged.

    Args:
        decode: returns the loaded image of a sound file, raises for another.
    """
    try:
        if data.startswith(PNG):
            return _salvage_png(data, decode)
        if data.startswith(JPEG):
            return _salvage_jpeg(data, decode)
    except Exception:  # decoders raise OSError, SyntaxError, struct.error, ...
        pass
    return None


def exif_orientation(block: bytes) -> int:
    """Return the orientation, 1...8, of an EXIF block; 1 where it is missing or damaged."""
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    try:
        offset = struct.unpack_from(f"{order}I", block, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", block, offset)[0]):
            tag, kind = struct.unpack_from(f"{order}HH", block, offset + 2 + 12 * entry)
            if tag == ORIENTATION:
                form = "I" if kind == 4 else "H"
                value = struct.unpack_from(f"{order}{form}", block, offset + 10 + 12 * entry)[0]
                return value if 1 <= value <= 8 else 1
    except struct.error:  # the block ends too early, or has no byte order
        pass
    return 1


def _orientation_block(orientation: int) -> bytes:
    """Return an EXIF block with the orientation alone."""
    return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


# --- PNG -----------------------------------------------------------------------------------------


def _salvage_png(data: bytes, decode: Decode) -> Image.Image | None:
    parts, pixels, header = [PNG], [], (0, 0, 0, 0, 0, 0, 0)
    for kind, content in _png_chunks(data):
        if kind == b"IDAT":
            pixels.append(content)
        elif kind in (b"IHDR", b"PLTE", b"tRNS"):
            parts.append(_png_chunk(kind, content))
        elif kind == b"eXIf":
            block = _orientation_block(exif_orientation(content))
            parts.append(_png_chunk(kind, block))
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", content)
    stream = b"".join(pixels)
    try:
        return decode(b"".join([*parts, _png_chunk(b"IDAT", stream), _png_chunk(b"IEND", b"")]))
    except Exception:  # perhaps only the stream's checksum is missing or wrong
        needed = _png_bytes(*header)
        if needed > MAX_RAW_BYTES:
            return None
        raw = zlib.decompressobj().decompress(stream, needed)
        if len(raw) < needed:
            return None
        stream = zlib.compress(raw, 1)
        return decode(b"".join([*parts, _png_chunk(b"IDAT", stream), _png_chunk(b"IEND", b"")]))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and content of each chunk up to IEND or the end; the last may be cut."""
    start = len(PNG)
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        if kind == b"IEND" or not kind.isalpha():
            return
        yield kind, data[start + 8 : start + 8 + length]
        start += 12 + length


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def _png_bytes(
    width: int, height: int, bits: int, colour: int, _compression: int, _filter: int, adam7: int
) -> int:
    """Return the bytes of the rows of a PNG, each with its filter's number."""
    pixel_bits = bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]  # first column and row, and their steps
    if adam7:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4)]
        passes += [(1, 0, 2, 2), (0, 1, 1, 2)]
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    return sum(h * (1 + -(-w * pixel_bits // 8)) for w, h in sizes if w > 0 and h > 0)


# --- JPEG ----------------------------------------------------------------------------------------


def _salvage_jpeg(data: bytes, decode: Decode) -> Image.Image | None:
    clean = _without_metadata(data)
    if clean.rstrip(b"\0").endswith(END):
        return decode(clean)
    # The end is missing. Pixels that do not depend on what is put in its place are all there.
    clean = clean.rstrip(b"\xff")
    if not _has_all_scans(clean):
        return None
    image = decode(clean + END)
    other = decode(clean + b"\xaa" * 64 + END)
    return image if np.array_equal(np.asarray(image), np.asarray(other)) else None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and stop of each segment; of a scan the segment without its data."""
    start = 2
    while (start := data.find(b"\xff", start)) >= 0 and start + 4 <= len(data):
        marker = data[start + 1]
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8:  # stuffed, fill, restart
            start += 1 if marker == 0xFF else 2
            continue
        if marker == END[1]:
            return
        stop = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        yield marker, start, stop
        start = stop


def _without_metadata(data: bytes) -> bytes:
    """Return a JPEG with JFIF's and Adobe's segments and the EXIF orientation as only metadata."""
    parts, begin = [data[:2]], 2
    for marker, start, stop in _jpeg_segments(data):
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            continue
        parts.append(data[begin:start])
        content, begin = data[start + 4 : stop], stop
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            block = b"Exif\0\0" + _orientation_block(exif_orientation(content))
            parts.append(b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block)
        elif (marker == 0xE0 and content[:4] == b"JFIF") or (
            marker == 0xEE and content[:5] == b"Adobe"
        ):
            parts.append(data[start:stop])
    return b"".join([*parts, data[begin:]])


def _has_all_scans(data: bytes) -> bool:
    """Return whether the scans reach the last bit of every coefficient of every component."""
    components: set[int] = set()
    missing: dict[tuple[int, int], int] = {}  # component and coefficient -> bits still missing
    for marker, start, stop in _jpeg_segments(data):
        content = data[start + 4 : stop]
        if 0xC0 <= marker <= 0xC2:
            components = set(content[6::3][: content[5]])
        elif marker == 0xDA:
            count = content[0]
            first, last, bits = content[2 * count + 1 : 2 * count + 4]
            for component in content[1 : 2 * count + 1 : 2]:
                for k in range(first, last + 1):
                    missing[component, k] = bits & 15
    return bool(components) and all(
        missing.get((component, k)) == 0 for component in components for k in range(64)
    )
