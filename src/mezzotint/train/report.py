"""One HTML page of a run, finished or not: curves, sample grids, events, recipe, environment.

The page loads nothing from outside: plots are inline SVG and images are data URIs. It follows the
reader's light or dark theme. The studio's Watch tab draws the same curves from here.
"""

from __future__ import annotations

import html
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint import config
from mezzotint.backbones import dummy_condition, native_size
from mezzotint.config import Recipe
from mezzotint.core.distributed import World, default_device
from mezzotint.core.files import atomic_open, check_replaceable, read_json
from mezzotint.core.image_grid import data_uri
from mezzotint.core.json_values import first_line
from mezzotint.core.machine import describe_machine
from mezzotint.core.paths import printable
from mezzotint.core.registry import build
from mezzotint.core.svg_plot import COLOURS, Line, svg_plot
from mezzotint.core.text import hide_folders, hide_local, last_component
from mezzotint.data.decode import open_image_file
from mezzotint.models import build_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.process.denoiser import Cond, Model
from mezzotint.process.schedules import slope
from mezzotint.train import environment, log

GRIDS = 12  # sample grids on the page, evenly spaced over the run, the newest included
POINTS = 400  # of each curve; more would make the page large and look the same
LARGEST_PNG = 1 << 20  # bytes; larger grids are embedded as JPEG
DATA_STD = 0.5  # of images in [-1, 1] (EDM's sigma_data), assumed for the line of zero outputs
GREY = COLOURS[6]
MARK = '<meta name="generator" content="mezzotint report">'
# What values that no run writes raise while a page is made of them.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)

Plot = tuple[str, str]  # title, SVG


def write_report(run: Path, out: Path, difference: str = "") -> Path:
    """Write the page of a run folder and return `out`.

    Args:
        run: folder with recipe.yaml; everything else in it is optional.
        out: file to write, atomically.
        difference: where the recipe differs from the paper's, as text.

    Errors: ValueError where the folder holds no run, or `out` another file.
    """
    if not (run / "recipe.yaml").is_file():
        raise ValueError(f"{run} has no recipe.yaml; give a run folder, e.g. runs/unet-tiny")
    check_replaceable(out, lambda path: MARK in path.read_text()[:1000], "a report")
    page = render_page(run, difference)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_open(out) as file:
        file.write(page.encode())
    return out


def render_page(run: Path, difference: str) -> str:
    """Return the page as text."""
    recipe = config.from_yaml(run / "recipe.yaml")
    records = log.read(run / "log.jsonl")
    events = log.read(run / "events.jsonl")
    name = html.escape(printable(run.resolve().name))
    try:
        sections = [
            f"<h1>{name}</h1>",
            f"<p>{html.escape(hide_folders(describe_progress(run, recipe, records)))}</p>",
            render_latest(recipe, records),
            render_curves(recipe, records),
            render_evaluations(recipe, log.read_evaluations(run / "log.jsonl")),
            render_grids(run),
            render_table(
                "Events",
                [[f"{event['images']:,}", *_event_cells(event)] for event in events],
                ("images", "event", ""),
            ),
            "<h2>Recipe</h2>",
            f"<pre>{html.escape(hide_folders(difference))}</pre>" if difference else "",
            "<details><summary>all fields</summary>"
            f"<pre>{html.escape(public_recipe(recipe))}</pre></details>",
            render_table("Environment", environment_rows(run), ("", "")),
        ]
    except DAMAGED as error:
        raise ValueError(
            f"{run}: its recipe, log, events or environment hold values that no run writes "
            f"({type(error).__name__}: {first_line(error)}); remove the damaged line or file"
        ) from error
    style = (Path(__file__).parent / "report.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"{MARK}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{style}</style></head><body>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def public_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML without local paths: of a path, its last component.

    The source of the data is left out.
    """
    values = hide_folders(config.to_dict(recipe))
    values["data"]["source"] = ""
    for key in ("reference", "weights", "prompts", "data"):
        if values["evaluate"][key]:
            values["evaluate"][key] = last_component(values["evaluate"][key])
    for key in ("codec", "text_encoder"):
        values["data"][key] = hide_local(values["data"][key])
    return config.to_yaml(config.from_dict(values)).rstrip()


def _event_cells(event: dict[str, Any]) -> tuple[str, str]:
    facts = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("images", "event"))
    return str(event.get("event", "")), hide_folders(facts)


def describe_progress(run: Path, recipe: Recipe, records: list[dict[str, Any]]) -> str:
    """Return preset, dataset, images seen, and when the last line was logged."""
    seen = records[-1]["images"] if records else 0
    source = recipe.data.source or "no data"
    text = f"{recipe.preset} on {source}: {seen:,} of {recipe.images:,} images"
    if seen >= recipe.images:
        return f"{text}, finished."
    if not records:
        return f"{text}."
    last = time.strftime("%Y-%m-%d %H:%M", time.localtime((run / "log.jsonl").stat().st_mtime))
    return f"{text}; last line {last}. The same training command continues it."


def render_latest(recipe: Recipe, records: list[dict[str, Any]]) -> str:
    """Return the values of the last log line in large type."""
    if not records:
        return ""
    last = records[-1]
    values = {"loss": f"{last['loss']:.4g}", "gradient norm": f"{last['grad_norm']:.3g}"}
    if speed := last.get("images_per_second"):
        values["images/s"] = f"{speed:,.4g}"
        if (remaining := recipe.images - last["images"]) > 0:
            values["hours left"] = f"{remaining / speed / 3600:.3g}"
    for key, label in (("utilisation", "utilisation"), ("peak_memory_gib", "peak GiB")):
        if key in last:
            values[label] = f"{last[key]:.3g}"
    boxes = [f"<div><b>{value}</b><span>{label}</span></div>" for label, value in values.items()]
    return f'<section class="tiles">{"".join(boxes)}</section>'


def line_over_images(records: list[dict[str, Any]], *path: str, **options: Any) -> Line:
    """Return one value of the log over images seen, thinned to about POINTS points.

    Args:
        path: the value's keys, the outer first; records without it are skipped.
        options: of `Line`.
    """
    points: list[tuple[int, float]] = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if value is not None else None
        if value is not None:
            points.append((record["images"], value))
    if len(points) > POINTS:  # always keep the last
        points = [*points[: -1 : -(-len(points) // POINTS)], points[-1]]
    style = "-" if len(points) > 2 else "o-"  # one or two points make no visible line
    images, values = [x for x, _ in points], [y for _, y in points]
    return Line(images, values, **{"style": style, **options})


def spans_decade(values: Sequence[float]) -> bool:
    """Return whether a logarithmic axis can show these values and would have two labels."""
    return bool(values) and 0 < 10 * min(values) < max(values)


def training_plots(records: list[dict[str, Any]]) -> list[Plot]:
    """Return loss, gradient norm, speed and memory over images seen; no plot of an absent value."""
    plots = []
    for title, key, label, from_zero in (
        ("Loss", "loss", "loss", False),
        ("Gradient norm", "grad_norm", "norm before clipping", False),
        ("Speed", "images_per_second", "images per second", True),
        ("Memory", "peak_memory_gib", "peak GiB", True),
    ):
        line = line_over_images(records, key)
        if line.y:
            log_y = not from_zero and spans_decade(line.y)
            svg = svg_plot([line], "images seen", label, log_y=log_y, from_zero=from_zero)
            plots.append((title, svg))
    return plots


def evaluation_plots(evaluations: list[dict[str, Any]]) -> list[Plot]:
    """Return one plot for each metric of the evaluations during training."""
    metrics = dict.fromkeys(name for record in evaluations for name in record["evaluation"])
    return [
        (
            f"Evaluation: {metric}",
            svg_plot(
                [line_over_images(evaluations, "evaluation", metric, style="o-")],
                "images seen",
                metric,
            ),
        )
        for metric in metrics
    ]


def render_curves(recipe: Recipe, records: list[dict[str, Any]]) -> str:
    """Return the section of the training curves."""
    if not records:
        return "<p>No line is logged yet.</p>"
    note = (
        "Dashed: the loss of a network that outputs zeros, where most backbones start, on images "
        f"of standard deviation {DATA_STD}. Where a curve touches it, the network has learnt "
        "nothing yet, or there is nothing to learn."
    )
    plots = training_plots(records)
    plots.insert(1, ("Loss by log-SNR", plot_loss_by_logsnr(recipe, records)))
    return "<h2>Curves</h2>" + render_plots(plots, {"Loss by log-SNR": note})


def render_plots(plots: Sequence[Plot], notes: dict[str, str]) -> str:
    """Return plots side by side; `notes` holds a remark by title."""
    drawn = [
        f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}<p>{notes.get(title, '')}</p>"
        "</figure>"
        for title, svg in plots
    ]
    return f'<section class="plots">{"".join(drawn)}</section>'


def render_evaluations(recipe: Recipe, evaluations: list[dict[str, Any]]) -> str:
    """Return the section of the evaluations during training; empty if there are none."""
    if not evaluations:
        return ""
    settings = recipe.evaluate
    kinds = []
    if settings.reference:
        kinds.append(
            f"{settings.num_images:,} samples of the averaged weights, {settings.sampler}, "
            f"{settings.steps} steps, against {last_component(settings.reference)}"
        )
    if settings.bits_per_dim:
        data = last_component(settings.data) or "the test split of the data"
        kinds.append(f"bits per dimension of the averaged weights on {data}, an upper bound")
    note = f"{'; '.join(kinds)}; details are in evaluations/."
    plots = render_plots(evaluation_plots(evaluations), {})
    return f"<h2>Evaluations</h2><p>{html.escape(note)}</p>{plots}"


def plot_loss_by_logsnr(recipe: Recipe, records: list[dict[str, Any]]) -> str:
    """Plot the loss per log-SNR bin at up to four moments, the latest darkest, and of zeros."""
    names = logsnr_bin_names()
    indices = sorted({round(i * (len(records) - 1) / 3) for i in range(4)})
    lines = []
    for rank, i in enumerate(indices, start=1):
        losses = records[i]["loss_by_logsnr"]
        y = [losses.get(name, math.nan) for name in names]
        label = f"{records[i]['images']:,} images"
        lines.append(Line(names, y, label, style="o-", alpha=rank / len(indices)))
    zeros = zero_output_loss(recipe)
    y = [zeros.get(name, math.nan) for name in names]
    lines.append(Line(names, y, "zeros", GREY, "--"))
    return svg_plot(lines, "log-SNR, noise to image", "loss", log_y=True)


def logsnr_bin_names() -> list[str]:
    """Return the names of the log's bins, from noise to image."""
    centres = torch.cat([log.EDGES[:1] - 1, log.EDGES + 1])
    return list(_mean_per_bin(torch.zeros(len(centres)), centres))


def _mean_per_bin(losses: Tensor, logsnr: Tensor) -> dict[str, float]:
    """Return the mean loss per bin, computed as the log does."""
    world = World(0, 1, torch.device("cpu"))
    window = log.new_window(world.device, parts=0)
    log.add_step(window, losses, logsnr, torch.zeros(1, dtype=torch.float64), world)
    return log.reset_window(window, [], world)["loss_by_logsnr"]


class ZeroBackbone(nn.Module):
    """A backbone whose outputs are zeros, in the shapes of a real one's outputs."""

    def __init__(self, backbone: nn.Module, config: Any):
        super().__init__()
        shape = (config.channels, *native_size(config))
        self.dtype_of_inputs = nn.Parameter(torch.zeros(()))
        with torch.device("meta"), torch.no_grad():
            z = torch.empty(1, *shape)
            outputs = backbone(z, torch.empty(1), dummy_condition(config, z))
            self.shapes = [output.shape[1:] for output in outputs]

    def forward(self, z: Tensor, noise: Tensor, cond: Cond) -> list[Tensor]:
        """Return zeros, coarse to fine."""
        return [torch.zeros(len(z), *shape) for shape in self.shapes]


@torch.no_grad()
def zero_output_loss(recipe: Recipe, levels: int = 256, batch: int = 16) -> dict[str, float]:
    """Return the loss per log-SNR bin of a network whose outputs are zero.

    All backbones but DiMR's start there. The loss is the recipe's own: its objective, schedule and
    loss measure. Images are white noise of standard deviation `DATA_STD`; a loss on the noise alone
    does not depend on them.

    Args:
        levels: values of u, evenly spaced in 0...1. batch: images per call.
    """
    info = preset_info(recipe.preset, **recipe.model)
    with torch.device("meta"):
        real = build_model(info)
    shape = (info.config.channels, *native_size(info.config))
    model = Model(ZeroBackbone(real.backbone, info.config), real.parameterisation, info)
    objective = build(objectives.registry, recipe.objective)
    schedule = build(schedules.registry, recipe.schedule or info.schedule)
    generator = torch.Generator().manual_seed(0)
    all_losses, all_logsnr = [], []
    for u in ((torch.arange(levels, dtype=torch.float64) + 0.5) / levels).split(batch):
        x = DATA_STD * torch.randn(len(u), *shape, generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        logsnr = schedule(u)
        losses = objective(model, x, eps, logsnr.float(), dummy_condition(info.config, x))
        if recipe.time.loss_measure == "logsnr":
            with torch.enable_grad():
                losses = losses * (-slope(schedule, u) / 2).to(losses)
        all_losses.append(losses.detach())
        all_logsnr.append(logsnr)
    return _mean_per_bin(torch.cat(all_losses), torch.cat(all_logsnr))


def find_grids(run: Path) -> list[Path]:
    """Return the run's sample grids, oldest first; a file's name is the number of images seen."""
    paths = (run / "samples").glob("*.png")
    return sorted(path for path in paths if path.stem.isdigit() and path.is_file())


def render_grids(run: Path) -> str:
    """Return the section of the sample grids, newest first; empty if there are none."""
    paths = find_grids(run)
    if not paths:
        return ""
    last, count = len(paths) - 1, min(GRIDS, len(paths))
    indices = {round(i * last / max(1, count - 1)) for i in range(count)} | {last}
    figures = []
    for i in sorted(indices, reverse=True):
        caption = f"{int(paths[i].stem):,} images"
        image = f'<img alt="samples, {caption}" src="{embed_image(paths[i])}">'
        figures.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
    return f'<h2>Samples</h2><section class="grids">{"".join(figures)}</section>'


def embed_image(path: Path) -> str:
    """Return a PNG file as a data URI; a large one as JPEG."""
    data = path.read_bytes()
    if len(data) > LARGEST_PNG:
        file = io.BytesIO()
        open_image_file(path).convert("RGB").save(file, "JPEG", quality=90)
        data = file.getvalue()
    return data_uri(data)


def environment_rows(run: Path) -> list[list[str]]:
    """Return the run's last start, its newest checkpoint and this page's machine as table rows."""
    rows = []
    if starts := environment.read(run / environment.FILE):
        last = dict(starts[-1])
        last["started"] = f"{last.get('started')}, {len(starts)} times so far"
        for key, value in last.items():
            if value is None:  # no commit is known, or there is no CUDA
                continue
            is_dict = isinstance(value, dict)
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if is_dict else str(value)
            rows.append(
                ["images seen at the start" if key == "images" else key, hide_folders(text)]
            )
    paths = [p for p in (run / "checkpoints").glob("*/manifest.json") if p.parent.name.isdigit()]
    for path in sorted(paths, key=lambda p: int(p.parent.name))[-1:]:
        try:
            manifest = read_json(path)
        except (ValueError, OSError):  # being written or rotated away
            continue
        size = sum(file["bytes"] for file in manifest.get("files", {}).values())
        images = int(path.parent.name)
        rows.append(["newest checkpoint", f"{images:,} images, {size / 1e6:,.1f} MB"])
        for key in ("torch", "ranks"):
            if key in manifest:
                rows.append([f"written with {key}", str(manifest[key])])
    machine = describe_machine(default_device().type)
    for key in ("processor", "cores", "torch", "python"):
        rows.append([f"{key} (of this page)", str(machine[key])])
    return rows


def render_table(title: str, rows: list[list[str]], heads: tuple[str, ...]) -> str:
    """Return a titled table; empty without rows. Empty heads make no head row."""
    if not rows:
        return ""
    head = "".join(f"<th>{h}</th>" for h in heads) if any(heads) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<h2>{title}</h2><table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"
