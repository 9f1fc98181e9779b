"""The page: its tabs, its theme, and the server on 127.0.0.1."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezzotint.core.console import echo
from mezzotint.web import compare_tab, generate_tab, understand_tab, watch_tab
from mezzotint.web.studio import Studio, open_studio

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


class BlockFileRoutes:
    """Starlette middleware that closes Gradio's file routes, which no component here uses."""

    blocked = tuple(
        f"/gradio_api/{name}" for name in ("upload", "file", "proxy", "stream", "deep_link")
    )

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 404 on the blocked routes and pass everything else on."""
        if scope["type"] != "http" or not scope["path"].startswith((*self.blocked, "/file")):
            return await self.app(scope, receive, send)
        await send(
            {
                "type": "http.response.start",
                "status": 404,
                "headers": [(b"content-type", b"text/plain")],
            }
        )
        await send({"type": "http.response.body", "body": b"this page serves no files"})


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
    return page.queue(max_size=studio.limits.queue_length, default_concurrency_limit=2)


def launch(studio: Studio, port: int | None, auth: str = "", block: bool = True) -> Any:
    """Serve the page on 127.0.0.1 only, and return it.

    Args:
        port: None takes a free one from 7860 upwards.
        auth: "user:password", or empty for none.
        block: return only when the server ends.

    Errors: ValueError for an `auth` without a colon; OSError for a port in use.
    """
    name, _, password = auth.partition(":")
    if auth and not (name and password):
        raise ValueError("auth must be user:password")
    page = build_page(studio)
    from starlette.middleware import Middleware  # comes with gradio

    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        auth=(name, password) if auth else None,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        prevent_thread_lock=not block,
        quiet=True,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(BlockFileRoutes)]},
        max_file_size=studio.limits.photo_bytes,
        state_session_capacity=studio.limits.visitors,
        **make_theme(),
    )
    return page


def serve(sources: Sequence[str], port: int | None = None, auth: str = "") -> None:
    """Open the runs and models, print the page's address, and serve until interrupted."""
    import_gradio()
    studio = open_studio(sources)
    page = launch(studio, port, auth, block=False)
    models, runs = (", ".join(names) or "none" for names in (studio.models, studio.runs))
    echo(f"studio: {page.local_url}  (models: {models}; runs: {runs})")
    page.block_thread()
