"""One HTML page of a run, finished, under way or killed: curves, grids over time, events, recipe, environment.

The page fetches nothing: plots are inline SVG that takes the page's colours, pictures are data URIs. It follows the
reader's light or dark theme.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint import config
from mezzotint.backbones import dummy_condition
from mezzotint.config import Recipe
from mezzotint.core.distributed import World
from mezzotint.core.files import atomic_replace
from mezzotint.core.machine import describe_machine
from mezzotint.core.registry import build
from mezzotint.models import build_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Cond, Model
from mezzotint.process.schedules import slope
from mezzotint.train import environment as starting
from mezzotint.train import log

GRIDS = 12  # shown of a run, evenly over its length, the newest among them
LARGEST_PNG = 1 << 20  # bytes; larger grids are embedded as JPEG
DATA_STD = 0.5  # of pictures in [-1, 1], EDM's sigma_data; what the predict-nothing line assumes
INK = "#010203"  # stands for the page's own colour until the SVG is in the page
# After Okabe and Ito's palette, told apart by every eye, with lightness between both grounds.
BLUE, ORANGE, GREEN = "#1f87c7", "#d99500", "#009e73"


def write_report(run: Path, out: Path, difference: str = "") -> Path:
    """Write the page of a run folder.

    Args:
        run: folder with recipe.yaml; whatever else is there is shown.
        out: file to write, complete or not at all.
        difference: where the recipe differs from the paper's, in words.

    Errors: ValueError where the folder holds no run.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} has no recipe.yaml; give a run folder, e.g. runs/unet-tiny")
    text = page(run, difference)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_replace(out, lambda beside: beside.write_text(text))
    return out


def page(run: Path, difference: str) -> str:
    """The whole page as text."""
    recipe = config.from_yaml(run / "recipe.yaml")
    records, judged = read_lines(run / "log.jsonl"), read_evaluations(run / "log.jsonl")
    events = read_lines(run / "events.jsonl")
    name = html.escape(run.resolve().name)
    sections = [
        f"<h1>{name}</h1>",
        f"<p>{html.escape(status(run, recipe, records))}</p>",
        tiles(recipe, records),
        *(curves(recipe, records) if records else ["<p>No line is logged yet.</p>"]),
        *(evaluations(recipe, judged) if judged else []),
        grids(run),
        table(
            "Out of the ordinary",
            [[f"{e['images']:,}", *_event(e)] for e in events],
            ("images", "event", ""),
        ),
        "<h2>Recipe</h2>",
        f"<pre>{html.escape(difference)}</pre>" if difference else "",
        f"<details><summary>all of it</summary><pre>{html.escape(config.to_yaml(recipe))}</pre></details>",
        table("Environment", environment(run), ("", "")),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Whole records of a JSON-lines file of a run; none where there is no file."""
    return log.read(path) if path.is_file() else []


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """A log's whole records of evaluations; none where there is no file."""
    return log.read_evaluations(path) if path.is_file() else []


def _event(event: dict[str, Any]) -> tuple[str, str]:
    facts = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("images", "event"))
    return str(event.get("event", "")), facts


def status(run: Path, recipe: Recipe, records: list[dict[str, Any]]) -> str:
    """What the run is, how far it is, and when it last gave a sign."""
    seen = records[-1]["images"] if records else 0
    what = f"{recipe.preset} on {recipe.data.source or 'no data'}: {seen:,} of {recipe.images:,} images"
    if seen >= recipe.images:
        return f"{what}, finished."
    if not records:
        return f"{what}."
    last = time.strftime("%Y-%m-%d %H:%M", time.localtime((run / "log.jsonl").stat().st_mtime))
    return f"{what}; last line {last}. The same training command continues it."


def tiles(recipe: Recipe, records: list[dict[str, Any]]) -> str:
    """The latest numbers, large."""
    if not records:
        return ""
    last = records[-1]
    shown = {"loss": f"{last['loss']:.4g}", "gradient norm": f"{last['grad_norm']:.3g}"}
    if speed := last.get("images_per_second"):
        shown["images/s"] = f"{speed:,.4g}"
        if (left := recipe.images - last["images"]) > 0:
            shown["hours left"] = f"{left / speed / 3600:.3g}"
    for key, label in (("utilisation", "utilisation"), ("peak_memory_gib", "GiB at most")):
        if key in last:
            shown[label] = f"{last[key]:.3g}"
    boxes = [f"<div><b>{value}</b><span>{label}</span></div>" for label, value in shown.items()]
    return f'<section class="tiles">{"".join(boxes)}</section>'


def curves(recipe: Recipe, records: list[dict[str, Any]]) -> list[str]:
    """Loss over images, loss by log-SNR, gradient norm, speed."""
    images = [r["images"] for r in records]

    def over_images(key: str, colour: str, log_scale: bool) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            axes.plot(
                images,
                [r.get(key, math.nan) for r in records],
                color=colour,
                marker="." if len(images) < 3 else "",
            )
            axes.set_xlabel("images seen")
            if log_scale:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)

        return draw

    note = (
        "The dashed line is what a network loses that outputs zeros, where most begin, on pictures of standard "
        f"deviation {DATA_STD}. Where a curve touches it, nothing is learnt yet, or nothing can be."
    )
    plots = [
        ("loss", over_images("loss", BLUE, True), ""),
        ("loss by log-SNR", lambda axes: by_logsnr(axes, recipe, records), note),
        ("gradient norm, before clipping", over_images("grad_norm", ORANGE, True), ""),
        ("images per second", over_images("images_per_second", GREEN, False), ""),
    ]
    return ["<h2>Curves</h2>", figures(plots)]


def figures(plots: Sequence[tuple[str, Callable[[Any], None], str]]) -> str:
    """Plots side by side, each with its title and a note."""
    drawn = [
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg(draw, title)}<p>{text}</p></figure>"
        for title, draw, text in plots
    ]
    return f'<section class="plots">{"".join(drawn)}</section>'


def evaluations(recipe: Recipe, judged: list[dict[str, Any]]) -> list[str]:
    """A curve for each metric of the evaluations along the way."""

    def over_images(metric: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            found = [
                (r["images"], r["evaluation"][metric]) for r in judged if metric in r["evaluation"]
            ]
            axes.plot(*zip(*found, strict=True), color=BLUE, marker=".")
            axes.set_xlabel("images seen")

        return draw

    metrics = dict.fromkeys(metric for record in judged for metric in record["evaluation"])
    asked = recipe.evaluate
    how = (
        f"{asked.num_images:,} samples of the averaged weights, {asked.sampler}, {asked.steps} steps, against "
        f"{asked.reference}; the cards are in evaluations/."
    )
    plots = [(metric, over_images(metric), "") for metric in metrics]
    return ["<h2>Evaluations</h2>", f"<p>{html.escape(how)}</p>", figures(plots)]


def by_logsnr(axes: Any, recipe: Recipe, records: list[dict[str, Any]]) -> None:
    """Loss per bin of log-SNR, of up to four moments of the run, the latest darkest, and the line of zero outputs."""
    zero = predict_nothing(recipe)
    names = bin_names()
    chosen = sorted({round(i * (len(records) - 1) / 3) for i in range(4)})
    for rank, i in enumerate(chosen, start=1):
        losses = records[i]["loss_by_logsnr"]
        label = f"{records[i]['images']:,} images"
        values = [losses.get(n, math.nan) for n in names]
        axes.plot(
            names,
            values,
            color=BLUE,
            alpha=rank / len(chosen),
            marker="o",
            markersize=3,
            label=label,
        )
    axes.plot(
        names,
        [zero.get(n, math.nan) for n in names],
        color=INK,
        linestyle="--",
        linewidth=1,
        label="zeros",
    )
    axes.set_yscale("log")
    axes.set_xlabel("log-SNR, from noise to picture")
    axes.legend(frameon=False, labelcolor=INK, fontsize=8)


def bin_names() -> list[str]:
    """Names of the log's bins, from noise to picture."""
    centres = torch.cat([log.EDGES[:1] - 1, log.EDGES + 1])
    return list(_binned(torch.zeros(len(centres)), centres))


def _binned(losses: Tensor, logsnr: Tensor) -> dict[str, float]:
    """Mean loss per bin, as the log has it."""
    alone = World(0, 1, torch.device("cpu"))
    window = log.new_window(alone.device, parts=0)
    log.add(window, losses, logsnr, torch.zeros(1, dtype=torch.float64), alone)
    return log.summary(window, [], alone)["loss_by_logsnr"]


class Silent(nn.Module):
    """A backbone that answers zeros, in the shapes of a real one's outputs."""

    def __init__(self, real: nn.Module, config: Any):
        super().__init__()
        shape = (config.channels, config.size, config.size)
        self.dtype_of_inputs = nn.Parameter(torch.zeros(()))
        with torch.device("meta"), torch.no_grad():
            z = torch.empty(1, *shape)
            self.shapes = [o.shape[1:] for o in real(z, torch.empty(1), dummy_condition(config, z))]

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """Zeros, coarse to fine."""
        return [torch.zeros(len(z), *shape) for shape in self.shapes]


@torch.no_grad()
def predict_nothing(recipe: Recipe, levels: int = 256, batch: int = 16) -> dict[str, float]:
    """Loss per log-SNR bin of a network whose outputs are zero, by the recipe's own objective, schedule and measure.

    All backbones but DiMR's start there. Pictures are white, of standard deviation `DATA_STD`; where the objective
    compares noise alone, they do not matter.
    """
    card = preset_info(recipe.preset, **recipe.model)
    with torch.device("meta"):
        real = build_model(card)
    shape = (card.config.channels, card.config.size, card.config.size)
    model = Model(Silent(real.backbone, card.config), real.parameterisation, card)
    objective = build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, recipe.schedule or card.schedule)
    generator = torch.Generator().manual_seed(0)
    losses, noised = [], []
    for u in ((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).split(batch):
        x = DATA_STD * torch.randn(len(u), *shape, generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        logsnr = schedule(u)
        loss = objective(model, x, eps, logsnr.float(), dummy_condition(card.config, x))
        if recipe.time.loss_measure == "logsnr":
            with torch.enable_grad():
                loss = loss * (-slope(schedule, u) / 2).to(loss)
        losses.append(loss.detach())
        noised.append(logsnr)
    return _binned(torch.cat(losses), torch.cat(noised))


def svg(draw: Callable[[Any], None], title: str) -> str:
    """A plot as inline SVG whose ink is the page's text colour."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids of two plots in one page must differ
        "font.family": "sans-serif",
        **dict.fromkeys(
            ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK
        ),
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(alpha=0.2, color=INK)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def grids(run: Path) -> str:
    """The sample grids, newest first."""
    files = sorted((run / "samples").glob("*.png"), key=lambda p: p.name)
    if not files:
        return ""
    count = min(GRIDS, len(files))
    chosen = sorted(
        {round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)} | {len(files) - 1}
    )
    shown = [
        f'<figure><figcaption>{caption(files[i])}</figcaption><img alt="samples, {caption(files[i])}" '
        f'src="{data_uri(files[i])}"></figure>'
        for i in reversed(chosen)
    ]
    return f'<h2>Samples</h2><section class="grids">{"".join(shown)}</section>'


def caption(path: Path) -> str:
    """Images seen, of a grid's file name."""
    return f"{int(path.stem):,} images" if path.stem.isdigit() else html.escape(path.stem)


def data_uri(path: Path) -> str:
    """A picture as text; a large PNG becomes a JPEG."""
    from PIL import Image

    data, kind = path.read_bytes(), "png"
    if len(data) > LARGEST_PNG:
        file = io.BytesIO()
        with Image.open(path) as picture:
            picture.convert("RGB").save(file, "JPEG", quality=90)
        data, kind = file.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def environment(run: Path) -> list[list[str]]:
    """What the run was last started with, its newest checkpoint, and the machine that wrote this page."""
    rows = []
    if starts := starting.read(run / starting.FILE):
        last = dict(starts[-1])
        last["started"] = f"{last.get('started')}, {len(starts)} times so far"
        for key, value in last.items():
            if value is None:  # no commit is known, or there is no CUDA
                continue
            words = (
                ", ".join(f"{k} {v}" for k, v in value.items())
                if isinstance(value, dict)
                else str(value)
            )
            rows.append([{"images": "images seen at the start"}.get(key, key), words])
    found = [p for p in (run / "checkpoints").glob("*/manifest.json") if p.parent.name.isdigit()]
    for path in sorted(found, key=lambda p: int(p.parent.name))[-1:]:
        try:
            facts = json.loads(path.read_text())
        except ValueError:
            continue
        size = sum(f["bytes"] for f in facts.get("files", {}).values())
        rows.append(
            ["newest checkpoint", f"{int(path.parent.name):,} images, {size / 1e6:,.1f} MB"]
        )
        rows += [
            [f"written with {key}", str(facts[key])] for key in ("torch", "ranks") if key in facts
        ]
    here = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
    return [
        *rows,
        *[
            [f"{key} (of this page)", str(here[key])]
            for key in ("processor", "cores", "torch", "python")
        ],
    ]


def table(title: str, rows: list[list[str]], heads: tuple[str, ...]) -> str:
    """A titled table; nothing without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{h}</th>" for h in heads) if any(heads) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f"<h2>{title}</h2><table><tr>{top}</tr>{body}</table>"
        if top
        else f"<h2>{title}</h2><table>{body}</table>"
    )


STYLE = """
:root { color-scheme: light dark; --ground: #fbfaf8; --ink: #1c1b1a; --faint: #6d6a66; --line: #e2ded8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #171614; --ink: #e9e6e1; --faint: #a09b94; --line: #35322e; }
}
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1, h2 { font-weight: 600; line-height: 1.2; margin: 2rem 0 0.7rem; }
h1 { margin-top: 0; }
p, figcaption, .tiles span { color: var(--faint); }
figure { margin: 0; }
figure p { font-size: 0.85rem; margin: 0.3rem 0 0; }
svg, img { max-width: 100%; height: auto; display: block; }
.plots, .grids { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.grids { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.grids img { width: 100%; image-rendering: pixelated; }
.tiles { display: flex; flex-wrap: wrap; gap: 2rem; }
.tiles b { display: block; font-size: 1.6rem; font-weight: 600; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { text-align: left; padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: 0.8rem; font-size: 0.85rem; }
summary { cursor: pointer; }
"""
