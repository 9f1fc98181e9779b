"""Open images of strangers: a stated list of formats, limits on sizes, and what is not read.

Every image that the library opens goes through `decode_image` and `load_image`. Other decoders of
Pillow are never tried: that of EPS hands the file to Ghostscript.
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from mezzotint.core.store_errors import LOCAL_ERRORS
from mezzotint.data import salvage

MAX_PIXELS = 1 << 27  # 128 Mpixel; a JPEG of up to Pillow's own limit is read at half its size
MAX_FILE_BYTES = 1 << 30
MAX_SIDE = 1 << 20  # a decoder's bookkeeping of a row or column costs more than its pixels
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "JPEG2000"),
    *("QOI", "AVIF", "HEIF", "JXL"),
)
PLUGINS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}  # format -> module that decodes it
IMAGE = "image"  # of `image_kind`
HEAD_BYTES = 64  # of a file, for `image_kind`

# Images and videos that are not read: what to do -> suffixes.
_UNREAD = {
    "pip install pillow-heif": ".heic .heics .heif .heifs .hif",
    "pip install pillow-jxl-plugin": ".jxl",
    "pip install --upgrade pillow, or convert them to PNG": ".avif .avifs .webp .jp2 .j2k .jpx",
    "develop them to PNG or JPEG, e.g. with darktable or rawpy": (
        ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .raf .orf .rw2 .rwl .pef .srw .x3f .3fr .iiq "
        ".erf .kdc .dcr .mrw .mef .mos .raw"
    ),
    "export them as PNG": ".psd .psb .xcf .kra .ora .clip .afphoto .procreate",
    "render them to PNG": ".svg .svgz .eps .ps .pdf .ai .wmf .emf .cdr",
    "take images out of them, e.g. ffmpeg -i VIDEO folder/%06d.png": (
        ".mp4 .mov .avi .mkv .webm .m4v .wmv .flv .mpg .mpeg .3gp .mts .m2ts .ogv"
    ),
    "convert them to PNG or TIFF": (
        ".dcm .fits .fit .fts .exr .hdr .dds .ico .icns .cur .dib .jxr .wdp .bpg .flif .czi .svs "
        ".ndpi .mrxs .lif .nd2 .vsi .nii .nrrd .mha .xpm .xbm .ras .im .msp .blp .fli .pcd .pxr"
    ),
}
UNREAD = {suffix: advice for advice, suffixes in _UNREAD.items() for suffix in suffixes.split()}
# Files whose content is never looked at: they are no images, whatever their first bytes.
_OTHER = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "caption", "json", "jsonl", "ndjson", "csv", "tsv", "xml", "html", "htm", "md"),
        *("rst", "yaml", "yml", "toml", "ini", "log", "parquet", "arrow", "feather", "npz", "npy"),
        *("pt", "pth", "ckpt", "safetensors", "pkl", "h5", "hdf5", "mat", "db", "sqlite", "lmdb"),
        *("zip", "tar", "gz", "tgz", "bz2", "xz", "zst", "7z", "rar", "py", "ipynb", "sh", "xls"),
        *("xlsx", "doc", "docx", "wav", "mp3", "flac", "ogg", "aae", "lnk", "tfrecord", "lock"),
    )
)
# First bytes of a file -> the suffix of its kind.
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"GIF87a": ".gif",
    b"GIF89a": ".gif",
    b"qoif": ".qoi",
    b"\xff\x4f\xff\x51": ".j2k",
    b"\x00\x00\x00\x0cjP  \r\n\x87\n": ".jp2",
    b"\x00\x00\x00\x0cJXL \r\n\x87\n": ".jxl",
    b"\xff\x0a": ".jxl",
    b"FUJIFILMCCD-RAW": ".raf",
    b"8BPS": ".psd",
    b"gimp xcf": ".xcf",
    b"%!PS": ".eps",
    b"\xc5\xd0\xd3\xc6": ".eps",
    b"%PDF": ".pdf",
    b"\xd7\xcd\xc6\x9a": ".wmf",
    b"<svg": ".svg",
    b"\x1a\x45\xdf\xa3": ".mkv",
    b"SIMPLE  =": ".fits",
    b"v/1\x01": ".exr",
    b"DDS ": ".dds",
}

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # our limits are lower
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # damaged metadata


class UnreadableImage(ValueError):
    """An image that cannot become pixels; the message is the reason, for a report."""


# Failures of the machine or its network, after which the same file may be read again.
PASSING = (
    *LOCAL_ERRORS, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNABORTED,
    errno.EREMOTEIO,
)  # fmt: skip


def blame_file(error: Exception, name: str) -> UnreadableImage:
    """Return the reason why a file is left out: `error`, raised while it was read.

    Errors: OSError for a failure that is not the file's, e.g. too many open files. An image that
        was left out for it would make a resumed run see other images.
    """
    if isinstance(error, OSError) and error.errno in PASSING:
        raise OSError(
            f"{name} cannot be read now: {error.strerror}; the same command goes on from here"
        ) from error
    return UnreadableImage(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}")


@functools.cache
def formats() -> tuple[str, ...]:
    """Return the names, as Pillow has them, of the formats that are read here."""
    Image.init()
    for module in PLUGINS.values():
        try:
            plugin = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(plugin, "register_heif_opener"):
            plugin.register_heif_opener()
    missing = {
        name
        for name, feature in {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.items()
        if not features.check(feature)
    }
    return tuple(name for name in FORMATS if name in Image.OPEN and name not in missing)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of image files that are read."""
    known = formats()
    suffixes = {s for s, name in Image.registered_extensions().items() if name in known}
    return frozenset({*suffixes, ".mpo"})


def image_kind(name: str, read_head: Callable[[], bytes]) -> str | None:
    """Return `IMAGE` for a file to read, a suffix for an image of another kind, None for others.

    Args:
        name: of the file. Its suffix decides, if it is a known one.
        read_head: returns the first HEAD_BYTES bytes of the file; they decide otherwise.

    The kinds returned are suffixes with a dot, e.g. ".heic", see `describe_unread`.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _OTHER:
        return None
    if suffix not in image_suffixes() and suffix not in UNREAD:
        suffix = _suffix_of_content(read_head())
    if suffix in image_suffixes():
        return IMAGE
    return suffix if suffix in UNREAD else None


def _suffix_of_content(head: bytes) -> str | None:
    """Return the usual suffix of a file that starts with `head`, None if it is no image."""
    if head[:4] == b"RIFF":
        return {b"WEBP": ".webp", b"AVI ": ".avi"}.get(head[8:12])
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return ".cr2" if head[8:10] == b"CR" else ".tif"
    if head[:2] == b"BM":
        return ".bmp" if head[14:18] in {bytes([n, 0, 0, 0]) for n in (12, 40, 108, 124)} else None
    if head[4:8] == b"ftyp":
        if b"avif" in head or b"avis" in head:
            return ".avif"
        if any(brand in head for brand in (b"heic", b"heix", b"hevc", b"mif1", b"heim", b"heis")):
            return ".heic"
        return {b"crx ": ".cr3", b"qt  ": ".mov"}.get(head[8:12], ".mp4")
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), None)


def describe_unread(counts: Mapping[str, int]) -> list[str]:
    """Return a sentence for each kind of image that is not read: how many, and what to do."""
    return [
        f"{count:,} file{'s' * (count > 1)} {kind} cannot be read; {UNREAD[kind]}"
        for kind, count in sorted(counts.items())
    ]


def decode_image(data: bytes, allowed: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image without loading its pixels; a large JPEG is set to half its size.

    Args:
        allowed: the formats to read, some of `FORMATS`.

    Errors: `UnreadableImage` for another format than `FORMATS`, or a larger size than MAX_PIXELS
        and MAX_SIDE.
    """
    if not data:
        raise UnreadableImage("no bytes")
    try:
        image = _open(data, allowed)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS)
        raise UnreadableImage(f"more than {limit:,} pixels; make it smaller") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        image = salvage.salvage(data, _open_and_load)
        if image is None:
            raise UnreadableImage(_reason(data, error)) from error
    if isinstance(image, TiffImageFile) and _is_raw(image):
        raise UnreadableImage(f"a raw photo; {UNREAD['.raw']}")
    return image


def open_image_file(path: Path) -> Image.Image:
    """Return the loaded image of a file; ValueError, naming it, where it cannot be read."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("no regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{status.st_size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        return load_image(decode_image(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; check the path") from None
    except UnreadableImage as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def _open(data: bytes, allowed: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image, and check its size."""
    known = tuple(name for name in allowed if name in formats())
    image = Image.open(io.BytesIO(data), formats=known)
    if image.width * image.height > MAX_PIXELS and image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // 2, image.height // 2))
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise UnreadableImage(
            f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read, and "
            f"{MAX_SIDE:,} a side; make it smaller"
        )
    return image


def _open_and_load(data: bytes) -> Image.Image:
    image = _open(data)
    image.load()
    return image


def _is_raw(image: TiffImageFile) -> bool:
    """Return whether a TIFF is a camera's raw file, whose first image is a preview."""
    dng_version, subfile_type, sub_ifds = 50706, 254, 330
    is_preview = image.tag_v2.get(subfile_type) == 1 and sub_ifds in image.tag_v2
    return dng_version in image.tag_v2 or is_preview


def _reason(data: bytes, error: Exception) -> str:
    """Return why Pillow did not open these bytes."""
    kind = _suffix_of_content(data[:HEAD_BYTES])
    if kind in UNREAD and kind not in image_suffixes():
        return f"its content is {kind}; {UNREAD[kind]}"
    if isinstance(error, UnidentifiedImageError) and kind in image_suffixes():
        return f"its content is {kind}, damaged or of a type that is not read; save it as PNG"
    if isinstance(error, UnidentifiedImageError):  # its message contains an address in memory
        return f"not an image of the formats that are read ({', '.join(formats())})"
    return f"{type(error).__name__}: {error}"


def load_image(image: Image.Image) -> Image.Image:
    """Return the image with its pixels loaded.

    A PNG or JPEG whose pixels are all there is read although something beside them is damaged.

    Errors: `UnreadableImage` for truncated or damaged pixels.
    """
    file = getattr(image, "fp", None)
    try:
        image.load()
        return image
    except Exception as error:
        data = file.getvalue() if isinstance(file, io.BytesIO) else b""
        whole = salvage.salvage(data, _open_and_load)
        if whole is None:
            raise UnreadableImage(f"{type(error).__name__}: {error}") from error
        return whole


# --- memory --------------------------------------------------------------------------------------

_in_use, _changed = 0, threading.Condition()


@contextmanager
def reserve_pixels(image: Image.Image) -> Iterator[None]:
    """Wait until this process decodes at most MAX_PIXELS pixels at once, this image's included."""
    global _in_use
    count = image.width * image.height
    with _changed:
        _changed.wait_for(lambda: _in_use == 0 or _in_use + count <= MAX_PIXELS)
        _in_use += count
    try:
        yield
    finally:
        with _changed:
            _in_use -= count
            _changed.notify_all()
