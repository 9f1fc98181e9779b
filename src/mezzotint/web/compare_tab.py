"""The Compare tab: two models, or one under two settings, on the same seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mezzotint.web import handlers, html
from mezzotint.web.generate_tab import (
    cancel_on_click,
    follow_tuned,
    gallery,
    guidance_fields,
    keep_if_none,
    model_fields,
    network_event,
    sampler_fields,
    use_seed_on_click,
)
from mezzotint.web.request import Request, form_defaults
from mezzotint.web.studio import Studio

PLACEHOLDER = "Press Compare to see the same seeds from both sides."


def compare_tab(studio: Studio) -> None:
    """Add the tab's components and events."""
    import gradio as gr

    names = list(studio.models)
    sides: list[dict[str, Any]] = []
    with gr.Row():
        for i, name in enumerate("AB"):
            with gr.Column(min_width=280):
                fields = model_fields(studio, names, i, f"Model {name}")
                start = form_defaults(studio, names[min(i, len(names) - 1)] if names else None)
                fields |= sampler_fields(studio, start)
                if i == 1 and len(names) < 2:
                    fields["steps"].value = 8  # one model: compare few steps with many
                with gr.Accordion("Guidance curve", open=False):
                    fields |= guidance_fields(start)
                follow_tuned(studio, fields)
                sides.append(fields)
    seeds = gr.Textbox("0-3", label="Seeds of both", info="3, or 0-7, or 1, 5, 9")
    with gr.Row():
        press = gr.Button("Compare", variant="primary", elem_id="compare", min_width=140, scale=2)
        stop = gr.Button("Stop", min_width=90)
    status = gr.HTML(html.note(""), apply_default_css=False, elem_id="compare-status")
    images = gallery(html.empty(PLACEHOLDER), elem_id="pairs")

    def run(values: dict[Any, Any]) -> Iterator[handlers.Step]:
        left, right = (
            Request(seeds=values[seeds], **{name: values[c] for name, c in fields.items()})
            for fields in sides
        )
        yield from keep_if_none(handlers.report_errors(handlers.comparison(studio, left, right)))

    inputs = {seeds, *(component for fields in sides for component in fields.values())}
    event = press.click(run, inputs, [images, status], **network_event())
    use_seed_on_click([images], seeds)
    cancel_on_click(stop, [event], status)
