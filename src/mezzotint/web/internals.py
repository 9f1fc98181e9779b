"""Inside a network while it samples: DiMR's branches, DiffiT's attention. Both read what a forward pass computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.diffit import TMSA
from mezzotint.data.transforms import to_uint8
from mezzotint.process.prediction import solve
from mezzotint.sampling.generate_images import SamplingJob
from mezzotint.sampling.sample import draw_start_noise, make_logsnr_steps
from mezzotint.tools import summary
from mezzotint.web import handlers, html
from mezzotint.web.html import Figure
from mezzotint.web.request import Request, make_job, parse_integer, parse_number
from mezzotint.web.streaming import UpdateChannel, preview, sample_stream, stream
from mezzotint.web.studio import Studio

COLUMNS = 10  # steps shown side by side
HEAT, MARK = (0.86, 0.42, 0.2), (0.3, 1.0, 0.85)  # RGB of attention and of the token that attends


@functools.lru_cache(maxsize=64)
def network_table(preset: str) -> str:
    """A preset's layers added up by resolution and channels."""
    rows = summary.layers(preset)
    sums: dict[tuple[int, str, str], list[float]] = {}
    for row in rows:
        shape, place = row["output"], row["resolution"] or "vectors, and outside layers"
        image = len(shape) == 3 and f"{shape[1]}x{shape[2]}" == row["resolution"]
        channels = str(shape[0] if image else shape[-1]) if row["resolution"] else ""
        key = (
            -int(place.split("x")[0]) if "x" in place else 0,
            place.replace("x", "×") if channels else place,
            channels,
        )
        total = sums.setdefault(key, [0, 0.0, 0.0])
        for i, name in enumerate(("count", "params", "gmac")):
            total[i] += row[name]
    ordered = sorted(sums.items())
    gmac = sum(total[2] for _, total in ordered) or 1.0
    params = sum(total[1] for _, total in ordered)
    cells = [
        [place, channels, f"{n:.0f}", summary.si(p), f"{g:.3f}"]
        for (_, place, channels), (n, p, g) in ordered
    ]
    caption = f"{preset}: {summary.si(params)} parameters, {gmac:.3f} GMAC per network call; bars are shares of the GMAC"
    head = ("resolution", "channels", "layers", "parameters", "GMAC")
    return html.table(head, cells, caption, [total[2] / gmac for _, total in ordered])


@dataclass(frozen=True)
class Moment:
    """One network call: log-SNR, the x-hat of it, and pictures of what was looked at."""

    logsnr: float
    pictures: list[Tensor]  # uint8 (3 or 1, h, w)


@contextmanager
def listening(module: nn.Module, hook: Any, before: bool = False) -> Iterator[None]:
    """`hook` called at every forward pass of `module` within the block."""
    handle = (
        module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    )
    try:
        yield
    finally:
        handle.remove()


def spread(moments: list[Moment]) -> list[Moment]:
    """At most COLUMNS of them, first and last included."""
    if len(moments) <= COLUMNS:
        return moments
    return [moments[round(i * (len(moments) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def make_single_job(studio: Studio, name: Any, seed: Any, steps: Any) -> tuple[SamplingJob, int]:
    """A plain ddim job of one seed; latents are looked at as they are."""
    job = make_job(
        studio, Request(model=name, steps=parse_integer("steps", steps, 1, 50)), decode=False
    )
    return job, parse_integer("seed", seed, 0, 2**53)


def branch_images(
    job: SamplingJob, z: Tensor, outputs: list[Tensor], logsnr: float
) -> list[Tensor]:
    """Every branch's own x-hat, coarse to fine, from its prediction.

    A branch's target is the finest one's summed over blocks of side rho and divided by rho (specs/dimr.md 2.9), which
    is linear, so z pooled likewise obeys the same 2x2 equations with rho times the averaged image.
    """
    found = []
    level = torch.full((1,), logsnr, dtype=torch.float64)
    for out in outputs:
        rho = z.shape[-1] // out.shape[-1]
        pooled = F.avg_pool2d(z[:1], rho) * rho
        x = solve(job.model.parameterisation.kind, pooled, out[:1].float(), level)[0] / rho
        found.append(preview(job, x)[0])
    return found


def branches(studio: Studio, name: Any, seed: Any, steps: Any) -> Iterator[handlers.Step]:
    """DiMR's branches side by side at every step."""
    job, number = make_single_job(studio, name, seed, steps)
    if name not in studio.of("dimr"):
        raise ValueError(f"{name} has no branches; choose a DiMR model")

    def work(show: UpdateChannel) -> list[Moment]:
        moments: list[Moment] = []
        levels = iter(make_logsnr_steps(job.model, job.settings).tolist())

        def look(module: nn.Module, given: tuple[Tensor, ...], outputs: list[Tensor]) -> None:
            level = next(levels)
            # The backbone's input is z up to the family's scale, which is 1 for DiMR.
            moments.append(Moment(level, branch_images(job, given[0].float(), outputs, level)))

        with listening(job.model.backbone, look):
            sample_stream(job, draw_start_noise(job.model, [number], job.settings), [number], show)
        return moments

    names = [f"{job.model.info.config.size // p}²" for p in job.model.info.config.patches]
    yield from stream_figures(
        stream(work, studio.limits.seconds), names, "every branch's own x-hat"
    )


def attention_picture(
    attn: TMSA, given: tuple[Tensor, ...], row: float, column: float
) -> tuple[Tensor, int, int]:
    """How much one token attends to every other, mean over heads: (side, side), and the token's place.

    Args:
        given: what the layer was called with, x (b, windows, tokens, width) first; windows and tokens fill squares.
        row, column: of the token, 0...1 of the picture.
    """
    x, q_t, _, bias = given
    _, windows, n, _ = x.shape
    per_side, w = math.isqrt(windows), math.isqrt(n)
    side = per_side * w
    r, c = (min(int(f * side), side - 1) for f in (row, column))
    window, token = r // w * per_side + c // w, r % w * w + c % w
    q, k, _ = attn.qkv(x[:1, window]).view(n, 3, attn.heads, -1).unbind(1)
    q = q[token] + q_t[:1].view(attn.heads, -1)
    # DiffiT eq. 6
    scores = torch.einsum("hd,nhd->hn", q, k) * q.shape[-1] ** -0.5 + bias[0, :, token]
    heat = torch.zeros(side, side)
    top, left = window // per_side * w, window % per_side * w
    heat[top : top + w, left : left + w] = scores.float().softmax(-1).mean(0).view(w, w).cpu()
    return heat, r, c


def overlay(image: Tensor, heat: Tensor, r: int, c: int) -> Tensor:
    """Attention in copper over a dimmed grey picture, the token itself marked; uint8 (3, h, w)."""
    height = max(image.shape[-1], 8 * heat.shape[-1])
    grey = F.interpolate(image.float().mean(0)[None, None] / 255, size=(height, height))[0] * 0.35
    strong = (heat / heat.max().clamp(min=1e-12)).sqrt()
    shown = F.interpolate(strong[None, None], size=(height, height))[0]
    colour = torch.tensor(HEAT).view(3, 1, 1)
    mixed = grey * (1 - shown) + colour * shown
    cell = height // heat.shape[-1]
    mixed[:, r * cell : (r + 1) * cell, c * cell : (c + 1) * cell] = torch.tensor(MARK).view(
        3, 1, 1
    )
    return to_uint8(mixed * 2 - 1)


def attention(
    studio: Studio, name: Any, seed: Any, steps: Any, layer: Any, place: Any
) -> Iterator[handlers.Step]:
    """DiffiT's attention of one token over time; `place`: (row, column), 0...1 each. Layers are counted from 1."""
    job, seed_number = make_single_job(studio, name, seed, steps)
    layers = [m for m in job.model.backbone.modules() if isinstance(m, TMSA)]
    if not layers:
        raise ValueError(f"{name} has no time-dependent attention; choose a DiffiT model")
    chosen = layers[parse_integer("layer", layer, 1, len(layers)) - 1]
    row, column = (parse_number("place", v, 0, 1) for v in place)

    def work(show: UpdateChannel) -> list[Moment]:
        seen: list[tuple[Tensor, int, int]] = []
        images: list[Tensor] = []

        def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(attention_picture(chosen, given, row, column))

        def each(frame: Any) -> None:
            images.append(frame().images[0])
            show(frame)

        with listening(chosen, look, before=True):
            sample_stream(
                job, draw_start_noise(job.model, [seed_number], job.settings), [seed_number], each
            )
        levels = make_logsnr_steps(job.model, job.settings).tolist()
        found = zip(levels, images, seen, strict=False)
        return [Moment(level, [image, overlay(image, *heat)]) for level, image, heat in found]

    title = (
        f"layer {int(layer)} of {len(layers)}, mean over {chosen.heads} heads; the token is marked"
    )
    yield from stream_figures(stream(work, studio.limits.seconds), ["x-hat", "attention"], title)


def stream_figures(frames: Any, rows: list[str], title: str) -> Iterator[handlers.Step]:
    """Progress while it runs, then a table of pictures: one row per name, one column per step."""
    try:
        while True:
            frame = next(frames)
            yield (
                None,
                html.progress(frame.call, frame.calls, f"call {frame.call} of {frame.calls}"),
            )
    except StopIteration as end:
        moments = spread(end.value)
    finally:
        frames.close()
    cells = ["<b></b>", *(f"<b>{m.logsnr:+.1f}</b>" for m in moments)]
    for i, name in enumerate(rows):
        cells.append(f"<b>{name}</b>")
        cells += [
            html.figure(Figure(html.small(m.pictures[i]), "", alt=f"{name} at {m.logsnr:+.1f}"))
            for m in moments
        ]
    columns = f"grid-template-columns: auto repeat({len(moments)}, minmax(4.6rem, 1fr))"
    yield (
        f'<div class="mz-rows" tabindex="0" style="{columns}">{"".join(cells)}</div>',
        html.note(f"{title}; columns: log-SNR"),
    )
