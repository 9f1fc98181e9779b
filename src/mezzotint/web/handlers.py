"""What the Generate and Compare tabs do: generators that yield (pictures, status) as HTML while they work."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mezzotint.sampling.generate_images import SamplingJob
from mezzotint.sampling.sample import draw_start_noise
from mezzotint.sampling.trajectory import slerp
from mezzotint.web import html
from mezzotint.web.html import Figure
from mezzotint.web.request import (
    Request,
    describe_settings,
    make_job,
    parse_integer,
    parse_number,
    parse_seeds,
    with_guidance,
    with_steps,
)
from mezzotint.web.streaming import Update, sample_stream, stream
from mezzotint.web.studio import Limits, Studio

Step = tuple[Any, str]  # pictures (None leaves them as they are), status


def report_errors(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps; an error becomes a status that says it, and then Gradio's own error."""
    import gradio as gr

    try:
        yield from steps
    except (ValueError, TimeoutError, FloatingPointError) as error:
        words, raised = str(error), error
    except torch.OutOfMemoryError as error:
        words, raised = (
            "the model ran out of memory; ask for fewer pictures, or smaller ones",
            error,
        )
    except Exception as error:
        logging.getLogger("mezzotint.web").exception("a request failed")
        words, raised = f"the model failed: {type(error).__name__}: {str(error)[:300]}", error
    else:
        return
    yield None, html.problem(words)
    raise gr.Error(words, duration=8, print_exception=False) from raised


def names_of(job: SamplingJob, seeds: Sequence[int]) -> list[str]:
    """What each picture shows, by prompt or class; empty strings where neither is chosen."""
    if job.prompts:
        return [job.prompt(seed) for seed in seeds]
    known = job.model.info.labels
    return [(known[i] if known else f"class {i}") for i in job.labels(seeds) or ()] or [""] * len(
        seeds
    )


def preview_figures(frame: Update, titles: Sequence[str]) -> list[Figure]:
    """Pictures in the making."""
    return [
        Figure(html.small(image), title) for image, title in zip(frame.images, titles, strict=True)
    ]


def finished(
    job: SamplingJob, made: Tensor, seeds: Sequence[int], card: dict[str, Any]
) -> list[Figure]:
    """Pictures with the card of how each one alone is made again."""
    labels = job.labels(seeds) or [None] * len(seeds)
    items = []
    for image, seed, label, name in zip(made, seeds, labels, names_of(job, seeds), strict=True):
        data = html.png(image, label, {**card, "num_images": 1, "first_seed": seed})
        title = f"seed {seed}" + (f" · {name}" if name else "")
        items.append(
            Figure(
                data,
                title,
                describe_settings(job),
                seed=seed,
                alt=f"{title}, {describe_settings(job)}",
            )
        )
    return items


def sampled(
    job: SamplingJob, seeds: list[int], limits: Limits, heading: str = ""
) -> Iterator[tuple[list[Figure], str, bool]]:
    """Steps of (figures, status, whether they are finished)."""
    titles = [
        f"seed {seed}" + (f" · {name}" if name else "")
        for seed, name in zip(seeds, names_of(job, seeds), strict=True)
    ]

    def work(show: Any) -> tuple[Tensor, dict[str, Any]]:
        made = sample_stream(job, draw_start_noise(job.model, seeds, job.settings), seeds, show)
        return made, job.card(1, seeds[0])

    frames = stream(work, limits.seconds)
    try:
        while True:
            frame = next(frames)
            words = f"{heading}call {frame.call} of {frame.calls} · log-SNR {frame.logsnr:+.1f}"
            yield (
                preview_figures(frame, titles),
                html.progress(frame.call, frame.calls, words),
                False,
            )
    except StopIteration as end:
        made, card = end.value
    finally:
        frames.close()
    yield (
        finished(job, made, seeds, card),
        html.note(f"{heading}done · {job.network_calls} network calls per picture"),
        True,
    )


def generate(studio: Studio, wish: Request) -> Iterator[tuple[list[Figure], str, bool]]:
    """Pictures from seeds."""
    job = make_job(studio, wish)
    yield from sampled(job, parse_seeds(wish.seeds, studio.limits), studio.limits)


def interpolation(
    studio: Studio, wish: Request, first: Any, second: Any, frames: Any
) -> Iterator[Step]:
    """A strip from one seed to another, both ends included; class and sampler's own noise are the first seed's."""
    job = make_job(studio, wish)
    a, b = (
        parse_seeds(int(parse_integer("seed", s, 0, 2**53)), studio.limits)[0]
        for s in (first, second)
    )
    count = parse_integer("pictures", frames, 2, studio.limits.pictures)
    ends = draw_start_noise(job.model, [a, b], job.settings)
    parts = [k / (count - 1) for k in range(count)]
    z = torch.stack([slerp(ends[0], ends[1], t) for t in parts])
    titles = [f"seed {a}", *(f"{100 * t:.0f} %" for t in parts[1:-1]), f"seed {b}"]
    work = stream(lambda show: sample_stream(job, z, [a] * count, show), studio.limits.seconds)
    try:
        while True:
            frame = next(work)
            status = html.progress(frame.call, frame.calls, f"call {frame.call} of {frame.calls}")
            yield html.figures(preview_figures(frame, titles), "mz-strip"), status
    except StopIteration as end:
        made = end.value
    finally:
        work.close()
    items = [Figure(html.png(image), title) for image, title in zip(made, titles, strict=True)]
    yield (
        html.figures(items, "mz-strip"),
        html.note(f"{describe_settings(job)} · along the great arc between two noises"),
    )


def variations(studio: Studio, wish: Request, what: Any, values: Any, seed: Any) -> Iterator[Step]:
    """A strip of one seed with several guidance scales or numbers of steps."""
    job, limits = make_job(studio, wish), studio.limits
    chosen = [parse_integer("seed", seed, 0, 2**53)]
    asked = [v for v in str(values)[:200].replace(",", " ").split() if v]
    if not 1 <= len(asked) <= limits.pictures:
        raise ValueError(f"write 1 to {limits.pictures} values, such as 1, 1.5, 2, 4")
    if what == "guidance":
        jobs = [with_guidance(job, parse_number("guidance", v, 0, 30)) for v in asked]
    elif what == "steps":
        jobs = [with_steps(job, parse_integer("steps", v, 1, limits.steps)) for v in asked]
    else:
        raise ValueError(f"vary guidance or steps, not {str(what)[:40]!r}")
    items: list[Figure] = []
    shown: list[Figure] = []
    for i, (one, value) in enumerate(zip(jobs, asked, strict=True)):
        title = f"{what} {value}"
        for new, _, done in sampled(one, chosen, limits):
            shown = [*items, replace(new[0], title=title, detail="")]
            yield (
                html.figures(shown, "mz-strip"),
                html.progress(i + done, len(jobs), f"{title}, {i + 1} of {len(jobs)}"),
            )
        items = shown
    yield None, html.note(f"seed {chosen[0]} · {describe_settings(job)}")


def comparison(studio: Studio, left: Request, right: Request) -> Iterator[Step]:
    """The same seeds from two models or settings, beside each other."""
    jobs = [make_job(studio, wish) for wish in (left, right)]
    seeds, limits = parse_seeds(left.seeds, studio.limits), studio.limits
    columns: list[list[Figure]] = [[], []]
    for i, job in enumerate(jobs):
        for items, status, _ in sampled(job, seeds, limits, heading=f"{'AB'[i]}: "):
            columns[i] = items
            yield side_by_side(columns, (left, right), jobs), status
    yield (
        None,
        html.note("done · the same seeds start from the same noise wherever the shapes agree"),
    )


def side_by_side(
    columns: Sequence[Sequence[Figure]], wishes: Sequence[Request], jobs: Sequence[SamplingJob]
) -> str:
    """Two columns of pictures."""
    halves = []
    for name, items, wish, job in zip("AB", columns, wishes, jobs, strict=True):
        head = f"{name} · {wish.model} · {describe_settings(job)}"
        halves.append(
            f"<section>{html.figures([replace(f, detail='') for f in items], title=head)}</section>"
        )
    return f'<div class="mz-pairs">{"".join(halves)}</div>'
