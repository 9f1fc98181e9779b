"""Images of strangers: formats, sizes, kinds that are named, damage beside the pixels."""

from __future__ import annotations

import ast
import errno
import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mezzotint
from helpers.image_files import PICTURE, chunk, encode
from mezzotint.data import decode, stores
from mezzotint.data.decode import (
    IMAGE,
    MAX_PIXELS,
    UnreadableImage,
    decode_image,
    describe_unread,
    image_kind,
    image_suffixes,
    load_image,
    open_image_file,
)
from mezzotint.data.image_dataset import open_images
from mezzotint.data.transforms import to_mode

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n(any program)\n%%EOF\n"
WMF = b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(12) + b"\x01\x00\x09\x00" + bytes(60)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(to_mode(decode_image(data), 3))


# --- formats -------------------------------------------------------------------------------------


def test_every_image_is_opened_by_a_list_of_formats():
    calls = []
    for path in Path(mezzotint.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "Image.open", "Pillow.open", "PIL.Image.open"
            ):  # fmt: skip
                calls.append((path.name, [k.arg for k in node.keywords]))
    assert calls == [("decode.py", ["formats"])]


@pytest.mark.parametrize(
    "format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "QOI", "AVIF"]
)
def test_the_stated_formats_are_read(format):
    if format not in decode.formats():
        pytest.skip(f"this Pillow has no {format}")
    assert pixels(encode(PICTURE, format)).shape == (48, 64, 3)


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder first on PATH, whose `gs` and the like write down that they were called."""
    folder, called = tmp_path / "bin", tmp_path / "called"
    folder.mkdir()
    for name in ("gs", "gswin64c", "convert", "inkscape"):
        program = folder / name
        program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo 10.0 && exit 0\n> {called}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", str(folder / "gs"))
    return called


@pytest.mark.parametrize("payload", [EPS, WMF, b"%PDF-1.4\n" + bytes(50), b"MM\0\0" + bytes(60)])
@pytest.mark.parametrize("where", ["folder", "zip", "parquet", "npz", "tar", "file"])
def test_no_content_starts_a_program(tmp_path, programs, where, payload):
    good = encode(PICTURE, "PNG")
    files = {"a.png": good, "b.png": payload, "c.png": payload}
    if where == "file":
        path = tmp_path / "a.png"
        path.write_bytes(payload)
        with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
            open_image_file(path)
    else:
        images = open_images(_store(tmp_path, where, files), size=8)
        assert [_reads(images, i) for i in range(3)] == [True, False, False]
    assert not programs.exists()


def _reads(images, i: int) -> bool:
    try:
        return images.image(i).shape == (3, 8, 8)
    except ValueError:
        return False


def _store(root: Path, where: str, files: dict[str, bytes]) -> Path:
    if where == "folder":
        folder = root / "set"
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return folder
    path = root / f"set.{where}"
    if where == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items():
                file.writestr(name, data)
    elif where == "tar":
        with tarfile.open(path, "w") as file:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    elif where == "npz":
        blob = b"".join(files.values())
        offsets = np.cumsum([0, *map(len, files.values())])
        np.savez(path, train_blob=np.frombuffer(blob, np.uint8), train_offsets=offsets)
    else:
        import pyarrow as pa
        import pyarrow.parquet

        cells = [{"bytes": data, "path": name} for name, data in files.items()]
        pyarrow.parquet.write_table(pa.table({"image": cells}), path)
    return path


# --- sizes ---------------------------------------------------------------------------------------


def png_of_size(width: int, height: int, rows: int = 0) -> bytes:
    """Return a grey PNG that claims a size and has some of its rows, all black."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    compressor = zlib.compressobj(1)
    stream = b"".join(compressor.compress(bytes(1 + width)) for _ in range(rows))
    parts = [(b"IHDR", header), (b"IDAT", stream + compressor.flush()), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "size", [(13000, 13000), (1, 178_000_000), (1 << 21, 4), (2**31 - 1, 2**31 - 1), (1, 1 << 21)]
)
def test_sizes_are_refused_before_anything_is_decoded(size):
    with pytest.raises(UnreadableImage, match=r"pixels.*make it smaller"):
        decode_image(png_of_size(*size))


def test_a_large_jpeg_is_read_at_half_its_size(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 40_000)
    image = load_image(decode_image(encode(PICTURE.resize((300, 200)), "JPEG", quality=95)))
    assert image.size == (150, 100)
    assert decode_image(encode(PICTURE.resize((200, 200)), "JPEG")).size == (200, 200)
    with pytest.raises(UnreadableImage, match="at most 40,000"):
        decode_image(encode(PICTURE.resize((300, 200)), "PNG"))


def test_threads_decode_a_bounded_number_of_pixels_at_once(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    from concurrent.futures import ThreadPoolExecutor

    most = []

    def hold(side: int) -> None:
        with decode.reserve_pixels(Image.new("L", (side, side))):
            most.append(decode._in_use)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hold, [7, 3, 9, 5, 20, 1] * 20))
    assert len(most) == 120
    assert max(n for n in most if n < 400) <= 100  # 400: one that is too large alone
    assert decode._in_use == 0


BOMBS = """
import resource, sys
from pathlib import Path
from PIL import Image
from mezzotint.data.decode import decode_image, load_image
from mezzotint.data.transforms import to_pixels
sys.path.insert(0, str(Path(sys.argv[1])))
from test_decode import png_of_size
load_image(decode_image(png_of_size(8, 8, 8)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in ((11000, 11000), (1 << 20, 100), (100, 1 << 20)):
    image = decode_image(png_of_size(*size, rows=size[1]))
    assert to_pixels(image, 8, 3, "plain").shape == (3, 8, 8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_memory_of_the_largest_images():
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, Path(__file__).parent], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(f"the largest images take {done.stdout.strip()} MiB")
    assert int(done.stdout) < 1200


@pytest.mark.parametrize("pixels", [True, False])
def test_an_npz_that_expands_is_refused_before_it_is_read(tmp_path, pixels):
    arrays = {"arr_0": np.zeros((1 << 20, 8, 8, 3), np.uint8)}
    if not pixels:
        arrays = {"train_blob": arrays["arr_0"].ravel(), "train_offsets": np.array([0, 1 << 20])}
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
    with pytest.raises(ValueError, match="unpacks to 201,326,592 bytes, over 100 times"):
        open_images(tmp_path / "a.npz", size=8)


# --- kinds that are not read ---------------------------------------------------------------------


def heif(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1" + brand + bytes(40)


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("a.png", b"", IMAGE),
        ("a.JPG", b"anything", IMAGE),
        ("IMG_1.HEIC", b"", ".heic"),
        ("a.dng", b"II*\0", ".dng"),
        ("a.svg", b"", ".svg"),
        ("a.psd", b"", ".psd"),
        ("a.mp4", b"", ".mp4"),
        ("a.eps", EPS, ".eps"),
        ("a.jxl", b"", ".jxl"),
        ("0a1b2c", b"\xff\xd8\xff\xe0", IMAGE),
        ("0a1b2c", b"\x89PNG\r\n\x1a\n", IMAGE),
        ("0a1b2c", b"RIFF\0\0\0\0WEBP", IMAGE),
        ("0a1b2c", b"II*\0\x08\0\0\0", IMAGE),
        ("photo.jpg_large", b"\xff\xd8\xff\xe1", IMAGE),
        ("0a1b2c", heif(b"heic"), ".heic"),
        ("0a1b2c", heif(b"crx "), ".heic"),
        ("0a1b2c", b"\0\0\0\x18ftypmp42" + bytes(8), ".mp4"),
        ("0a1b2c", b"II*\0\x10\0\0\0CR\2\0", ".cr2"),
        ("0a1b2c", EPS, ".eps"),
        ("0a1b2c", b"any text", None),
        ("README", b"", None),
        ("a.txt", b"\xff\xd8\xff", None),
        ("a.npz", b"PK\3\4", None),
    ],
)
def test_the_kind_of_a_file(monkeypatch, name, head, kind):
    monkeypatch.setattr(decode, "formats", lambda: ("PNG", "JPEG", "WEBP", "TIFF"))
    image_suffixes.cache_clear()
    try:
        assert image_kind(name, lambda: head) == kind
    finally:
        image_suffixes.cache_clear()


def test_unread_kinds_are_counted_with_what_to_do():
    lines = describe_unread({".heic": 3, ".dng": 1})
    assert lines == [
        "1 file .dng cannot be read; develop them to PNG or JPEG, e.g. with darktable or rawpy",
        "3 files .heic cannot be read; pip install pillow-heif",
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (EPS, r"its content is \.eps; render"),
        (b"8BPS" + bytes(60), r"its content is \.psd; export"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"\.svg; render"),
        (b"\0\0\0\x18ftypmp42" + bytes(60), r"\.mp4; take images out"),
        (b"II*\0" + bytes(60), r"its content is \.tif, damaged or of a type that is not read"),
        (b"GIF89a" + bytes(60), r"its content is \.gif, damaged or of a type"),
        (b"<!DOCTYPE html><html>not found</html>", "not an image of the formats that are read"),
        (b"", "no bytes"),
    ],
)
def test_other_content_is_named(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        decode_image(data)


def test_a_raw_photo_named_tif_is_no_preview():
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    tags = ImageFileDirectory_v2()
    tags[50706] = b"\1\4\0\0"  # DNGVersion
    with pytest.raises(UnreadableImage, match="a raw photo"):
        decode_image(encode(PICTURE, "TIFF", tiffinfo=tags))


@pytest.mark.parametrize("format", ["HEIF", "JXL"])
def test_a_plugin_opens_its_format(format):
    """Run where pillow-heif or pillow-jxl-plugin is installed."""
    pytest.importorskip(decode.PLUGINS[format])
    assert abs(pixels(encode(PICTURE, format)).astype(int) - np.asarray(PICTURE)).mean() < 20


# --- orientation ---------------------------------------------------------------------------------

CORNER = Image.new("RGB", (32, 16))
CORNER.paste("white", (0, 0, 16, 8))  # white at the top left as stored


def _exif(orientation: int, damage: str) -> bytes:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    more = {
        "": b"",
        "cut": struct.pack("<HHII", 0x8769, 4, 1, 10**6),  # its folder lies outside
        "unwritable": struct.pack("<HHII", 0x0110, 2, 2**31, 30),  # a text of 2 GiB
        "count": b"",
    }[damage]
    count = {"count": 60000}.get(damage, 1 + bool(more))
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entry + more
    return b"Exif\0\0" + (block if damage == "count" else block + bytes(4))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of corrupt EXIF data
@pytest.mark.parametrize("damage", ["", "cut", "unwritable", "count"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "white"), [(3, (-4, -4)), (6, (4, -4)), (8, (-4, 4))])
def test_images_stand_upright_beside_damaged_exif(format, damage, orientation, white):
    data = encode(CORNER, format, exif=_exif(orientation, damage), quality=95)
    array = pixels(data)
    assert array.shape == ((16, 32, 3) if orientation == 3 else (32, 16, 3))
    assert array[white].min() > 200
    assert array.mean() < 90  # one quarter is white


def test_an_orientation_in_tiff_is_applied_once(tmp_path):
    from mezzotint.data.bucketed_dataset import BucketedDataset
    from mezzotint.data.image_dataset import open_source

    for k, format in enumerate(("TIFF", "PNG", "JPEG")):
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / f"{k}.{format.lower()}").write_bytes(encode(CORNER, format, exif=exif))
    images = BucketedDataset(open_source(str(tmp_path), 8)[0], ((16, 32), (32, 16)))
    assert images.bucket.tolist() == [1, 1, 1]
    for i in range(3):
        assert images.image(i)[:, 4, -4].min() > 200


# --- many unreadable -----------------------------------------------------------------------------


def test_more_than_a_thousand_unreadable_files_in_a_row(tmp_path):
    for i in range(1200):
        (tmp_path / f"{i:05d}.jpg").write_bytes(b"\xff\xd8\xff damaged")
    (tmp_path / "z.png").write_bytes(encode(PICTURE, "PNG"))
    images = open_images(tmp_path, size=8)
    assert images.readable(0) == 1200
    batch, _ = images.batch([0, 600, 1200])
    assert np.array_equal(batch[0], batch[2])
    assert len(images.report.unreadable) == 1200
    (tmp_path / "z.png").unlink()
    with pytest.raises(ValueError, match=r"no image of .* can be read: 1,200 images; 1200 unread"):
        open_images(tmp_path, size=8)


# --- files that the machine fails to read --------------------------------------------------------


READERS = {  # where an image lies -> what reads it there
    "folder": "mezzotint.data.stores.read_regular_file",
    "zip": "zipfile.ZipFile.read",
    "a zip that another thread opens": "io.open",
    "a zip that another process opens": "io.open",
    "a file that a table names": "mezzotint.data.tables.read_regular_file",
}


@pytest.fixture(params=READERS)
def failing(request, tmp_path, monkeypatch):
    """Three grey images, and a function after which reading them fails with a number."""
    files = {f"{i}.png": encode(Image.new("L", (8, 8), 50 * i), "PNG") for i in range(3)}
    path = _store(tmp_path, "zip" if "zip" in request.param else "folder", files)
    if "table" in request.param:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"image": [*files]}), path / "set.parquet")
        path /= "set.parquet"
    images = open_images(path, size=8, channels=1, keep_in_memory=False)

    def fail(code):
        def read(*_, **__):
            raise OSError(code, os.strerror(code))

        stores._open_zip.cache_clear()
        if "process" in request.param:
            stores._read_zip.cache_clear()
            stores._zip_members.cache_clear()
        monkeypatch.setattr(READERS[request.param], read)

    return images, fail


@pytest.mark.parametrize(
    "code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT]
)
def test_a_failure_of_the_machine_is_no_fault_of_an_image(failing, monkeypatch, code):
    images, fail = failing
    fail(code)
    with pytest.raises(OSError, match=rf"cannot be read now: {os.strerror(code)}; .* goes on"):
        images.batch([1, 2])
    monkeypatch.undo()
    assert images.report.unreadable == {}
    assert images.batch([1, 2])[0][:, 0, 0, 0].tolist() == [50, 100]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.EIO])
def test_a_file_that_is_gone_locked_or_broken_is_left_out(failing, monkeypatch, code):
    images, fail = failing
    fail(code)
    with pytest.raises(ValueError, match=rf"cannot be read: .*{os.strerror(code)}"):
        images.image(1)
    monkeypatch.undo()
    assert images.batch([1])[0][0, 0, 0, 0] == 100
    assert [os.strerror(code) in why for why in images.report.unreadable.values()] == [True]


def test_the_limit_is_stated_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "train-on-your-images.md").read_text()
    assert f"{MAX_PIXELS:,}" in page
