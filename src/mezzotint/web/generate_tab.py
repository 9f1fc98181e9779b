"""The Generate tab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mezzotint.models import get_schedule
from mezzotint.process import samplers
from mezzotint.sampling.sample import guidance_scale, make_logsnr_steps
from mezzotint.web import handlers, html
from mezzotint.web.request import CURVES, IN_TURN, NO_CLASS, Request, make_job
from mezzotint.web.studio import Studio

# A press on a picture takes up its seed; a press on PNG saves the picture as it lies in the page.
GALLERY_JS = """
element.addEventListener('click', (event) => {
  const save = event.target.closest('[data-save]');
  if (save) {
    const link = document.createElement('a');
    link.href = save.closest('figure').querySelector('img').src;
    link.download = save.dataset.save;
    link.click();
    return;
  }
  const pick = event.target.closest('[data-seed]');
  if (pick) trigger('select', {seed: pick.dataset.seed});
});
"""
WAITING = (
    "Press Generate: each picture burnishes out of its own noise, and appears here while it does."
)


def gallery(value: str, **options: Any) -> Any:
    """An HTML component for pictures whose seeds can be taken up."""
    import gradio as gr

    return gr.HTML(value, js_on_load=GALLERY_JS, apply_default_css=False, **options)


def label_choices(studio: Studio, name: Any) -> list[str]:
    """What the class menu of a model offers; a long list of nameless classes is typed instead."""
    classes = studio.model(name).info.config.num_classes if name in studio.models else 0
    if not classes:
        return [NO_CLASS]
    labels = studio.model(name).info.labels or [str(i) for i in range(min(classes, 100))]
    return [IN_TURN, NO_CLASS, *labels]


def model_and_class(
    studio: Studio, names: list[str], chosen: int = 0, title: str = "Model"
) -> dict[str, Any]:
    """The model, and what to show: classes or prompts, whichever it knows."""
    import gradio as gr

    first = names[min(chosen, len(names) - 1)] if names else None
    model = gr.Dropdown(names, value=first, label=title, interactive=True)
    choices = label_choices(studio, first)
    label = gr.Dropdown(
        choices,
        value=choices[0],
        label="Class",
        info="a name, a number, or several with commas",
        allow_custom_value=True,
        visible=len(choices) > 1,
    )
    words = gr.Textbox(
        "",
        label="Prompts",
        info="one a line, taken in turn by seed",
        placeholder="a red ring at the top left",
        lines=2,
        max_lines=6,
        max_length=studio.limits.words,
        visible=studio.reads(first),
    )

    def follow(name: Any) -> tuple[Any, Any]:
        found = label_choices(studio, name)
        classes = gr.Dropdown(choices=found, value=found[0], visible=len(found) > 1)
        # Emptied when it goes, not when it comes: that could reach the page after the first words typed.
        return classes, gr.Textbox(visible=True) if studio.reads(name) else gr.Textbox(
            value="", visible=False
        )

    model.change(follow, model, [label, words], api_visibility="private", show_progress="hidden")
    return {"model": model, "label": label, "prompts": words}


def sampler_fields(studio: Studio) -> dict[str, Any]:
    """Steps, sampler and guidance."""
    import gradio as gr

    fields: dict[str, Any] = {}
    fields["sampler"] = gr.Dropdown(
        list(samplers.registry), value="ddim", label="Sampler", interactive=True
    )
    fields["steps"] = gr.Slider(1, studio.limits.steps, value=30, step=1, label="Steps")
    fields["guidance"] = gr.Slider(
        0, 10, value=1, step=0.1, label="Guidance", info="1 is none (as DiT counts it)"
    )
    return fields


def guidance_fields() -> dict[str, Any]:
    """How guidance runs along the log-SNR."""
    import gradio as gr

    fields: dict[str, Any] = {}
    with gr.Row():
        fields["curve"] = gr.Radio(
            list(CURVES), value="constant", label="Guidance curve", min_width=180
        )
        fields["power"] = gr.Number(4, label="Power", minimum=0.01, maximum=20, min_width=90)
    fields["limited"] = gr.Checkbox(False, label="only within an interval of log-SNR")
    with gr.Row():
        fields["low"] = gr.Slider(-20, 20, value=-3, step=0.5, label="from (noisy)", min_width=140)
        fields["high"] = gr.Slider(-20, 20, value=5, step=0.5, label="to (clean)", min_width=140)
    return fields


def guidance_plot(studio: Studio, wish: Request) -> str:
    """The guidance scale over log-SNR, with the sampler's stops."""
    try:
        job = make_job(studio, wish)
        stops = make_logsnr_steps(job.model, job.settings)
        stops = stops[stops.isfinite()]
        x = torch.linspace(float(stops[0]), float(stops[-1]), 201, dtype=torch.float64)
        guidance = job.settings.guidance
        y = (
            torch.ones_like(x)
            if guidance is None
            else guidance_scale(guidance, get_schedule(job.model))(x)
        )
        lines = [html.Line(x.tolist(), y.tolist())]
        return html.plot(
            lines, "log-SNR (noise to clean)", "guidance", marks=stops.tolist(), size=(4.6, 1.9)
        )
    except ValueError as error:
        return html.note(str(error))


def generate_tab(studio: Studio) -> None:
    """The whole tab, with its events."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            fields = model_and_class(studio, list(studio.models))
            fields["seeds"] = gr.Textbox(
                "0-7", label="Seeds", info="3, or 0-7, or 1, 5, 9", elem_id="seeds"
            )
            fields |= sampler_fields(studio)
            with gr.Row():
                start = gr.Button(
                    "Generate", variant="primary", elem_id="generate", min_width=140, scale=2
                )
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
            with gr.Accordion("Guidance curve and size", open=False):
                fields |= guidance_fields()
                drawn = gr.HTML(
                    guidance_plot(studio, initial(studio)), apply_default_css=False, elem_id="curve"
                )
                fields["size"] = gr.Textbox(
                    "",
                    label="Size",
                    placeholder="the model's own",
                    info="64, or 48x64, height first",
                )
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(html.note(""), apply_default_css=False, elem_id="status")
            pictures = gallery(html.empty(WAITING), elem_id="pictures")
            earlier = gallery("", elem_id="earlier")
    kept = gr.State([], time_to_live=3600)

    def run(values: dict[Any, Any]) -> Iterator[tuple[Any, ...]]:
        yield from collected(studio, request_from(fields, values), values[kept])

    events: list[Any] = [
        start.click(
            run,
            {*fields.values(), kept},
            [pictures, status, earlier, kept],
            **network_event("generate"),
        )
    ]
    events += extras(studio, fields, status)
    cancel_on_click(stop, events, status)
    use_seed_on_click([pictures, earlier], fields["seeds"])

    def draw(values: dict[Any, Any]) -> str:
        return guidance_plot(studio, request_from(fields, values))

    quiet: dict[str, Any] = {
        "show_progress": "hidden",
        "trigger_mode": "always_last",
        "api_visibility": "private",
    }
    shaping = ("model", "prompts", "steps", "guidance", "curve", "power", "limited", "low", "high")
    gr.on([fields[name].change for name in shaping], draw, set(fields.values()), drawn, **quiet)


def initial(studio: Studio) -> Request:
    """The form before anyone touched it."""
    return Request(model=next(iter(studio.models), ""), steps=30)


def request_from(fields: dict[str, Any], values: dict[Any, Any]) -> Request:
    """The wish in a form's values."""
    return Request(**{name: values[component] for name, component in fields.items()})


def network_event(api_name: str | None = None) -> dict[str, Any]:
    """Options of an event that runs a network: one at a time over the whole page."""
    shown: dict[str, Any] = {"api_name": api_name} if api_name else {"api_visibility": "private"}
    return {**shown, "concurrency_limit": 1, "concurrency_id": "network", "show_progress": "hidden"}


def cancel_on_click(button: Any, events: list[Any], status: Any) -> None:
    """Pressing the button cancels these events, and says so once it is done."""
    quiet: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    said = html.note("stopped")
    button.click(None, cancels=events, **quiet).then(lambda: said, None, status, **quiet)


def use_seed_on_click(places: list[Any], field: Any) -> None:
    """Pressing a picture in one of these galleries writes its seed into the field."""
    import gradio as gr

    def picked(event: Any) -> str:
        return str(event._data["seed"])[:20]

    picked.__annotations__["event"] = gr.EventData  # by which Gradio knows what to pass
    for place in places:
        place.select(
            picked, None, field, queue=False, api_visibility="private", show_progress="hidden"
        )


def collected(studio: Studio, wish: Request, kept: list[str]) -> Iterator[tuple[Any, ...]]:
    """Steps of (pictures, status, earlier pictures, all pictures kept of this visitor)."""
    import gradio as gr

    before = f'<h3>Earlier</h3><div class="mz-grid">{"".join(kept)}</div>' if kept else ""
    made: list[str] = []

    def steps() -> Iterator[handlers.Step]:
        for items, status, done in handlers.generate(studio, wish):
            if done:
                made.extend(html.figure(item) for item in items)
            yield html.figures(items), status

    for shown, status in handlers.report_errors(steps()):
        full = [*made, *kept][: studio.limits.earlier] if made else gr.skip()
        yield gr.skip() if shown is None else shown, status, before, full


def extras(studio: Studio, fields: dict[str, Any], status: Any) -> list[Any]:
    """Between two seeds, and one seed under several settings; both keep to the form above."""
    import gradio as gr

    inputs = set(fields.values())
    with gr.Row(elem_classes="mz-stack"):
        with gr.Accordion("Between two seeds", open=False), gr.Row():
            ends = [
                gr.Number(v, label=f"{word} seed", precision=0, min_width=90)
                for v, word in ((0, "First"), (1, "Second"))
            ]
            count = gr.Slider(
                2, studio.limits.pictures, value=7, step=1, label="Pictures", min_width=140
            )
            walk = gr.Button("Interpolate", elem_id="interpolate", min_width=120)
        with gr.Accordion("One seed, several settings", open=False), gr.Row():
            what = gr.Radio(["guidance", "steps"], value="guidance", label="Vary", min_width=160)
            values = gr.Textbox("1, 1.5, 2, 4", label="Values", min_width=120)
            seed = gr.Number(0, label="Seed", precision=0, min_width=80)
            vary = gr.Button("Vary", elem_id="vary", min_width=120)
    strip = gallery("", elem_id="strip")
    use_seed_on_click([strip], fields["seeds"])

    def walked(given: dict[Any, Any]) -> Iterator[handlers.Step]:
        asked = [given[c] for c in (*ends, count)]
        yield from keep_if_none(
            handlers.report_errors(
                handlers.interpolation(studio, request_from(fields, given), *asked)
            )
        )

    def turned(given: dict[Any, Any]) -> Iterator[handlers.Step]:
        asked = [given[c] for c in (what, values, seed)]
        yield from keep_if_none(
            handlers.report_errors(handlers.variations(studio, request_from(fields, given), *asked))
        )

    return [
        walk.click(walked, {*inputs, *ends, count}, [strip, status], **network_event()),
        vary.click(turned, {*inputs, what, values, seed}, [strip, status], **network_event()),
    ]


def keep_if_none(steps: Iterator[handlers.Step]) -> Iterator[handlers.Step]:
    """Steps for Gradio: no pictures means those that are there."""
    import gradio as gr

    for pictures, status in steps:
        yield gr.skip() if pictures is None else pictures, status
