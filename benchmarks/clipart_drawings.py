"""The drawings of Debian's openclipart-svg: captions, authors, pixels, a training and a test part.

Anybody could add to that package, so nothing of a file is trusted: expat reads its metadata, opens
no other file and limits entities, and librsvg draws it from a pipe, where it may open no other file
either, within a time limit.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from PIL import Image, ImageChops

# 1,378 polygons that one program made, and sets of icons for desktops.
LEFT_OUT = ("shapes/stars", "computer/icons")
MAX_FILE_BYTES = 8 << 20
MAX_WORDS = 16  # of a caption
COLLECTION = 5  # drawings of one author with one title: the title is that of a collection
# Words that say where a drawing came from, not what it shows.
NO_WORDS = {
    *("unsorted", "special", "unknown", "untitled", "none", "title", "document", "collection"),
    *("clipart", "cliparts", "openclipart", "upload", "uploads", "hash", "webpage", "web", "by"),
    *("svg", "inkscape", "sodipodi", "vector", "magick", "image", "images", "picture", "pictures"),
    *("drawing", "domain", "various", "iconset", "appicon", "hicolor"),
}
UNKNOWN = {"unknown", "anonymous", "open", "clip", "art", "library", "project", "public", "domain"}
MARGIN = 1 / 16  # of the side stays white around a drawing
OVERSAMPLING = 4  # drawings are rendered at that times the size, trimmed, and averaged
SECONDS_PER_FILE = 20


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself; each may be empty."""

    title: str
    keywords: tuple[str, ...]
    author: str


@dataclass(frozen=True)
class Drawing:
    """A drawing to be rendered.

    path: of the file. name: its path in the package. group: its author, or its folder where the
    author is unknown; groups are held out whole. caption: of `make_caption`.
    """

    path: Path
    name: str
    group: str
    caption: str


def read_metadata(path: Path) -> Metadata:
    """Read the title, keywords and author of an SVG file.

    Errors: ValueError if the file is too large, or no XML up to the end of its metadata.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} has over {MAX_FILE_BYTES:,} bytes")
    title, keywords, author, above = "", [], "", []
    try:
        with path.open("rb") as file:
            for event, node in ElementTree.iterparse(file, events=("start", "end")):
                tag = str(node.tag).rpartition("}")[2].lower()
                if event == "start":
                    above.append(tag)
                    continue
                above.pop()
                text = " ".join((node.text or "").split())
                if tag == "title" and above[-1:] == ["work"]:
                    title = title or text
                elif tag == "title" and "creator" in above:
                    author = author or text
                elif tag == "li" and "subject" in above:
                    keywords.append(text)
                elif tag == "metadata":
                    break
    except (ElementTree.ParseError, UnicodeError, ValueError) as error:
        raise ValueError(f"{path.name} is no XML: {error}") from None
    return Metadata(title, tuple(keywords), author)


def make_caption(metadata: Metadata, name: str, is_collection: bool) -> str:
    """Return the title's words, and after commas the keywords with words that are new.

    All in lower case, without numbers, without the author's name and without `NO_WORDS`. The name
    of the file stands in for the title of a collection.

    Args:
        metadata: of the file.
        name: of the file, without folders.
        is_collection: whether the author gave the same title to other drawings too.
    """
    author = set(split_words(metadata.author))
    title = [] if is_collection else split_words(metadata.title)
    if not set(title) - author - NO_WORDS:
        title = split_words(Path(name).stem)
        # File names end in the name of the author, cut anywhere.
        while len(title) > 1 and any(word.startswith(title[-1]) for word in author):
            title.pop()
    title = [word for word in title if word not in author | NO_WORDS]
    phrases, named = [" ".join(title)], set(title)
    for keyword in metadata.keywords:
        words = [word for word in split_words(keyword) if word not in author | NO_WORDS]
        if set(words) - named:
            phrases.append(" ".join(words))
            named |= set(words)
    caption = ", ".join(phrase for phrase in phrases if phrase)
    return " ".join(caption.split()[:MAX_WORDS]).rstrip(",")


def split_words(text: str) -> list[str]:
    """Return the words of letters in lower case; a word also begins at a capital after a small."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return re.findall(r"[^\W\d_]+", apart.lower())


def find_drawings(folder: Path) -> tuple[list[Drawing], Counter[str]]:
    """List the drawings below `folder` in order of their names, and count what was left out.

    Errors: ValueError if there is none.
    """
    root = next((p.parent for p in sorted(folder.rglob("animals")) if p.is_dir()), None)
    if root is None:
        raise ValueError(
            f"no drawings below {folder}; give the FOLDER of: apt-get download openclipart-svg && "
            "dpkg -x openclipart-svg_*.deb FOLDER"
        )
    found: dict[str, Metadata] = {}
    left_out: Counter[str] = Counter()
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.svg")):
        name = path.relative_to(root).as_posix()
        content = hashlib.sha256(path.read_bytes()).digest()
        if name.startswith(LEFT_OUT):
            left_out["star or icon"] += 1
        elif content in seen:
            left_out["same file twice"] += 1
        else:
            seen.add(content)
            try:
                found[name] = read_metadata(path)
            except ValueError:
                left_out["broken file"] += 1
    titles = Counter((data.author, data.title) for data in found.values())
    drawings = []
    for name, data in found.items():
        is_collection = titles[data.author, data.title] >= COLLECTION
        caption = make_caption(data, Path(name).name, is_collection)
        if caption:
            drawings.append(Drawing(root / name, name, _group(data, name), caption))
        else:
            left_out["no caption"] += 1
    return drawings, left_out


def _group(metadata: Metadata, name: str) -> str:
    author = sorted(set(split_words(metadata.author)) - UNKNOWN)
    return f"author {' '.join(author)}" if author else f"folder {Path(name).parent}"


def held_out_groups(groups: Sequence[str], share: float, seed: int) -> set[str]:
    """Choose groups with at least `share` of all drawings, in an order that the seed decides.

    A group with over a quarter of that share stays in training, or few authors would be the test.

    Args:
        groups: of every drawing.
        share: of the drawings to hold out, in (0, 1).
        seed: of the order.
    """
    sizes, chosen, count = Counter(groups), set(), 0
    for group in sorted(sizes, key=lambda g: hashlib.sha256(f"{seed} {g}".encode()).digest()):
        if count < share * len(groups) and sizes[group] <= share * len(groups) / 4:
            chosen.add(group)
            count += sizes[group]
    return chosen


def render(path: Path, size: int) -> Image.Image:
    """Draw an SVG file on white, trimmed to what it draws, centred in a square with a margin.

    Args:
        path: of the file.
        size: side of the square in pixels.

    Errors: ValueError if librsvg fails, takes over SECONDS_PER_FILE, or draws nothing.
    """
    side = str(OVERSAMPLING * size)
    command = ["rsvg-convert", "-w", side, "-h", side, "--keep-aspect-ratio", "-b", "white"]
    try:
        done = subprocess.run(
            command, input=path.read_bytes(), capture_output=True, timeout=SECONDS_PER_FILE
        )
    except FileNotFoundError:
        raise SystemExit("rsvg-convert is not here: apt-get install librsvg2-bin") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{path.name} takes over {SECONDS_PER_FILE} s") from None
    if done.returncode:
        raise ValueError(f"{path.name}: {done.stderr.decode(errors='replace').strip()[:200]}")
    image = Image.open(io.BytesIO(done.stdout)).convert("RGB")
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if box is None:
        raise ValueError(f"{path.name} draws nothing")
    image = image.crop(box)
    scale = size * (1 - 2 * MARGIN) / max(image.size)
    width, height = (max(1, round(scale * n)) for n in image.size)
    square = Image.new("RGB", (size, size), "white")
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    square.paste(small, ((size - width) // 2, (size - height) // 2))
    return square


def write_drawings(
    source: Path, out: Path, size: int, *, share: float = 0.1, seed: int = 0, workers: int = 2
) -> dict[str, Any]:
    """Render all drawings into out/train and out/test with a metadata.jsonl each; return counts.

    Args:
        source: folder of the package.
        out: folder that gets `train` and `test`.
        size: side in pixels.
        share, seed: see `held_out_groups`.
        workers: files rendered at once.
    """
    drawings, left_out = find_drawings(source)
    held_out = held_out_groups([d.group for d in drawings], share, seed)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for part in rows:
        (out / part).mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()

    def draw(drawing: Drawing) -> Image.Image | ValueError:
        try:
            return render(drawing.path, size)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:
        for drawing, image in zip(drawings, pool.map(draw, drawings), strict=True):
            if isinstance(image, ValueError):
                print(image, flush=True)
                left_out["cannot be drawn"] += 1
                continue
            pixels = hashlib.sha256(image.tobytes()).digest()
            if pixels in seen:  # or a copy of a training image could be held out
                left_out["same pixels twice"] += 1
                continue
            seen.add(pixels)
            part = "test" if drawing.group in held_out else "train"
            file_name = drawing.name.replace("/", "--").removesuffix(".svg") + ".png"
            image.save(out / part / file_name)
            rows[part].append({"file_name": file_name, "text": drawing.caption})
    for part, described in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in described]
        (out / part / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return {
        "size": size,
        "drawings": {part: len(described) for part, described in rows.items()},
        "groups": {"all": len({d.group for d in drawings}), "held out": len(held_out)},
        "captions": {part: len({r["text"] for r in found}) for part, found in rows.items()},
        "left_out": dict(left_out),
        "share": share,
        "seed": seed,
    }
