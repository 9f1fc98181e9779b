"""Images and text as HTML. Everything is inside the page, in its colours, light or dark."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mezzotint.core.image_grid import data_uri, to_pil

PREVIEW_SIDE = 192  # pixels; larger previews are shrunk, so that streaming them stays cheap


@dataclass(frozen=True)
class Figure:
    """An image with a title and a detail below it.

    data: bytes of a PNG or JPEG. seed: shows buttons that reuse the seed and save the image. alt:
    description for screen readers; the title and detail by default.
    """

    data: bytes
    title: str
    detail: str = ""
    seed: int | None = None
    alt: str = ""


def png(
    image: Tensor | Image.Image, label: int | None = None, card: Mapping[str, Any] | None = None
) -> bytes:
    """Return PNG bytes; class label and sampling card are the text chunks "label", "mezzotint"."""
    text = PngInfo()
    if label is not None:
        text.add_text("label", str(label))
    if card is not None:
        text.add_itxt("mezzotint", json.dumps(card, ensure_ascii=False))
    file = io.BytesIO()
    pil = to_pil(image) if isinstance(image, Tensor) else image
    pil.save(file, format="PNG", pnginfo=text, compress_level=4)
    return file.getvalue()


def thumbnail(image: Tensor) -> bytes:
    """Return an image (c, h, w) as PNG bytes of at most PREVIEW_SIDE pixels a side."""
    pil = to_pil(image)
    pil.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.BOX)
    return png(pil)


def figure(item: Figure) -> str:
    """Return one image; `generate_tab.GALLERY_JS` handles its buttons."""
    alt = escape(item.alt or f"{item.title} {item.detail}".strip(), quote=True)
    image = f'<img src="{data_uri(item.data)}" alt="{alt}">'
    caption = f"<b>{escape(item.title)}</b>"
    if item.detail:
        caption += f"<span>{escape(item.detail)}</span>"
    if item.seed is not None:
        image = (
            f'<button type="button" class="mz-pick" data-seed="{item.seed}" title="use this seed">'
            f"{image}</button>"
        )
        caption += (
            '<span class="mz-tools">'
            f'<button type="button" data-seed="{item.seed}">use seed</button>'
            f'<button type="button" data-save="seed-{item.seed}.png">PNG</button></span>'
        )
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def figures(items: Sequence[Figure], kind: str = "mz-grid", title: str = "") -> str:
    """Return images side by side: "mz-grid" wraps, "mz-strip" scrolls."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'{head}<div class="{kind}">{"".join(figure(item) for item in items)}</div>'


def progress(done: int, total: int, text: str) -> str:
    """Return a progress bar and its text."""
    bar = f'<progress value="{done}" max="{max(total, 1)}" aria-label="progress"></progress>'
    return f'<div class="mz-status" role="status">{bar}<span>{escape(text)}</span></div>'


def note(text: str) -> str:
    """Return a status line."""
    return f'<div class="mz-status" role="status"><span>{escape(text)}</span></div>'


def problem(text: str) -> str:
    """Return an error message."""
    return f'<div class="mz-status mz-problem" role="alert"><span>{escape(text)}</span></div>'


def empty(text: str) -> str:
    """Return a placeholder where images will be."""
    return f'<div class="mz-empty">{escape(text)}</div>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, bars: Sequence[float] = ()
) -> str:
    """Return a table whose first column is text and whose others are numbers.

    Args:
        bars: one value in 0...1 a row, drawn as a bar in a last column.
    """
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    body = ""
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        if bars:
            cells += f'<td class="mz-bar"><i style="width:{100 * bars[i]:.1f}%"></i></td>'
        body += f"<tr>{cells}</tr>"
    top += '<th scope="col" aria-label="share"></th>' if bars else ""
    return (
        f'<div class="mz-table" tabindex="0"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )
