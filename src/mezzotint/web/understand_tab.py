"""The Understand tab: noise and image size, layers, DiMR's branches, DiffiT's attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mezzotint.models import presets
from mezzotint.web import handlers, html, internals, noise_demo
from mezzotint.web.generate_tab import QUIET, keep_if_none, network_event
from mezzotint.web.request import parse_integer, parse_number, parse_text
from mezzotint.web.studio import Studio

# The browser crops the photo to a square of at most 512 pixels and sends only that, as a data URI.
PHOTO_HTML = """<div class="mz-drop">${value ? `<img src="${value}" alt="your photo">` : ''}
<span><label for="photo-file">Choose your own photo</label>
<input id="photo-file" type="file" accept="image/png,image/jpeg,image/webp">
<br><small>It is not stored. Without a photo, built-in shapes are shown.</small></span></div>"""
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
    props.value = 'data:image/broken;base64,' + btoa('not an image');
  }
  trigger('change');
});
"""


def understand_tab(studio: Studio) -> None:
    """Add the tab's components and events, one inner tab a question."""
    import gradio as gr

    with gr.Tabs():
        with gr.Tab("Noise and size"):
            add_noise_part(studio)
        with gr.Tab("The network"):
            add_network_part()
        with gr.Tab("DiMR's branches"):
            add_branch_part(studio)
        with gr.Tab("DiffiT's attention"):
            add_attention_part(studio)


def add_noise_part(studio: Studio) -> None:
    """Add the photo under schedules and shifts."""
    import gradio as gr

    default = noise_demo.builtin_photo()
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
                info="position on the schedule: 0 clean, 1 noise",
            )
            reference = gr.Radio([32, 64, 128], value=64, label="Shift to (reference side, pixels)")
            others = gr.CheckboxGroup(
                list(noise_demo.OTHER_SCHEDULES), value=[], label="Other schedules in the plot"
            )
            plot = gr.HTML(noise_demo.plot_schedules(0.5, 64, []), apply_default_css=False)
        with gr.Column(scale=3, min_width=300):
            sizes = gr.HTML(
                noise_demo.render_sizes(default, 0.5, 64),
                apply_default_css=False,
                elem_id="noised",
            )
    side = gr.Radio(list(noise_demo.SIDES), value=64, label="Log-SNR by eye, at (pixels)")
    strip = gr.HTML(noise_demo.render_levels(default, 64), apply_default_css=False)

    def show_sizes(uri: Any, u: Any, reference: Any) -> str:
        try:
            image = noise_demo.decode_photo(parse_photo(uri), studio.limits)
            return noise_demo.render_sizes(image, parse_u(u), parse_reference(reference))
        except ValueError as error:
            return html.problem(str(error))

    def show_levels(uri: Any, side: Any) -> str:
        try:
            number = parse_integer("side", side, 1, max(noise_demo.SIDES))
            if number not in noise_demo.SIDES:
                raise ValueError(f"choose one of {noise_demo.SIDES}")
            image = noise_demo.decode_photo(parse_photo(uri), studio.limits)
            return noise_demo.render_levels(image, number)
        except ValueError as error:
            return html.problem(str(error))

    def show_plot(u: Any, reference: Any, names: Any) -> str:
        try:
            chosen = [name for name in noise_demo.OTHER_SCHEDULES if name in (names or ())]
            return noise_demo.plot_schedules(parse_u(u), parse_reference(reference), chosen)
        except (ValueError, TypeError):
            return html.problem("u, the reference side and the schedules are those of the page")

    latest: dict[str, Any] = {"trigger_mode": "always_last", **QUIET}
    inputs = [photo, u, reference]
    gr.on([component.change for component in inputs], show_sizes, inputs, sizes, **latest)
    inputs = [photo, side]
    gr.on([component.change for component in inputs], show_levels, inputs, strip, **latest)
    inputs = [u, reference, others]
    gr.on([component.change for component in inputs], show_plot, inputs, plot, **latest)


def parse_photo(value: Any) -> str:
    """Return the data URI of the photo field, empty for no photo."""
    if value is not None and not isinstance(value, str):
        raise ValueError("send the bytes of an image; paths and web addresses are not opened")
    return value or ""


def parse_u(value: Any) -> float:
    """Return the time on a schedule from its field."""
    return parse_number("u", value, 0, 1)


def parse_reference(value: Any) -> int:
    """Return the reference side of the shift, in pixels, from its field."""
    return parse_integer("reference side", value, 1, 4096)


def add_network_part() -> None:
    """Add the table of a preset's layers."""
    import gradio as gr

    default = "unet-tiny"
    preset = gr.Dropdown(presets(), value=default, label="Preset", interactive=True)
    table = gr.HTML(internals.network_table(default), apply_default_css=False, elem_id="network")

    def show_table(name: Any) -> str:
        try:
            return internals.network_table(parse_text("preset", name, 80))
        except ValueError as error:
            return html.problem(str(error))

    preset.change(show_table, preset, table, show_progress="minimal", api_visibility="private")


def single_fields(names: list[str]) -> list[Any]:
    """Return the fields of model, seed and steps."""
    import gradio as gr

    with gr.Row():
        model = gr.Dropdown(names, value=names[0], label="Model", interactive=True, min_width=160)
        seed = gr.Number(0, label="Seed", precision=0, min_width=90)
        steps = gr.Slider(2, 50, value=10, step=1, label="Steps", min_width=180)
    return [model, seed, steps]


def add_branch_part(studio: Studio) -> None:
    """Add DiMR's branches at every step."""
    import gradio as gr

    names = studio.models_of("dimr")
    if not names:
        text = "No DiMR model was given. Start with one, e.g.: mezzotint serve runs/dimr-tiny"
        gr.HTML(html.empty(text), apply_default_css=False)
        return
    inputs = single_fields(names)
    start = gr.Button("Show the branches", variant="primary", elem_id="branches-start")
    status = gr.HTML(html.note(""), apply_default_css=False)
    images = gr.HTML("", apply_default_css=False, elem_id="branches")

    def run(*values: Any) -> Iterator[handlers.Step]:
        steps = internals.branches(studio, *values)
        yield from keep_if_none(handlers.report_errors(steps))

    start.click(run, inputs, [images, status], **network_event())


def add_attention_part(studio: Studio) -> None:
    """Add DiffiT's attention at every step."""
    import gradio as gr

    names = studio.models_of("diffit", "diffit_image")
    if not names:
        text = "No DiffiT model was given. Start with one, e.g.: mezzotint serve runs/diffit-tiny"
        gr.HTML(html.empty(text), apply_default_css=False)
        return
    inputs = single_fields(names)
    with gr.Row():
        layer = gr.Number(1, label="Layer", precision=0, minimum=1, min_width=90)
        row = gr.Slider(0, 1, value=0.5, step=0.05, label="Token: top to bottom", min_width=160)
        column = gr.Slider(0, 1, value=0.5, step=0.05, label="left to right", min_width=160)
    start = gr.Button("Show its attention", variant="primary", elem_id="attention-start")
    status = gr.HTML(html.note(""), apply_default_css=False)
    images = gr.HTML("", apply_default_css=False, elem_id="attention")

    def run(*values: Any) -> Iterator[handlers.Step]:
        steps = internals.attention(studio, *values)
        yield from keep_if_none(handlers.report_errors(steps))

    start.click(run, [*inputs, layer, row, column], [images, status], **network_event())
