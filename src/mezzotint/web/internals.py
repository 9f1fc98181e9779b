"""Visualisations of a network while it samples: DiMR's branches, DiffiT's attention.

Both views read what the forward pass computes, through hooks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.diffit import TMSA
from mezzotint.data.transforms import to_uint8
from mezzotint.process.prediction import solve
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.sample import make_logsnr_steps
from mezzotint.tools import summary
from mezzotint.web import handlers, html
from mezzotint.web.html import Figure
from mezzotint.web.request import Request, make_job, parse_integer, parse_number, parse_seed
from mezzotint.web.streaming import UpdateChannel, preview, sample_stream, stream
from mezzotint.web.studio import Studio

COLUMNS = 10  # steps shown side by side
HEAT, MARK = (0.86, 0.42, 0.2), (0.3, 1.0, 0.85)  # RGB of attention and of the chosen token


@functools.lru_cache(maxsize=64)
def network_table(preset: str) -> str:
    """Return a preset's layers as a table, summed by resolution and channels."""
    totals: dict[tuple[int, str, str], list[float]] = {}
    for row in summary.read_layers(preset):
        shape, resolution = row["output"], row["resolution"]
        if resolution:  # "32x32", or "65 tokens"
            is_image = len(shape) == 3 and f"{shape[1]}x{shape[2]}" == resolution
            channels = str(shape[0] if is_image else shape[-1])
            # The largest image comes first; tokens and vectors come last.
            side = int(resolution.split("x")[0]) if "x" in resolution else 0
            key = (-side, resolution.replace("x", "×"), channels)
        else:
            key = (0, "vectors, and outside layers", "")
        total = totals.setdefault(key, [0, 0.0, 0.0])
        for i, name in enumerate(("count", "params", "gmac")):
            total[i] += row[name]
    ordered = sorted(totals.items())
    gmac = sum(total[2] for _, total in ordered)
    params = sum(total[1] for _, total in ordered)
    rows = [
        [resolution, channels, f"{n:.0f}", summary.format_count(p), f"{g:.3f}"]
        for (_, resolution, channels), (n, p, g) in ordered
    ]
    caption = (
        f"{preset}: {summary.format_count(params)} parameters, {gmac:.3f} GMAC per network call; "
        "bars are shares of the GMAC"
    )
    head = ("resolution", "channels", "layers", "parameters", "GMAC")
    return html.table(head, rows, caption, [total[2] / (gmac or 1.0) for _, total in ordered])


@dataclass(frozen=True)
class StepImages:
    """One network call: its log-SNR, and the images to show of it, uint8 (3 or 1, h, w)."""

    logsnr: float
    images: list[Tensor]


@contextmanager
def forward_hook(module: nn.Module, hook: Any, before: bool = False) -> Iterator[None]:
    """Call `hook` at every forward pass of `module` within the block."""
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def pick_columns(steps: list[StepImages]) -> list[StepImages]:
    """Return at most COLUMNS of the steps, evenly spaced, first and last included."""
    if len(steps) <= COLUMNS:
        return steps
    return [steps[round(i * (len(steps) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def make_single_job(studio: Studio, name: Any, seed: Any, steps: Any) -> tuple[SamplingJob, int]:
    """Return a ddim job and its one seed; latents stay latents."""
    request = Request(model=name, steps=parse_integer("steps", steps, 1, 50))
    job = make_job(studio, request, decode=False)
    # Hooks are Python, which the replay of a recorded graph does not run.
    return replace(job, settings=replace(job.settings, cuda_graphs=False)), parse_seed(seed)


def branch_images(
    job: SamplingJob, z: Tensor, outputs: list[Tensor], logsnr: float
) -> list[Tensor]:
    """Return the x-hat of every branch, coarse to fine, from its own prediction.

    A branch's target is the finest one's, summed over blocks of side rho and divided by rho
    (specs/dimr.md 2.9). That is linear, so z pooled likewise obeys the same 2x2 equations, with
    rho times the averaged image.
    """
    images = []
    level = torch.full((1,), logsnr, dtype=torch.float64)
    for output in outputs:
        rho = z.shape[-1] // output.shape[-1]
        pooled = F.avg_pool2d(z[:1], rho) * rho
        x = solve(job.model.parameterisation.kind, pooled, output[:1].float(), level)[0] / rho
        images.append(preview(job, x)[0])
    return images


def branches(studio: Studio, name: Any, seed: Any, steps: Any) -> Iterator[handlers.Step]:
    """Yield progress, then the x-hat of each of DiMR's branches at every step."""
    job, seed = make_single_job(studio, name, seed, steps)
    if name not in studio.models_of("dimr"):
        raise ValueError(f"{name} has no branches; choose a DiMR model")

    def work(channel: UpdateChannel) -> list[StepImages]:
        results: list[StepImages] = []
        levels = iter(make_logsnr_steps(job.model, job.settings).tolist())

        def record(module: nn.Module, args: tuple[Tensor, ...], outputs: list[Tensor]) -> None:
            level = next(levels)
            # The backbone's input is z times the family's scale, which is 1 for DiMR.
            results.append(StepImages(level, branch_images(job, args[0].float(), outputs, level)))

        with forward_hook(job.model.backbone, record):
            z = job.start_noise([seed])
            sample_stream(job, z, [seed], channel)
        return results

    config = job.model.info.config
    names = [f"{config.size * config.patches[-1] // patch}²" for patch in config.patches]
    updates = stream(work, studio.limits.seconds)
    yield from stream_rows(updates, names, "x-hat of every branch")


def attention_heatmap(
    attn: TMSA, args: tuple[Tensor, ...], row: float, column: float
) -> tuple[Tensor, int, int]:
    """Return how much one token attends to every other, mean over heads.

    Args:
        args: of the layer's forward pass; x (b, windows, tokens, width) comes first. Windows and
            tokens fill squares.
        row, column: of the token, as fractions of the image in 0...1.

    Returns:
        The attention (side, side) in tokens, and the token's row and column.
    """
    x, q_t, _, bias = args
    _, windows, n, _ = x.shape
    per_side, w = math.isqrt(windows), math.isqrt(n)
    side = per_side * w
    r, c = (min(int(f * side), side - 1) for f in (row, column))
    window, token = r // w * per_side + c // w, r % w * w + c % w
    q, k, _ = attn.qkv(x[:1, window]).view(n, 3, attn.heads, -1).unbind(1)
    q = q[token] + q_t[:1].view(attn.heads, -1)
    # DiffiT eq. 6
    scores = torch.einsum("hd,nhd->hn", q, k) * q.shape[-1] ** -0.5 + bias[0, :, token]
    # A token attends within its window; elsewhere the map is 0.
    heat = torch.zeros(side, side)
    top, left = window // per_side * w, window % per_side * w
    heat[top : top + w, left : left + w] = scores.float().softmax(-1).mean(0).view(w, w).cpu()
    return heat, r, c


def overlay_heatmap(image: Tensor, heat: Tensor, row: int, column: int) -> Tensor:
    """Return attention in copper over the dimmed grey image, the token marked; uint8 (3, h, w)."""
    height = max(image.shape[-1], 8 * heat.shape[-1])
    grey = F.interpolate(image.float().mean(0)[None, None] / 255, size=(height, height))[0] * 0.35
    opacity = (heat / heat.max().clamp(min=1e-12)).sqrt()
    opacity = F.interpolate(opacity[None, None], size=(height, height))[0]
    mixed = grey * (1 - opacity) + torch.tensor(HEAT).view(3, 1, 1) * opacity
    cell = height // heat.shape[-1]
    rows = slice(row * cell, (row + 1) * cell)
    columns = slice(column * cell, (column + 1) * cell)
    mixed[:, rows, columns] = torch.tensor(MARK).view(3, 1, 1)
    return to_uint8(mixed * 2 - 1)


def attention(
    studio: Studio, name: Any, seed: Any, steps: Any, layer: Any, row: Any, column: Any
) -> Iterator[handlers.Step]:
    """Yield progress, then one token's attention in DiffiT at every step.

    Args:
        layer: counted from 1. row, column: of the token, as fractions in 0...1.
    """
    job, seed = make_single_job(studio, name, seed, steps)
    layers = [m for m in job.model.backbone.modules() if isinstance(m, TMSA)]
    if not layers:
        raise ValueError(f"{name} has no time-dependent attention; choose a DiffiT model")
    number = parse_integer("layer", layer, 1, len(layers))
    attn = layers[number - 1]
    row, column = parse_number("row", row, 0, 1), parse_number("column", column, 0, 1)

    def work(channel: UpdateChannel) -> list[StepImages]:
        heatmaps: list[tuple[Tensor, int, int]] = []
        images: list[Tensor] = []

        def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            heatmaps.append(attention_heatmap(attn, args, row, column))

        def send(make_update: Any) -> None:
            images.append(make_update().images[0])
            channel(make_update)

        with forward_hook(attn, record, before=True):
            z = job.start_noise([seed])
            sample_stream(job, z, [seed], send)
        levels = make_logsnr_steps(job.model, job.settings).tolist()
        return [  # the last log-SNR is the clean end, where the network is not called
            StepImages(level, [image, overlay_heatmap(image, *heatmap)])
            for level, image, heatmap in zip(levels[:-1], images, heatmaps, strict=True)
        ]

    title = f"layer {number} of {len(layers)}, mean over {attn.heads} heads; the token is marked"
    yield from stream_rows(stream(work, studio.limits.seconds), ["x-hat", "attention"], title)


def stream_rows(
    updates: Generator[Any, None, list[StepImages]], names: list[str], title: str
) -> Iterator[handlers.Step]:
    """Yield progress, then a table of images: one row a name, one column a step."""
    try:
        while True:
            yield None, handlers.describe_update(next(updates))
    except StopIteration as end:
        steps = pick_columns(end.value)
    finally:
        updates.close()
    cells = ["<b></b>", *(f"<b>{step.logsnr:+.1f}</b>" for step in steps)]
    for i, name in enumerate(names):
        cells.append(f"<b>{name}</b>")
        for step in steps:
            alt = f"{name} at {step.logsnr:+.1f}"
            cells.append(html.figure(Figure(html.thumbnail(step.images[i]), "", alt=alt)))
    columns = f"grid-template-columns: auto repeat({len(steps)}, minmax(4.6rem, 1fr))"
    yield (
        f'<div class="mz-rows" tabindex="0" style="{columns}">{"".join(cells)}</div>',
        html.note(f"{title}; columns: log-SNR"),
    )
