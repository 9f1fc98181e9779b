"""The Watch tab: a run's curves and sample grids, read again every two seconds while it trains."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from PIL import Image as Pillow

from mezzotint.train import log
from mezzotint.web import html
from mezzotint.web.html import COLOURS, Line
from mezzotint.web.studio import Studio

REFRESH_SECONDS = 2.0
POINTS = 400  # drawn per curve
SHEET_SIDE = 1600  # pixels; larger grids are shown smaller


def records(run: Path) -> list[dict[str, Any]]:
    """The run's log, or nothing if it has written none yet."""
    path = run / "log.jsonl"
    return log.read(path) if path.is_file() else []


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most POINTS of the rows, the last always among them."""
    step = -(-len(rows) // POINTS)
    return rows if step < 2 else [*rows[:-1:step], rows[-1]]


def grids(run: Path) -> list[Path]:
    """The run's sample grids, oldest first."""
    return sorted(p for p in (run / "samples").glob("*.png") if p.stem.isdigit())


def stamp(run: Path) -> tuple[int, int]:
    """Changes whenever there is something new to see."""
    path = run / "log.jsonl"
    return (path.stat().st_size if path.is_file() else 0, len(grids(run)))


def curve(rows: list[dict[str, Any]], key: str, name: str = "", colour: str = COLOURS[0]) -> Line:
    """One number of the log over images seen."""
    kept = [r for r in rows if key in r]
    return Line([r["images"] for r in kept], [r[key] for r in kept], name, colour)


@functools.lru_cache(maxsize=8)
def curves(run: Path, size: int) -> str:
    """Loss, loss by log-SNR, speed, memory, evaluations; the answer is kept while `size`, of the log, is the same."""
    rows = thinned(records(run))
    if not rows:
        return html.empty("This run has logged nothing yet; the curves come with its first line.")
    latest: dict[str, float] = {}
    for row in rows:
        latest |= dict.fromkeys(row.get("loss_by_logsnr", {}), 0.0)
    by_level = []
    for i, name in enumerate(latest):
        found = [
            (r["images"], r["loss_by_logsnr"][name])
            for r in rows
            if name in r.get("loss_by_logsnr", {})
        ]
        by_level.append(
            Line([x for x, _ in found], [y for _, y in found], name, COLOURS[i % len(COLOURS)])
        )
    plots = [
        (
            "Loss",
            html.plot(
                [curve(rows, "loss")], "images seen", "loss", log_y=spans_decades(rows, "loss")
            ),
        ),
        ("Loss by log-SNR", html.plot(by_level, "images seen", "loss", log_y=True)),
        (
            "Throughput",
            html.plot(
                [curve(rows, "images_per_second")],
                "images seen",
                "images per second",
                from_zero=True,
            ),
        ),
    ]
    if any("peak_memory_gib" in r for r in rows):
        memory = html.plot(
            [curve(rows, "peak_memory_gib")], "images seen", "peak GiB", from_zero=True
        )
        plots.append(("Memory", memory))
    plots += evaluated(run)
    return (
        '<div class="mz-plots">'
        + "".join(f"<section><h3>{t}</h3>{p}</section>" for t, p in plots)
        + "</div>"
    )


def evaluated(run: Path) -> list[tuple[str, str]]:
    """A plot for each metric of the evaluations along the way."""
    judged = log.read_evaluations(run / "log.jsonl")
    plots = []
    for metric in dict.fromkeys(name for record in judged for name in record["evaluation"]):
        found = [
            (r["images"], r["evaluation"][metric]) for r in judged if metric in r["evaluation"]
        ]
        line = Line([x for x, _ in found], [y for _, y in found], style="o-")
        plots.append((f"Evaluation: {metric}", html.plot([line], "images seen", metric)))
    return plots


def spans_decades(rows: list[dict[str, Any]], key: str) -> bool:
    """Whether a logarithmic axis can show this number, and has more than one label to show it by."""
    values = [r[key] for r in rows if key in r]
    return bool(values) and 0 < 10 * min(values) < max(values)


def headline(run: Path) -> str:
    """Where the run is, in one line."""
    rows = records(run)
    if not rows:
        return html.note("waiting for the first line of log.jsonl")
    last = rows[-1]
    speed = f" · {last['images_per_second']:,.0f} images/s" if "images_per_second" in last else ""
    return html.note(
        f"{last['images']:,} images seen · loss {last.get('loss', float('nan')):.4g}{speed}"
    )


def sheet(run: Path, which: int) -> str:
    """Sample grid number `which`, clamped to those there are."""
    found = grids(run)
    if not found:
        return html.empty("No sample grid yet; the run writes one at each milestone.")
    path = found[min(max(which, 0), len(found) - 1)]
    words = f"after {int(path.stem):,} images"
    with Pillow.open(path) as picture:
        picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
        data = html.png(picture)
    return f'<div class="mz-sheet">{html.figure(html.Figure(data, words))}</div>'


def watch_tab(studio: Studio, tab: Any) -> None:
    """The whole tab, with its events; `tab` starts the refreshing when it is opened."""
    import gradio as gr

    if not studio.runs:
        gr.HTML(
            html.empty("No run was given. Start with: mezzotint serve runs/NAME"),
            apply_default_css=False,
        )
        return
    names = list(studio.runs)
    name = gr.Dropdown(names, value=names[0], label="Run", interactive=True)
    status = gr.HTML(html.note(""), apply_default_css=False, elem_id="watch-status")
    drawn = gr.HTML("", apply_default_css=False, elem_id="curves")
    gr.HTML("<h3>Samples over time</h3>", apply_default_css=False)
    which = gr.Slider(0, 1, value=0, step=1, label="Milestone", elem_id="milestone")
    picture = gr.HTML("", apply_default_css=False, elem_id="sheet")
    seen = gr.State(None)
    timer = gr.Timer(REFRESH_SECONDS, active=False)

    def refresh(chosen: Any, position: Any, before: Any) -> tuple[Any, ...]:
        run = studio.run(chosen)
        now = (chosen, *stamp(run))
        if now == before:
            return (gr.skip(),) * 5
        last = max(len(grids(run)) - 1, 0)
        # Whoever looks at the newest grid, or at another run so far, goes on to the newest.
        follow = before is None or before[0] != chosen or position >= before[2] - 1
        shown = last if follow else int(position)
        slider = gr.Slider(maximum=max(last, 1), value=shown, interactive=last > 0)
        return headline(run), curves(run, now[1]), slider, sheet(run, shown), now

    outputs = [status, drawn, which, picture, seen]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for event in (timer.tick, name.change, tab.select):
        event(refresh, [name, which, seen], outputs, **quiet)
    tab.select(lambda: gr.Timer(active=True), None, timer, **quiet)

    def turned(chosen: Any, position: Any) -> str:
        return sheet(studio.run(chosen), int(position or 0))

    which.input(turned, [name, which], picture, trigger_mode="always_last", **quiet)
