"""The Understand tab: noise and size, log-SNR, networks, DiMR's branches, DiffiT's attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mezzotint.models import presets
from mezzotint.web import handlers, html, internals, noise_demo
from mezzotint.web.generate_tab import keep_if_none, network_event
from mezzotint.web.request import parse_integer, parse_number
from mezzotint.web.studio import Studio

# The browser cuts the photo to a square of at most 512 pixels; only that travels, as text, and nothing is stored.
PHOTO_HTML = """<div class="mz-drop">${value ? `<img src="${value}" alt="your photo">` : ''}
<span><label for="photo-file">Choose a photo of your own</label>
<input id="photo-file" type="file" accept="image/png,image/jpeg,image/webp">
<br><small>It stays in this page; without one, a drawing is used.</small></span></div>"""
PHOTO_JS = """
element.addEventListener('change', async (event) => {
  const file = event.target.files && event.target.files[0];
  if (!file) return;
  try {
    const bitmap = await createImageBitmap(file);
    const side = Math.min(bitmap.width, bitmap.height), canvas = document.createElement('canvas');
    canvas.width = canvas.height = Math.min(side, 512);
    const context = canvas.getContext('2d');
    context.imageSmoothingQuality = 'high';
    context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side,
      0, 0, canvas.width, canvas.height);
    props.value = canvas.toDataURL('image/jpeg', 0.93);
  } catch (error) {
    props.value = 'data:image/broken;base64,' + btoa('no picture');
  }
  trigger('change');
});
"""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


def understand_tab(studio: Studio) -> None:
    """The whole tab: one part per question."""
    import gradio as gr

    with gr.Tabs():
        with gr.Tab("Noise and size"):
            noise_part(studio)
        with gr.Tab("The network"):
            network_part()
        with gr.Tab("DiMR's branches"):
            branch_part(studio)
        with gr.Tab("DiffiT's attention"):
            attention_part(studio)


def noise_part(studio: Studio) -> None:
    """The photo under schedules and shifts."""
    import gradio as gr

    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            photo = gr.HTML(
                "",
                html_template=PHOTO_HTML,
                js_on_load=PHOTO_JS,
                apply_default_css=False,
                elem_id="photo",
            )
            u = gr.Slider(
                0,
                1,
                value=0.5,
                step=0.01,
                label="u",
                info="how far along the schedule: 0 clean, 1 noise",
            )
            reference = gr.Radio([32, 64, 128], value=64, label="Shift to (reference side, pixels)")
            others = gr.CheckboxGroup(
                list(noise_demo.OTHERS), value=[], label="Other schedules in the plot"
            )
            drawn = gr.HTML(noise_demo.curves(0.5, 64, []), apply_default_css=False)
        with gr.Column(scale=3, min_width=300):
            shown = gr.HTML(
                noise_demo.sizes(noise_demo.own_picture(), 0.5, 64),
                apply_default_css=False,
                elem_id="noised",
            )
    side = gr.Radio(list(noise_demo.SIDES), value=64, label="Log-SNR by eye, at (pixels)")
    strip = gr.HTML(noise_demo.levels(noise_demo.own_picture(), 64), apply_default_css=False)

    def pictures(text: Any, at: Any, pixels: Any) -> str:
        try:
            image = noise_demo.photo_of(str(text or ""), studio.limits)
            return noise_demo.sizes(
                image, parse_number("u", at, 0, 1), parse_integer("reference side", pixels, 1, 4096)
            )
        except ValueError as error:
            return html.problem(str(error))

    def by_level(text: Any, pixels: Any) -> str:
        try:
            if pixels not in noise_demo.SIDES:
                raise ValueError(f"choose one of {noise_demo.SIDES}")
            return noise_demo.levels(noise_demo.photo_of(str(text or ""), studio.limits), pixels)
        except ValueError as error:
            return html.problem(str(error))

    def plotted(at: Any, pixels: Any, names: Any) -> str:
        return noise_demo.curves(
            parse_number("u", at, 0, 1),
            parse_integer("reference side", pixels, 1, 4096),
            list(names or []),
        )

    latest: dict[str, Any] = {"trigger_mode": "always_last", **QUIET}
    gr.on(
        [photo.change, u.change, reference.change], pictures, [photo, u, reference], shown, **latest
    )
    gr.on([photo.change, side.change], by_level, [photo, side], strip, **latest)
    gr.on(
        [u.change, reference.change, others.change],
        plotted,
        [u, reference, others],
        drawn,
        **latest,
    )


def network_part() -> None:
    """Presets as resolutions and channels."""
    import gradio as gr

    first = "unet-tiny"
    preset = gr.Dropdown(presets(), value=first, label="Preset", interactive=True)
    counted = gr.HTML(internals.network_table(first), apply_default_css=False, elem_id="network")

    def table(name: Any) -> str:
        try:
            return internals.network_table(str(name)[:80])
        except ValueError as error:
            return html.problem(str(error))

    preset.change(table, preset, counted, show_progress="minimal", api_visibility="private")


def chooser(names: list[str]) -> tuple[Any, Any, Any]:
    """Model, seed, steps."""
    import gradio as gr

    with gr.Row():
        model = gr.Dropdown(names, value=names[0], label="Model", interactive=True, min_width=160)
        seed = gr.Number(0, label="Seed", precision=0, min_width=90)
        steps = gr.Slider(2, 50, value=10, step=1, label="Steps", min_width=180)
    return model, seed, steps


def branch_part(studio: Studio) -> None:
    """DiMR's branches at every step."""
    import gradio as gr

    names = studio.of("dimr")
    if not names:
        words = "No DiMR model was given. Start with one, such as: mezzotint serve runs/dimr-tiny"
        gr.HTML(html.empty(words), apply_default_css=False)
        return
    inputs = chooser(names)
    start = gr.Button("Show the branches", variant="primary", elem_id="branches-start")
    status = gr.HTML(html.note(""), apply_default_css=False)
    shown = gr.HTML("", apply_default_css=False, elem_id="branches")

    def run(model: Any, seed: Any, steps: Any) -> Iterator[handlers.Step]:
        yield from keep_if_none(
            handlers.report_errors(internals.branches(studio, model, seed, steps))
        )

    start.click(run, list(inputs), [shown, status], **network_event())


def attention_part(studio: Studio) -> None:
    """DiffiT's attention over time."""
    import gradio as gr

    names = studio.of("diffit", "diffit_image")
    if not names:
        words = (
            "No DiffiT model was given. Start with one, such as: mezzotint serve runs/diffit-tiny"
        )
        gr.HTML(html.empty(words), apply_default_css=False)
        return
    inputs = chooser(names)
    with gr.Row():
        layer = gr.Number(1, label="Layer", precision=0, minimum=1, min_width=90)
        row = gr.Slider(0, 1, value=0.5, step=0.05, label="Token: top to bottom", min_width=160)
        column = gr.Slider(0, 1, value=0.5, step=0.05, label="left to right", min_width=160)
    start = gr.Button("Show its attention", variant="primary", elem_id="attention-start")
    status = gr.HTML(html.note(""), apply_default_css=False)
    shown = gr.HTML("", apply_default_css=False, elem_id="attention")

    def run(values: dict[Any, Any]) -> Iterator[handlers.Step]:
        model, seed, steps, which = (values[c] for c in (*inputs, layer))
        place = (values[row], values[column])
        yield from keep_if_none(
            handlers.report_errors(internals.attention(studio, model, seed, steps, which, place))
        )

    start.click(run, {*inputs, layer, row, column}, [shown, status], **network_event())
