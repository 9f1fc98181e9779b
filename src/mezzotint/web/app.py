"""The page: its tabs, its theme, and the server on 127.0.0.1."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mezzotint.core.boxed import boxed_models
from mezzotint.core.console import echo
from mezzotint.web import compare_tab, generate_tab, guard, understand_tab, watch_tab
from mezzotint.web.studio import Studio, open_studio

HOST, FIRST_PORT = "127.0.0.1", 7860
COPPER = (
    "#fdf5f0",
    "#fae6db",
    "#f3c9b3",
    "#eaa683",
    "#dc8557",
    "#c8693c",
    "#b0562d",
    "#8f4424",
    "#71371f",
    "#5b2e1c",
    "#341810",
)
SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
MONOSPACE = ("ui-monospace", "Menlo", "Consolas", "monospace")


def import_gradio() -> Any:
    """Return the gradio module with telemetry and history off; ValueError if it is absent."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("the studio needs gradio: pip install mezzotint[web]") from error
    return gr


def make_theme() -> dict[str, Any]:
    """Return theme and style sheet as options of `launch`; fonts are the system's own."""
    gr = import_gradio()
    copper = gr.themes.Color(*COPPER, name="copper")
    theme = gr.themes.Base(
        primary_hue=copper,
        secondary_hue=copper,
        neutral_hue="stone",
        radius_size="md",
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONOSPACE],
    ).set(button_primary_text_color="white", button_primary_background_fill="*primary_600")
    # Gradio rewrites its css option and drops media queries, so the style sheet goes in the head.
    css = (Path(__file__).parent / "studio.css").read_text()
    return {"theme": theme, "head": f"<style>{css}</style>"}


def build_page(studio: Studio) -> Any:
    """Return the page as Gradio blocks."""
    gr = import_gradio()
    with gr.Blocks(
        title="mezzotint studio",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, 3600),
    ) as page:
        gr.HTML(
            '<header class="mz-head"><h1>mezzotint studio</h1>'
            "<span>sample, watch and understand diffusion models</span></header>",
            apply_default_css=False,
        )
        with gr.Tabs():
            with gr.Tab("Generate"):
                generate_tab.generate_tab(studio)
            with gr.Tab("Watch") as watch:
                watch_tab.watch_tab(studio, watch)
            with gr.Tab("Understand"):
                understand_tab.understand_tab(studio)
            with gr.Tab("Compare"):
                compare_tab.compare_tab(studio)
    # Gradio's own check of a number ends in a TypeError for another type; `web.request` says a
    # sentence and knows the bounds.
    for block in page.blocks.values():
        if isinstance(block, gr.Number | gr.Slider):
            block.preprocess = lambda payload: payload
    return page.queue(max_size=studio.limits.queue_length, default_concurrency_limit=2)


def make_app(studio: Studio, credentials: guard.Credentials | None = None) -> Any:
    """Return the page as an ASGI application behind `guard.Guard`.

    Args:
        credentials: what visitors must give; None lets everyone in.
    """
    gr = import_gradio()
    from fastapi import FastAPI  # comes with gradio
    from starlette.middleware import Middleware

    # Around Gradio's own application, so that the guard is the first to see a request.
    limits: Any = {"credentials": credentials, "body_bytes": studio.limits.body_bytes}
    app = FastAPI(openapi_url=None, middleware=[Middleware(guard.Guard, **limits)])
    page = build_page(studio)
    page.state_session_capacity = studio.limits.visitors
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=HOST,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size=studio.limits.photo_bytes,
        **make_theme(),
    )


def open_socket(port: int | None) -> socket.socket:
    """Return a socket that listens on 127.0.0.1.

    Args:
        port: None takes the first free one from 7860 upwards.

    Errors: OSError for a port in use, or one that this user may not open.
    """
    ports = [port] if port is not None else range(FIRST_PORT, FIRST_PORT + 100)
    for candidate in ports:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, candidate))
            listening.listen(128)
            return listening
        except OSError as error:
            listening.close()
            if error.errno != errno.EADDRINUSE:
                raise OSError(
                    f"port {candidate} cannot be opened: {error.strerror}; give another one with "
                    "--port, 1024 or above"
                ) from None
    taken = f"port {port} is" if port is not None else f"ports {FIRST_PORT} and 99 more are"
    raise OSError(f"{taken} in use; give another one with --port")


def serve(sources: Sequence[str], port: int | None = None, auth: str = "") -> None:
    """Open the runs and models, print the page's address, and serve until interrupted.

    Args:
        sources: see `studio.open_studio`; the models in the box by default.
        port: see `open_socket`. auth: see `guard.read_credentials`.
    """
    import_gradio()
    import uvicorn  # comes with gradio

    credentials = guard.read_credentials(auth)
    studio = open_studio(sources or boxed_models())
    with open_socket(port) as listening:
        app = make_app(studio, credentials)
        models, runs = (", ".join(names) or "none" for names in (studio.models, studio.runs))
        url = f"http://{HOST}:{listening.getsockname()[1]}"
        echo(f"studio: {url}  (models: {models}; runs: {runs})")
        # A browser keeps a request open for as long as its page is shown.
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listening])
