"""The Compare tab: two models, or one under two settings, on the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mezzotint.web import handlers, html
from mezzotint.web.generate_tab import (
    cancel_on_click,
    gallery,
    keep_if_none,
    model_and_class,
    network_event,
    sampler_fields,
    use_seed_on_click,
)
from mezzotint.web.request import Request
from mezzotint.web.studio import Studio

WAITING = "The same seeds from both sides will stand here, column by column."


def compare_tab(studio: Studio) -> None:
    """The whole tab, with its events."""
    import gradio as gr

    names = list(studio.models)
    sides: list[dict[str, Any]] = []
    with gr.Row():
        for i, name in enumerate("AB"):
            with gr.Column(min_width=280):
                fields = model_and_class(studio, names, i, f"Model {name}")
                fields |= sampler_fields(studio)
                if i == 1 and len(names) < 2:
                    fields["steps"].value = 8  # one model: compare few steps with many
                sides.append(fields)
    seeds = gr.Textbox("0-3", label="Seeds of both", info="3, or 0-7, or 1, 5, 9")
    with gr.Row():
        start = gr.Button("Compare", variant="primary", elem_id="compare", min_width=140, scale=2)
        stop = gr.Button("Stop", min_width=90)
    status = gr.HTML(html.note(""), apply_default_css=False, elem_id="compare-status")
    pictures = gallery(html.empty(WAITING), elem_id="pairs")

    def run(values: dict[Any, Any]) -> Iterator[handlers.Step]:
        wishes = [
            Request(seeds=values[seeds], **{k: values[c] for k, c in fields.items()})
            for fields in sides
        ]
        yield from keep_if_none(
            handlers.report_errors(handlers.comparison(studio, wishes[0], wishes[1]))
        )

    event = start.click(
        run, {seeds, *(c for f in sides for c in f.values())}, [pictures, status], **network_event()
    )
    use_seed_on_click([pictures], seeds)
    cancel_on_click(stop, [event], status)
