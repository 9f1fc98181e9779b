"""Pictures and plots as HTML: everything is inside the page, drawn in its colours, light or dark."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mezzotint.core.image_grid import to_pil

PREVIEW_SIDE = 192  # pixels; larger previews are shrunk, so that streaming them stays cheap
INK = "#010203"  # a stand-in that the page replaces by its own text colour
COLOURS = ("#c8693c", "#2a9d8f", "#5b8fd9", "#b07aa1", "#a89f3c", "#e07a9a", "#7a8793", "#8a6fd1")
DRAWING = threading.Lock()  # matplotlib's settings are global


@dataclass(frozen=True)
class Figure:
    """A picture with words: PNG bytes (or JPEG), a title, a detail; with a seed it can be taken up again and saved."""

    data: bytes
    title: str
    detail: str = ""
    seed: int | None = None
    alt: str = ""


def png(
    image: Tensor | Pillow.Image, label: int | None = None, card: Mapping[str, Any] | None = None
) -> bytes:
    """PNG bytes; the label and the card (how it was made) as text chunks "label" and "mezzotint"."""
    text = PngInfo()
    if label is not None:
        text.add_text("label", str(label))
    if card is not None:
        text.add_itxt("mezzotint", json.dumps(card, ensure_ascii=False))
    file = io.BytesIO()
    picture = to_pil(image) if isinstance(image, Tensor) else image
    picture.save(file, format="PNG", pnginfo=text, compress_level=4)
    return file.getvalue()


def small(image: Tensor) -> bytes:
    """PNG bytes of a preview (c, h, w), shrunk where it is large."""
    picture = to_pil(image)
    picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Pillow.Resampling.BOX)
    return png(picture)


def data_uri(data: bytes) -> str:
    """Bytes of a PNG or JPEG as the address of an image."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def figure(item: Figure) -> str:
    """One picture; its buttons are handled by `page.GALLERY_JS`."""
    alt = escape(item.alt or f"{item.title} {item.detail}".strip(), quote=True)
    image = f'<img src="{data_uri(item.data)}" alt="{alt}">'
    words = f"<b>{escape(item.title)}</b>" + (
        f"<span>{escape(item.detail)}</span>" if item.detail else ""
    )
    buttons = ""
    if item.seed is not None:
        image = f'<button type="button" class="mz-pick" data-seed="{item.seed}" title="use this seed">{image}</button>'
        buttons = (
            f'<span class="mz-tools"><button type="button" data-seed="{item.seed}">use seed</button>'
            f'<button type="button" data-save="seed-{item.seed}.png">PNG</button></span>'
        )
    return f"<figure>{image}<figcaption>{words}{buttons}</figcaption></figure>"


def figures(items: Sequence[Figure], kind: str = "mz-grid", title: str = "") -> str:
    """Pictures side by side: "mz-grid" wraps, "mz-strip" scrolls."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'{head}<div class="{kind}">{"".join(figure(item) for item in items)}</div>'


def progress(done: int, total: int, words: str) -> str:
    """A bar and what it stands for."""
    shown = f'<progress value="{done}" max="{max(total, 1)}" aria-label="progress"></progress>'
    return f'<div class="mz-status" role="status">{shown}<span>{escape(words)}</span></div>'


def note(words: str) -> str:
    """A quiet remark."""
    return f'<div class="mz-status" role="status"><span>{escape(words)}</span></div>'


def problem(words: str) -> str:
    """What went wrong, where it will be seen."""
    return f'<div class="mz-status mz-problem" role="alert"><span>{escape(words)}</span></div>'


def empty(words: str) -> str:
    """What stands where pictures will be."""
    return f'<div class="mz-empty">{escape(words)}</div>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, bars: Sequence[float] = ()
) -> str:
    """A table; the first column is text, the others numbers; `bars`, in 0...1, fill each row's last cell."""
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


@dataclass(frozen=True)
class Line:
    """One curve of a plot; `style` as matplotlib has it."""

    x: Sequence[float]
    y: Sequence[float]
    name: str = ""
    colour: str = COLOURS[0]
    style: str = "-"


def plot(
    lines: Sequence[Line],
    x: str,
    y: str,
    log_y: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    size: tuple[float, float] = (5.2, 2.7),
) -> str:
    """Curves as inline SVG.

    Args:
        lines: values that are not finite are gaps. x, y: names of the axes with their units. log_y: logarithmic y.
        from_zero: y begins at 0. marks: positions of thin vertical lines.
        size: in inches, which sets only the proportions.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Sheet
    from matplotlib.ticker import EngFormatter

    file = io.StringIO()
    with DRAWING, rc_context({"svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}):
        sheet = Sheet(figsize=size, layout="constrained")
        axes = sheet.add_subplot()
        for line in lines:
            values = [v if math.isfinite(v) else math.nan for v in line.y]
            axes.plot(
                line.x,
                values,
                line.style,
                color=line.colour,
                label=line.name or None,
                linewidth=1.6,
            )
        for mark in marks:
            axes.axvline(mark, color=INK, alpha=0.25, linewidth=0.7)
        if log_y:
            axes.set_yscale("log")
        if from_zero:
            axes.set_ylim(
                0,
                1.08 * max((v for line in lines for v in line.y if math.isfinite(v)), default=1)
                or 1,
            )
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        axes.tick_params(which="both", colors=INK)
        axes.grid(alpha=0.12, color=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        if max((v for line in lines for v in line.x), default=0) >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if any(line.name for line in lines):
            axes.legend(
                frameon=False, labelcolor=INK, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
            )
        sheet.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    drawn = file.getvalue()
    drawn = (
        drawn[drawn.index("<svg") :]
        .replace(INK, "currentColor")
        .replace("<svg ", '<svg role="img" ', 1)
    )
    named = escape(
        f"{y} over {x}: {', '.join(line.name for line in lines if line.name)}", quote=True
    )
    return f'<div class="mz-plot">{drawn.replace("<svg ", f"<svg aria-label={chr(34)}{named}{chr(34)} ", 1)}</div>'
