"""Line plots as inline SVG, drawn in the text colour of the page that holds them, light or dark."""

from __future__ import annotations

import io
import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mezzotint.core.files import atomic_write

INK = "#010203"  # stands for the page's text colour until the SVG is written
COLOURS = ("#c8693c", "#2a9d8f", "#5b8fd9", "#b07aa1", "#a89f3c", "#e07a9a", "#7a8793", "#8a6fd1")
DRAWING = threading.Lock()  # matplotlib's settings are global
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Line:
    """One curve of a plot. Values of y that are not finite are gaps.

    x: numbers, or names of categories. style: as matplotlib writes it, e.g. "-", "--", "o-".
    labels: words beside the points; none by default.
    """

    x: Sequence[float] | Sequence[str]
    y: Sequence[float]
    name: str = ""
    colour: str = COLOURS[0]
    style: str = "-"
    alpha: float = 1.0
    labels: Sequence[str] = ()


def svg_plot(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    size: tuple[float, float] = (5.2, 2.7),
) -> str:
    """Return curves as an `<svg class="plot">` element, with a legend if a line has a name.

    Args:
        x_label, y_label: names of the axes with their units.
        log_y: logarithmic y axis.
        from_zero: the y axis begins at 0.
        marks: x positions of thin vertical lines.
        size: (width, height) in inches; the page scales the plot, so this sets its proportions.
    """
    title = _title(lines, x_label, y_label)
    text = _render(
        lines, x_label, y_label, "svg", log_y=log_y, from_zero=from_zero, marks=marks, size=size
    ).decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head = f'<svg class="plot" role="img" aria-label="{escape(title, quote=True)}" '
    return text.replace("<svg ", head, 1)


def save_plot(path: Path, lines: Sequence[Line], x_label: str, y_label: str) -> None:
    """Write curves as a file of their own, dark on white: .png or .svg, by the name."""
    kind = path.suffix.removeprefix(".")
    atomic_write(path, _render(lines, x_label, y_label, kind, size=(5.2, 3.6), ground="white"))


def _title(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    names = ", ".join(line.name for line in lines if line.name)
    return f"{y_label} over {x_label}" + (f": {names}" if names else "")


def _render(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    kind: str,
    *,
    log_y: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    size: tuple[float, float],
    ground: str = "none",
) -> bytes:
    """Return a plot as a file; see `svg_plot`.

    Args:
        kind: "svg" or "png". ground: colour behind it; none is transparent.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    file = io.BytesIO()
    # Without a salt the ids are random; with one salt for all, two plots of a page share ids.
    settings: dict[Any, Any] = {**SETTINGS, "svg.hashsalt": _title(lines, x_label, y_label)}
    with DRAWING, rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            y = [v if math.isfinite(v) else math.nan for v in line.y]
            options: dict[str, Any] = {"color": line.colour, "alpha": line.alpha}
            axes.plot(
                line.x, y, line.style, label=line.name or None, lw=1.6, markersize=4, **options
            )
            for at, label in zip(zip(line.x, y, strict=True), line.labels, strict=False):
                axes.annotate(label, at, (4, 4), textcoords="offset points", fontsize=8)
        for mark in marks:
            axes.axvline(mark, color=INK, alpha=0.25, linewidth=0.7)
        if log_y:
            axes.set_yscale("log")
        if from_zero:
            highest = max((v for line in lines for v in line.y if math.isfinite(v)), default=0)
            axes.set_ylim(0, 1.08 * highest or 1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(alpha=0.12, color=INK)
        if any(not isinstance(v, str) and v >= 10_000 for line in lines for v in line.x):
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if any(line.name for line in lines):
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(file, format=kind, facecolor=ground, dpi=160, metadata=metadata)
    return file.getvalue()
