"""The Generate tab, and the form fields it shares with the Compare tab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from mezzotint.core.svg_plot import Line, svg_plot
from mezzotint.models import get_schedule
from mezzotint.process import samplers
from mezzotint.sampling.sample import guidance_scale, make_logsnr_steps
from mezzotint.sampling.tuned import OPEN_END
from mezzotint.web import handlers, html
from mezzotint.web.request import (
    ALL_CLASSES,
    CURVES,
    NO_CLASS,
    Request,
    find_tuned_settings,
    form_defaults,
    make_job,
)
from mezzotint.web.studio import Studio

# A press on an image selects its seed; a press on PNG saves the image from the page.
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
PLACEHOLDER = "Press Generate. Each image appears here as noise and clears up while it is sampled."
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def gallery(value: str, **options: Any) -> Any:
    """Return an HTML component for images whose seeds can be selected."""
    import gradio as gr

    return gr.HTML(value, js_on_load=GALLERY_JS, apply_default_css=False, **options)


def label_choices(studio: Studio, name: Any) -> list[str]:
    """Return the class menu of a model. It lists at most 100 unnamed classes; type the others."""
    known = isinstance(name, str) and name in studio.models
    num_classes = studio.model(name).info.config.num_classes if known else 0
    if not num_classes:
        return [NO_CLASS]
    labels = studio.model(name).info.labels or ()
    unnamed = [str(i) for i in range(len(labels), num_classes)][:100]
    return [ALL_CLASSES, NO_CLASS, *labels, *unnamed]


def model_fields(
    studio: Studio, names: list[str], index: int = 0, title: str = "Model"
) -> dict[str, Any]:
    """Return the fields of model, and of classes or prompts, whichever the model takes."""
    import gradio as gr

    first = names[min(index, len(names) - 1)] if names else None
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
    prompts = gr.Textbox(
        "",
        label="Prompts",
        info='one a line, used in turn by seed; or {"text": ..., "negative": ..., "guidance": 3}',
        placeholder="a red ring at the top left",
        lines=2,
        max_lines=6,
        max_length=studio.limits.prompt_chars,
        visible=studio.takes_prompts(first),
    )

    negative = gr.Textbox(
        "",
        label="Negative text",
        info="guide away from these words; needs guidance",
        max_length=studio.limits.prompt_chars,
        visible=studio.takes_prompts(first),
    )

    def show_fields(name: Any) -> tuple[Any, Any, Any]:
        choices = label_choices(studio, name)
        classes = gr.Dropdown(choices=choices, value=choices[0], visible=len(choices) > 1)
        if studio.takes_prompts(name):
            return classes, gr.Textbox(visible=True), gr.Textbox(visible=True)
        # Clear the prompts when hiding them: when showing, the first words typed could be lost.
        hidden = gr.Textbox(value="", visible=False)
        return classes, hidden, gr.Textbox(value="", visible=False)

    model.change(show_fields, model, [label, prompts, negative], **QUIET)
    return {"model": model, "label": label, "prompts": prompts, "negative": negative}


def sampler_fields(studio: Studio, start: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of sampler, steps and guidance; `start` is of `form_defaults`."""
    import gradio as gr

    names = list(samplers.registry)
    sampler = gr.Dropdown(names, value=start["sampler"], label="Sampler", interactive=True)
    steps = gr.Slider(1, studio.limits.steps, value=start["steps"], step=1, label="Steps")
    guidance = gr.Slider(
        0, 10, value=start["guidance"], step=0.05, label="Guidance",
        info="scale as DiT counts it; 1 is none",
    )  # fmt: skip
    return {"sampler": sampler, "steps": steps, "guidance": guidance}


def guidance_fields(start: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of how guidance varies with log-SNR; `start` is of `form_defaults`."""
    import gradio as gr

    fields: dict[str, Any] = {}
    with gr.Row():
        fields["curve"] = gr.Radio(
            list(CURVES), value=start["curve"], label="Guidance curve", min_width=180
        )
        fields["power"] = gr.Number(
            start["power"], label="Power", minimum=0.01, maximum=20, min_width=90
        )
    fields["limited"] = gr.Checkbox(start["limited"], label="only within an interval of log-SNR")
    with gr.Row():
        for name, label in (("low", "from (noisy)"), ("high", "to (clean)")):
            fields[name] = gr.Slider(
                -OPEN_END, OPEN_END, value=start[name], step=0.1, label=label, min_width=140
            )
    return fields


def follow_tuned(studio: Studio, fields: dict[str, Any]) -> None:
    """Where a model was tuned, set the sampling fields to the settings of the model chosen."""
    if not any(find_tuned_settings(studio, name) for name in studio.models):
        return
    names = list(form_defaults(studio, None))

    def show(name: Any) -> list[Any]:
        start = form_defaults(studio, name)
        return [start[field] for field in names]

    fields["model"].change(show, fields["model"], [fields[name] for name in names], **QUIET)


def plot_guidance(studio: Studio, request: Request) -> str:
    """Plot the guidance scale over log-SNR, with a mark at each sampling step."""
    try:
        job = make_job(studio, request)
        steps = make_logsnr_steps(job.model, job.settings)
        steps = steps[steps.isfinite()]
        x = torch.linspace(float(steps[0]), float(steps[-1]), 201, dtype=torch.float64)
        y = torch.ones_like(x)
        if job.settings.guidance is not None:
            y = guidance_scale(job.settings.guidance, get_schedule(job.model))(x)
    except ValueError as error:
        return html.note(str(error))
    line = Line(x.tolist(), y.tolist())
    return svg_plot(
        [line], "log-SNR (noise to clean)", "guidance", marks=steps.tolist(), size=(4.6, 1.9)
    )


def generate_tab(studio: Studio) -> None:
    """Add the tab's components and events."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            fields = model_fields(studio, list(studio.models))
            fields["seeds"] = gr.Textbox(
                "0-7", label="Seeds", info="3, or 0-7, or 1, 5, 9", elem_id="seeds"
            )
            start = form_defaults(studio, next(iter(studio.models), None))
            fields |= sampler_fields(studio, start)
            with gr.Row():
                press = gr.Button(
                    "Generate", variant="primary", elem_id="generate", min_width=140, scale=2
                )
                stop = gr.Button("Stop", elem_id="stop", min_width=90)
            with gr.Accordion("Guidance curve and size", open=False):
                fields |= guidance_fields(start)
                default = Request(model=next(iter(studio.models), ""), **start)
                plot = gr.HTML(
                    plot_guidance(studio, default), apply_default_css=False, elem_id="curve"
                )
                fields["size"] = gr.Textbox(
                    "",
                    label="Size",
                    placeholder="the model's own",
                    info="64, or 48x64, height first",
                )
        with gr.Column(scale=3, min_width=300):
            status = gr.HTML(html.note(""), apply_default_css=False, elem_id="status")
            images = gallery(html.empty(PLACEHOLDER), elem_id="pictures")
            earlier = gallery("", elem_id="earlier")
    history = gr.State([], time_to_live=3600)

    def run(values: dict[Any, Any]) -> Iterator[tuple[Any, ...]]:
        yield from generate_with_history(studio, read_form(fields, values), values[history])

    follow_tuned(studio, fields)
    outputs = [images, status, earlier, history]
    events: list[Any] = [
        press.click(run, {*fields.values(), history}, outputs, **network_event("generate"))
    ]
    events += add_strips(studio, fields, status)
    cancel_on_click(stop, events, status)
    use_seed_on_click([images, earlier], fields["seeds"])

    def draw(values: dict[Any, Any]) -> str:
        return plot_guidance(studio, read_form(fields, values))

    names = ("model", "prompts", "negative", "sampler", "steps", "guidance")
    names += ("curve", "power", "limited", "low", "high")
    changes = [fields[name].change for name in names]
    gr.on(changes, draw, set(fields.values()), plot, trigger_mode="always_last", **QUIET)


def read_form(fields: dict[str, Any], values: dict[Any, Any]) -> Request:
    """Return the request in a form's values."""
    return Request(**{name: values[component] for name, component in fields.items()})


def network_event(api_name: str | None = None) -> dict[str, Any]:
    """Return the options of an event that runs a network: one at a time for all visitors."""
    api: dict[str, Any] = {"api_name": api_name} if api_name else {"api_visibility": "private"}
    return {**api, "concurrency_limit": 1, "concurrency_id": "network", "show_progress": "hidden"}


def cancel_on_click(button: Any, events: list[Any], status: Any) -> None:
    """Make a button cancel these events, and show "stopped" when they have ended."""
    note = html.note("stopped")
    cancelled = button.click(None, cancels=events, queue=False, **QUIET)
    cancelled.then(lambda: note, None, status, queue=False, **QUIET)


def use_seed_on_click(galleries: list[Any], field: Any) -> None:
    """Make a press on an image write its seed into the field."""
    import gradio as gr

    def read_seed(event: Any) -> str:
        return str(event._data["seed"])[:20]

    read_seed.__annotations__["event"] = gr.EventData  # tells Gradio to pass the event
    for component in galleries:
        component.select(read_seed, None, field, queue=False, **QUIET)


def generate_with_history(
    studio: Studio, request: Request, history: list[str]
) -> Iterator[tuple[Any, ...]]:
    """Yield (images, status, earlier images, new history); the history is HTML, newest first."""
    import gradio as gr

    earlier = f'<h3>Earlier</h3><div class="mz-grid">{"".join(history)}</div>' if history else ""
    finished: list[str] = []

    def steps() -> Iterator[handlers.Step]:
        for figures, status, done in handlers.generate(studio, request):
            if done:
                finished.extend(html.figure(item) for item in figures)
            yield html.figures(figures), status

    for images, status in keep_if_none(handlers.report_errors(steps())):
        new = [*finished, *history][: studio.limits.earlier] if finished else gr.skip()
        yield images, status, earlier, new


def add_strips(studio: Studio, fields: dict[str, Any], status: Any) -> list[Any]:
    """Add the interpolation and variation strips, which use the form above; return their events."""
    import gradio as gr

    form = set(fields.values())
    with gr.Row(elem_classes="mz-stack"):
        with gr.Accordion("Between two seeds", open=False), gr.Row():
            first = gr.Number(0, label="First seed", precision=0, min_width=90)
            last = gr.Number(1, label="Second seed", precision=0, min_width=90)
            count = gr.Slider(
                2, studio.limits.images, value=7, step=1, label="Images", min_width=140
            )
            interpolate = gr.Button("Interpolate", elem_id="interpolate", min_width=120)
        with gr.Accordion("One seed, several settings", open=False), gr.Row():
            setting = gr.Radio(["guidance", "steps"], value="guidance", label="Vary", min_width=160)
            choices = gr.Textbox("1, 1.5, 2, 4", label="Values", min_width=120)
            seed = gr.Number(0, label="Seed", precision=0, min_width=80)
            vary = gr.Button("Vary", elem_id="vary", min_width=120)
    strip = gallery("", elem_id="strip")
    use_seed_on_click([strip], fields["seeds"])

    def run_interpolation(values: dict[Any, Any]) -> Iterator[handlers.Step]:
        arguments = [values[c] for c in (first, last, count)]
        steps = handlers.interpolation(studio, read_form(fields, values), *arguments)
        yield from keep_if_none(handlers.report_errors(steps))

    def run_variations(values: dict[Any, Any]) -> Iterator[handlers.Step]:
        arguments = [values[c] for c in (setting, choices, seed)]
        steps = handlers.variations(studio, read_form(fields, values), *arguments)
        yield from keep_if_none(handlers.report_errors(steps))

    outputs, options = [strip, status], network_event()
    return [
        interpolate.click(run_interpolation, {*form, first, last, count}, outputs, **options),
        vary.click(run_variations, {*form, setting, choices, seed}, outputs, **options),
    ]


def keep_if_none(steps: Iterator[handlers.Step]) -> Iterator[handlers.Step]:
    """Yield the steps for Gradio, which keeps the images shown where a step has none."""
    import gradio as gr

    for images, status in steps:
        yield gr.skip() if images is None else images, status
