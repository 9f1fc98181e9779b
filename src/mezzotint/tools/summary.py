"""Parameters, multiply-accumulates and activation memory of every preset, and the paper's claims.

The counts ship with the package in `summary.json`, so that reading them imports neither PyTorch nor
a network. `python -m mezzotint.tools.summary` writes that file; run it after adding or changing a
preset. Counted is one forward pass of one image (or latent) at the native size, attention products
included. The papers' "FLOPs" are multiply-accumulates; so is `gmac`, in units of 1e9. It includes
work of the published network that has no effect and that our forward pass leaves out.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

SUMMARY = Path(__file__).with_name("summary.json")


@cache
def _counts() -> dict[str, Any]:
    return json.loads(SUMMARY.read_text(encoding="utf-8"))


@cache
def _counts_of(preset: str) -> dict[str, Any]:
    if preset in _counts():
        return _counts()[preset]
    # A preset added after the file was written is counted now. Counting needs PyTorch.
    from mezzotint.tools.count import count

    return count(preset)


def read_summaries() -> list[dict[str, Any]]:
    """Return one row per preset, see `read_summary`."""
    return [read_summary(name) for name in _counts()]


def read_summary(preset: str) -> dict[str, Any]:
    """Return a preset's counts and claims, JSON-ready.

    Returns:
        name, backbone; params (all, frozen ones included), gmac (of one forward pass of one input),
        gmac_attention (its part in the two products of attention), gmac_skipped (its part without
        effect, which we do not compute), input_shape [channels, height, width], codec, paper;
        params_claimed, gmac_claimed, fid_claimed as the paper prints them, or None; protocol
        behind the FID; note: why counts and claims differ.

    Errors: ValueError for an unknown preset, listing near names.
    """
    return {key: value for key, value in _counts_of(preset).items() if key != "layers"}


def read_layers(preset: str) -> list[dict[str, Any]]:
    """Return a preset's layers in order of execution, equal ones at one resolution merged.

    Returns:
        JSON-ready rows of name ("blocks.0...27"), module (class), count, resolution ("16x16", ""
        without one), output (shape of each without the batch), params, gmac and activation_bytes of
        all `count` together. activation_bytes is what autograd keeps for the backward pass of one
        image in float32, without checkpointing and with attention matrices (a fused kernel keeps
        none), each tensor once, where it is first kept. The last row, named "(itself)", is what the
        network computes and owns outside its layers.

    Errors: ValueError for an unknown preset, listing near names.
    """
    return _counts_of(preset)["layers"]


def format_count(number: float) -> str:
    """Return a number in millions or billions with three decimals, as papers print parameters."""
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.3f} M"


def render_presets(rows: list[dict[str, Any]]) -> RenderableType:
    """Lay out `read_summaries()` for a terminal, with notes on why counts and claims differ."""
    grid = Table(title="presets: counted, and as the paper prints it", title_justify="left")
    for column in ("preset", "input"):
        grid.add_column(column, no_wrap=True)
    for column in ("params", "claimed", "GMAC", "claimed", "FID claimed"):
        grid.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        shape = "x".join(map(str, r["input_shape"]))
        claims = [r[key] or "" for key in ("params_claimed", "gmac_claimed", "fid_claimed")]
        params, gmac = format_count(r["params"]), f"{r['gmac']:.3f}"
        grid.add_row(r["name"], shape, params, claims[0], gmac, *claims[1:])
    notes = [f"{r['name']}: {r['note']}" for r in rows if r["note"]]
    return Group(
        grid,
        *notes,
        "GMAC: 1e9 multiply-accumulates of one forward pass of one input, attention included.",
    )


def render_boxed(rows: list[dict[str, Any]]) -> RenderableType:
    """Lay out `core.boxed.read_boxed()` of some models for a terminal."""
    lines = [
        f"{r['name']}: {r['network']}, {r['input']}, {r['megabytes']:.1f} MB; {r['data']}; "
        f"licence {r['licence']}; {r['images']:,} training images; {r['distance']}\n"
        f"  card: {r['card']}"
        for r in rows
    ]
    title = f"trained models in the box, e.g. mezzotint sample {rows[0]['name']}"
    return Group(title, *lines)


def render_layers(preset: str, rows: list[dict[str, Any]]) -> RenderableType:
    """Lay out `read_layers(preset)` for a terminal, one section per resolution."""
    title = f"{preset}: layers in order of execution"
    grid = Table(title=title, title_justify="left", show_footer=True)
    total = {key: sum(r[key] for r in rows) for key in ("params", "gmac", "activation_bytes")}
    grid.add_column("resolution", "total", no_wrap=True)
    grid.add_column("layer")
    grid.add_column("output", no_wrap=True)
    for column, footer in (
        ("params", format_count(total["params"])),
        ("GMAC", f"{total['gmac']:.3f}"),
        ("activations", f"{total['activation_bytes'] / 2**20:.1f} MiB"),
    ):
        grid.add_column(column, footer, justify="right", no_wrap=True)
    for _, run in groupby(rows, key=lambda r: r["resolution"]):
        for r in run:
            layer = f"{r['count']} x {r['module']}  {r['name']}" if r["module"] else r["name"]
            memory = f"{r['activation_bytes'] / 2**20:.1f} MiB"
            shape = "x".join(map(str, r["output"]))
            params, gmac = format_count(r["params"]), f"{r['gmac']:.3f}"
            grid.add_row(r["resolution"], layer, shape, params, gmac, memory)
        grid.add_section()
    return Group(
        grid,
        "activations: kept for the backward pass of one image in float32, "
        "attention matrices included",
    )


def write_summary(path: Path = SUMMARY) -> None:
    """Count every preset and write its row and its layers, one preset a line; takes a minute."""
    from mezzotint.backbones import presets
    from mezzotint.core.files import atomic_open
    from mezzotint.core.progress import track
    from mezzotint.tools.count import count

    names = list(presets())
    lines = [
        f"{json.dumps(name)}: {json.dumps(count(name))}"
        for name in track(names, "counting", len(names), unit="presets")
    ]
    with atomic_open(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


if __name__ == "__main__":
    write_summary()
