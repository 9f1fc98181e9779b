"""The Watch tab: a run's curves and sample grids, read again every two seconds while it trains."""

from __future__ import annotations

import functools
from html import escape
from pathlib import Path
from typing import Any

from mezzotint.core.json_values import first_line
from mezzotint.core.svg_plot import COLOURS, svg_plot
from mezzotint.data.decode import open_image_file
from mezzotint.train import log
from mezzotint.train.report import (
    DAMAGED,
    evaluation_plots,
    find_grids,
    line_over_images,
    training_plots,
)
from mezzotint.web import html
from mezzotint.web.request import parse_integer
from mezzotint.web.studio import Studio

REFRESH_SECONDS = 2.0
GRID_SIDE = 1600  # pixels; larger sample grids are shrunk


def run_version(run: Path) -> tuple[int, int]:
    """Return (bytes of the log, number of sample grids), which change whenever there is news."""
    path = run / "log.jsonl"
    return (path.stat().st_size if path.is_file() else 0, len(find_grids(run)))


@functools.lru_cache(maxsize=8)
def render_curves(run: Path, log_bytes: int) -> str:
    """Return the plots of a run; cached until `log_bytes`, the size of the log, changes."""
    records = log.read(run / "log.jsonl")
    if not records:
        return html.empty("This run has logged nothing yet. The curves appear with its first line.")
    bins = dict.fromkeys(name for record in records for name in record.get("loss_by_logsnr", ()))
    lines = [
        line_over_images(
            records, "loss_by_logsnr", name, name=name, colour=COLOURS[i % len(COLOURS)]
        )
        for i, name in enumerate(bins)
    ]
    plots = training_plots(records)
    plots.insert(1, ("Loss by log-SNR", svg_plot(lines, "images seen", "loss", log_y=True)))
    plots += evaluation_plots(log.read_evaluations(run / "log.jsonl"))
    sections = [f"<section><h3>{escape(title)}</h3>{svg}</section>" for title, svg in plots]
    return f'<div class="mz-plots">{"".join(sections)}</div>'


def render_progress(run: Path) -> str:
    """Return images seen, loss and speed as a status line."""
    records = log.read(run / "log.jsonl")
    if not records:
        return html.note("waiting for the first line of log.jsonl")
    last = records[-1]
    text = f"{last['images']:,} images seen · loss {last['loss']:.4g}"
    if "images_per_second" in last:
        text += f" · {last['images_per_second']:,.0f} images/s"
    return html.note(text)


def render_grid(run: Path, index: int) -> str:
    """Return one of the run's sample grids; `index` is clamped to those that exist."""
    paths = find_grids(run)
    if not paths:
        return html.empty("No sample grid yet. The run writes one at each milestone.")
    path = paths[min(max(index, 0), len(paths) - 1)]
    grid = open_image_file(path)
    grid.thumbnail((GRID_SIDE, GRID_SIDE))
    data = html.png(grid)
    figure = html.Figure(data, f"after {int(path.stem):,} images")
    return f'<div class="mz-sheet">{html.figure(figure)}</div>'


def describe_damage(run: Path, error: Exception) -> str:
    """Return the error message of a log or grid that no run has written."""
    return html.problem(
        f"{run.name}: its log or a grid holds values that no run writes "
        f"({type(error).__name__}: {first_line(error)}); remove the damaged line or file"
    )


def watch_tab(studio: Studio, tab: Any) -> None:
    """Add the tab's components and events; opening `tab` starts the refreshing."""
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
    curves = gr.HTML("", apply_default_css=False, elem_id="curves")
    gr.HTML("<h3>Samples over time</h3>", apply_default_css=False)
    milestone = gr.Slider(0, 1, value=0, step=1, label="Milestone", elem_id="milestone")
    grid = gr.HTML("", apply_default_css=False, elem_id="sheet")
    shown_version = gr.State(None)
    timer = gr.Timer(REFRESH_SECONDS, active=False)

    def refresh(name: Any, position: Any, shown: Any) -> tuple[Any, ...]:
        run, position = studio.run(name), parse_integer("milestone", position, 0, 10**9)
        version = (name, *run_version(run))
        if version == shown:
            return (gr.skip(),) * 5
        last = max(len(find_grids(run)) - 1, 0)
        # Follow the newest grid, unless the visitor moved the slider to an older one of this run.
        follow = shown is None or shown[0] != name or position >= shown[2] - 1
        index = last if follow else position
        slider = gr.Slider(maximum=max(last, 1), value=index, interactive=last > 0)
        try:
            progress, plots = render_progress(run), render_curves(run, version[1])
        except DAMAGED as error:
            progress, plots = describe_damage(run, error), ""
        return progress, plots, slider, show_grid(name, index), version

    def show_grid(name: Any, position: Any) -> str:
        run = studio.run(name)
        try:
            return render_grid(run, parse_integer("milestone", position, 0, 10**9))
        except DAMAGED as error:
            return describe_damage(run, error)

    outputs = [status, curves, milestone, grid, shown_version]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    for event in (timer.tick, name.change, tab.select):
        event(refresh, [name, milestone, shown_version], outputs, **quiet)
    tab.select(lambda: gr.Timer(active=True), None, timer, **quiet)
    milestone.input(show_grid, [name, milestone], grid, trigger_mode="always_last", **quiet)
