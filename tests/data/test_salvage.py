"""Images whose pixels are whole are read: beside damaged metadata, or without their last bytes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from helpers.image_files import PICTURE, chunk, encode
from mezzotint.data.decode import UnreadableImage, decode_image
from mezzotint.data.transforms import to_mode


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(to_mode(decode_image(data), 3))


def _png_with_text(itxt: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    (info.add_itxt if itxt else info.add_text)("workflow", "x" * (2 << 20), zip=True)
    return encode(PICTURE, "PNG", pnginfo=info)


def _png_with_chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    data = encode(PICTURE, "PNG")
    return data[:33] + chunk(kind, content, crc) + data[33:]  # after IHDR


WHOLE = {
    "icc": encode(PICTURE, "PNG", icc_profile=bytes(2 << 20)),
    "ztxt": _png_with_text(itxt=False),
    "itxt": _png_with_text(itxt=True),
    "chunk of a wrong checksum": _png_with_chunk(b"tEXt", b"a\0b", crc=1),
    "damaged iCCP": _png_with_chunk(b"iCCP", b"x\0\0not zlib"),
    "damaged iTXt": _png_with_chunk(b"iTXt", b"x"),
    "damaged pHYs": _png_with_chunk(b"pHYs", b"1"),
    "damaged eXIf": _png_with_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
    "no IEND": encode(PICTURE, "PNG")[:-12],
    "no IEND, no checksum": encode(PICTURE, "PNG")[:-16],
    "no checksum of the stream": encode(PICTURE, "PNG")[:-19],
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_png_is_read_whatever_lies_beside_it(case):
    assert np.array_equal(pixels(WHOLE[case]), np.asarray(PICTURE))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 95}]
)
def test_a_jpeg_that_lacks_only_its_end_is_read(options):
    data = encode(PICTURE, "JPEG", **options)
    for cut in (1, 2):
        assert np.array_equal(pixels(data[:-cut]), pixels(data))
    for cut in (4, 8, 40, len(data) // 2):
        with pytest.raises(UnreadableImage, match=r"(?i)truncated"):
            pixels(data[:-cut])


def test_a_progressive_jpeg_that_lacks_a_scan_is_truncated():
    data = encode(PICTURE, "JPEG", progressive=True)
    scans = [k for k in range(len(data) - 1) if data[k : k + 2] == b"\xff\xda"]
    assert len(scans) > 3
    for start in scans[1:]:
        with pytest.raises(UnreadableImage):
            pixels(data[:start])


@pytest.mark.parametrize("cut", [24, 60, 400])
def test_a_png_that_lacks_pixels_is_truncated(cut):
    data = encode(Image.effect_noise((64, 64), 90), "PNG")
    with pytest.raises(UnreadableImage, match="truncated"):
        pixels(data[:-cut])


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("bits", "colour"), [(1, 0), (8, 2), (8, 3), (16, 6), (4, 3)])
def test_the_bytes_of_a_png_are_counted(bits, colour, interlaced):
    from mezzotint.data.salvage import _png_bytes

    for width, height in ((1, 1), (5, 3), (8, 8), (9, 17)):
        rows = 0
        bit_count = bits * {0: 1, 2: 3, 3: 1, 6: 4}[colour]
        grid = np.zeros((height, width), int)
        if interlaced:  # the pass of each pixel, from the 8 x 8 pattern of the standard
            tile = np.array([
                [1, 6, 4, 6, 2, 6, 4, 6], [7] * 8, [5, 6, 5, 6, 5, 6, 5, 6], [7] * 8,
                [3, 6, 4, 6, 3, 6, 4, 6], [7] * 8, [5, 6, 5, 6, 5, 6, 5, 6], [7] * 8,
            ])  # fmt: skip
            grid = np.tile(tile, (3, 2))[:height, :width]
        for number in set(grid.ravel()):
            for row in grid:
                if n := int((row == number).sum()):
                    rows += 1 + -(-n * bit_count // 8)
        assert _png_bytes(width, height, bits, colour, 0, 0, int(interlaced)) == rows
