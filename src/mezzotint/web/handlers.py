"""Event handlers of the Generate and Compare tabs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mezzotint.sampling.conditioning import text_encoder_for
from mezzotint.sampling.job import SamplingJob
from mezzotint.sampling.prompts import describe_cut
from mezzotint.sampling.trajectory import slerp
from mezzotint.web import html
from mezzotint.web.html import Figure
from mezzotint.web.request import (
    Request,
    describe_settings,
    make_job,
    parse_integer,
    parse_number,
    parse_seed,
    parse_seeds,
    parse_text,
    with_guidance,
    with_steps,
)
from mezzotint.web.streaming import Update, UpdateChannel, sample_stream, stream
from mezzotint.web.studio import Limits, Studio

Step = tuple[Any, str]  # images (None keeps those shown), status


def report_errors(steps: Iterator[Step]) -> Iterator[Step]:
    """Yield the same steps; turn an error into a status and raise it as Gradio's own."""
    import gradio as gr

    try:
        yield from steps
    except (ValueError, TimeoutError, FloatingPointError) as error:
        message, cause = str(error), error
    except torch.OutOfMemoryError as error:
        message, cause = "the model ran out of memory; try fewer or smaller images", error
    except Exception as error:
        logging.getLogger("mezzotint.web").exception("a request failed")
        message, cause = f"the model failed: {type(error).__name__}: {str(error)[:300]}", error
    else:
        return
    yield None, html.problem(message)
    raise gr.Error(message, duration=8, print_exception=False) from cause


def image_titles(job: SamplingJob, seeds: Sequence[int]) -> list[str]:
    """Return each image's seed with its prompt or class, where one is chosen."""
    if job.prompts:
        names = [job.prompt(seed).text for seed in seeds]
    elif labels := job.labels(seeds):
        known = job.model.info.labels or ()
        names = [known[i] if i < len(known) else f"class {i}" for i in labels]
    else:
        return [f"seed {seed}" for seed in seeds]
    return [f"seed {seed} · {name}" for seed, name in zip(seeds, names, strict=True)]


def preview_figures(update: Update, titles: Sequence[str]) -> list[Figure]:
    """Return unfinished images."""
    images = zip(update.images, titles, strict=True)
    return [Figure(html.thumbnail(image), title) for image, title in images]


def describe_update(update: Update, heading: str = "") -> str:
    """Return the status of an unfinished sampling."""
    text = f"{heading}call {update.call} of {update.num_calls} · log-SNR {update.logsnr:+.1f}"
    return html.progress(update.call, update.num_calls, text)


def finished_figures(
    job: SamplingJob, images: Tensor, seeds: Sequence[int], card: dict[str, Any]
) -> list[Figure]:
    """Return finished images, each with the sampling card that reproduces it alone."""
    labels = job.labels(seeds) or [None] * len(seeds)
    titles, detail = image_titles(job, seeds), describe_settings(job)
    return [
        Figure(
            html.png(image, label, {**card, "num_images": 1, "first_seed": seed}),
            title,
            detail,
            seed=seed,
            alt=f"{title}, {detail}",
        )
        for image, seed, label, title in zip(images, seeds, labels, titles, strict=True)
    ]


def cut_note(job: SamplingJob) -> str:
    """Return what the model does not read of the prompts, to follow another sentence."""
    if not job.prompts:
        return ""
    lines = describe_cut(text_encoder_for(job.model, job.encoder), job.prompts)
    return "".join(f" · {line}" for line in lines)


def sample_figures(
    job: SamplingJob, seeds: list[int], limits: Limits, heading: str = ""
) -> Iterator[tuple[list[Figure], str, bool]]:
    """Sample one image a seed; yield (figures, status, whether they are finished)."""
    titles = image_titles(job, seeds)

    def work(channel: UpdateChannel) -> tuple[Tensor, dict[str, Any]]:
        z = job.start_noise(seeds)
        return sample_stream(job, z, seeds, channel), job.card(1, seeds[0])

    updates = stream(work, limits.seconds)
    try:
        while True:
            update = next(updates)
            yield preview_figures(update, titles), describe_update(update, heading), False
    except StopIteration as end:
        images, card = end.value
    finally:
        updates.close()
    status = html.note(
        f"{heading}done · {job.network_calls} network calls per image{cut_note(job)}"
    )
    yield finished_figures(job, images, seeds, card), status, True


def generate(studio: Studio, request: Request) -> Iterator[tuple[list[Figure], str, bool]]:
    """Sample the request's seeds; yields as `sample_figures`."""
    job = make_job(studio, request)
    yield from sample_figures(job, parse_seeds(request.seeds, studio.limits), studio.limits)


def interpolation(
    studio: Studio, request: Request, first: Any, last: Any, count: Any
) -> Iterator[Step]:
    """Yield a strip of `count` images from one seed to another, both ends included.

    All images have the class and the sampler's own noise of the first seed.
    """
    job = make_job(studio, request)
    a, b = parse_seed(first), parse_seed(last)
    count = parse_integer("images", count, 2, studio.limits.images)
    ends = job.start_noise([a, b])
    fractions = [k / (count - 1) for k in range(count)]
    z = torch.stack([slerp(ends[0], ends[1], t) for t in fractions])
    titles = [f"seed {a}", *(f"{100 * t:.0f} %" for t in fractions[1:-1]), f"seed {b}"]
    updates = stream(
        lambda channel: sample_stream(job, z, [a] * count, channel), studio.limits.seconds
    )
    try:
        while True:
            update = next(updates)
            strip = html.figures(preview_figures(update, titles), "mz-strip")
            yield strip, describe_update(update)
    except StopIteration as end:
        images = end.value
    finally:
        updates.close()
    items = [Figure(html.png(image), title) for image, title in zip(images, titles, strict=True)]
    note = f"{describe_settings(job)} · along the great arc between two noises"
    yield html.figures(items, "mz-strip"), html.note(note)


def variations(
    studio: Studio, request: Request, setting: Any, values: Any, seed: Any
) -> Iterator[Step]:
    """Yield a strip of one seed under several values of a setting, "guidance" or "steps"."""
    job, limits = make_job(studio, request), studio.limits
    seed = parse_seed(seed)
    texts = parse_text("values", values, 200).replace(",", " ").split()
    if not 1 <= len(texts) <= limits.images:
        raise ValueError(f"write 1 to {limits.images} values, such as 1, 1.5, 2, 4")
    if setting == "guidance":
        jobs = [with_guidance(job, parse_number("guidance", text, 0, 30)) for text in texts]
    elif setting == "steps":
        jobs = [with_steps(job, parse_integer("steps", text, 1, limits.steps)) for text in texts]
    else:
        raise ValueError(f"vary guidance or steps, not {str(setting)[:40]!r}")
    limits = limits.divide(len(jobs))
    finished: list[Figure] = []
    strip: list[Figure] = []
    for i, (varied_job, text) in enumerate(zip(jobs, texts, strict=True)):
        title = f"{setting} {text}"
        for figures, _, done in sample_figures(varied_job, [seed], limits):
            strip = [*finished, replace(figures[0], title=title, detail="")]
            status = html.progress(i + done, len(jobs), f"{title}, {i + 1} of {len(jobs)}")
            yield html.figures(strip, "mz-strip"), status
        finished = strip
    yield None, html.note(f"seed {seed} · {describe_settings(job)}")


def comparison(studio: Studio, left: Request, right: Request) -> Iterator[Step]:
    """Yield the seeds of `left` sampled under both requests, side by side."""
    requests = (left, right)
    jobs = [make_job(studio, request) for request in requests]
    seeds = parse_seeds(left.seeds, studio.limits)
    limits = studio.limits.divide(len(jobs))
    columns: list[list[Figure]] = [[], []]
    for i, job in enumerate(jobs):
        for figures, status, _ in sample_figures(job, seeds, limits, f"{'AB'[i]}: "):
            columns[i] = figures
            yield render_columns(columns, requests, jobs), status
    yield (
        None,
        html.note("done · the same seeds start from the same noise if the image shapes agree"),
    )


def render_columns(
    columns: Sequence[Sequence[Figure]], requests: Sequence[Request], jobs: Sequence[SamplingJob]
) -> str:
    """Return two columns of images, each under its model and settings."""
    sections = []
    for name, items, request, job in zip("AB", columns, requests, jobs, strict=True):
        title = f"{name} · {request.model} · {describe_settings(job)}"
        figures = html.figures([replace(item, detail="") for item in items], title=title)
        sections.append(f"<section>{figures}</section>")
    return f'<div class="mz-pairs">{"".join(sections)}</div>'
