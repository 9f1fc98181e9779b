"""Large presets on a GPU: training steps eager and compiled, a profile, sampling, a real loop."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_rows import Clock, Row, batch_that_fits, free_bytes, halving, in_time
from latents import write_random_latents
from mezzotint.backbones import get_backbone
from mezzotint.backbones.blocks import compile_blocks
from mezzotint.backbones.flops import count_macs
from mezzotint.models import preset_info
from mezzotint.process.denoiser import Cond, Model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.sample import generate
from mezzotint.sampling.settings import Guidance, SamplingSettings
from mezzotint.tools.benchmark import (
    BenchmarkSettings,
    make_benchmark_model,
    make_sampling_call,
    make_training_step,
    time_interleaved,
)

# Large presets and their stand-ins for a rehearsal.
XL, DIFFIT, SID2 = "dimr-xl-2r-256", "diffit-256", "sid2-256"
TINY = {XL: "dimr-latent-tiny", DIFFIT: "diffit-latent-tiny", SID2: "sid2-tiny"}
WANTED = {XL: 128, DIFFIT: 128, SID2: 64}  # images of a training step


def chosen(preset: str, small: bool) -> str:
    """Return the preset, or what stands in for it in a rehearsal."""
    return TINY[preset] if small else preset


def settings_of(preset: str, device: str, small: bool, batch: int) -> BenchmarkSettings:
    """Return the settings of one measurement in bf16, with the recipe's loss."""
    name = chosen(preset, small)
    objective = recipe_for(name).objective
    return BenchmarkSettings(
        preset=name, precision="bf16", device=device, rounds=3, objective=objective, batch=batch
    )


def first_batch(preset: str, device: str, small: bool) -> int:
    """Return the batch of a training step, by the free memory."""
    if small:
        return 4
    return batch_that_fits(preset, WANTED[preset], free_bytes(device))


def train(
    preset: str, device: str, small: bool, change: Callable[[Model], None] | None = None
) -> Row:
    """Time training steps, at the largest batch that fits.

    Args:
        change: of the model, before the first step.
    """

    def measure(batch: int) -> Row:
        settings = settings_of(preset, device, small, batch)
        model = make_benchmark_model(settings).train()
        if change is not None:
            change(model)
        step = make_training_step(model, settings)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = time_interleaved({"step": step}, device, settings.rounds)["step"]
        flop = 3 * 2 * count_macs(get_backbone(model)).computed * batch
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
        return {
            "seconds": seconds,
            "images_per_second": batch / seconds,
            "achieved_flops": flop / seconds,
            "peak_bytes": peak,
        }

    return halving(first_batch(preset, device, small), measure)


def compiled(device: str) -> Callable[[Model], None]:
    """Return the function that compiles a model's blocks; on a CPU the code is not generated."""
    return lambda model: compile_blocks(
        model.backbone, backend="inductor" if device == "cuda" else "aot_eager"
    )


def channels_last(model: Model) -> None:
    """Lay out the weights of convolutions with the channels last; outputs follow."""
    model.backbone.to(memory_format=torch.channels_last)


def triton_depthwise(model: Model) -> None:
    """Take our own kernel for DiMR's depthwise convolutions."""
    get_backbone(model).set_depthwise_kernel("triton")


def training_eager(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """DiMR-XL, eager: with cuDNN's depthwise kernel, and with Triton's."""
    run = partial(train, XL, device, small)
    row = {"preset": chosen(XL, small), "mode": "train"}
    tasks = [(row, 5.0, run)]
    if device == "cuda":
        tasks.append(({**row, "depthwise": "triton"}, 12.0, partial(run, triton_depthwise)))
    yield from in_time(clock, tasks, device)


def training_compiled(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """DiMR-XL and DiffiT, compiled; the first call compiles."""
    tasks = [
        (
            {"preset": chosen(preset, small), "mode": "train", "compile": True},
            seconds,
            partial(train, preset, device, small, compiled(device)),
        )
        for preset, seconds in ((XL, 10.0), (DIFFIT, 30.0))
    ]
    yield from in_time(clock, tasks, device)


def training_others(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """DiffiT eager; SiD2 as it is, with channels last, and compiled."""
    kinds: list[tuple[str, Row, float, Callable[[Model], None] | None]] = [
        (DIFFIT, {}, 5.0, None),
        (SID2, {}, 5.0, None),
        (SID2, {"layout": "channels last"}, 5.0, channels_last),
        (SID2, {"compile": True}, 25.0, compiled(device)),
    ]
    tasks = [
        (
            {"preset": chosen(preset, small), "mode": "train", **options},
            seconds,
            partial(train, preset, device, small, change),
        )
        for preset, options, seconds, change in kinds
    ]
    yield from in_time(clock, tasks, device)


def profile(device: str, small: bool, clock: Clock, out: Path) -> Iterator[Row]:
    """Profile one DiMR-XL step by kernel: the table in profile.txt, the largest as rows."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    batch = min(64, first_batch(XL, device, small))
    settings = settings_of(XL, device, small, batch)
    step = make_training_step(make_benchmark_model(settings).train(), settings)
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=activities) as profiled:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    averages = profiled.key_averages()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    (out / "profile.txt").write_text(
        averages.table(sort_by=key, row_limit=60, max_name_column_width=90)
    )
    attribute = "self_device_time_total" if device == "cuda" else key
    events = sorted(averages, key=lambda e: -getattr(e, attribute))
    for event in events[:25]:
        yield {
            "preset": settings.preset,
            "batch": batch,
            "kernel": event.key[:120],
            "calls": event.count,
            "milliseconds": getattr(event, attribute) / 1e3,
        }


def sampling(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """DiMR-XL: guided calls, at a batch and alone, by the ways to launch them; and sampling."""
    batch = 4 if small else 64
    name = chosen(XL, small)
    settings = settings_of(XL, device, small, batch)
    model = make_benchmark_model(settings).eval().requires_grad_(False)
    ways = [("eager", settings)]
    if device == "cuda":
        ways.append(("graphs", replace(settings, graphs=True)))

    def call(way: BenchmarkSettings, images: int) -> Row:
        work = make_sampling_call(model, way, images)
        seconds = time_interleaved({"call": work}, device, 3)["call"]
        return {"batch": images, "seconds": seconds}

    def whole(steps: int) -> Row:
        classes = model.info.config.num_classes
        cond = Cond(label=torch.arange(batch) % classes)
        # The defaults: what a user gets who says nothing.
        chosen_settings = SamplingSettings(steps=steps, guidance=Guidance(scale=1.5), batch=batch)
        work = partial(generate, model, range(batch), cond, chosen_settings)
        seconds = time_interleaved({"run": work}, device, 1)["run"]
        return {
            "batch": batch,
            "steps": steps,
            "seconds": seconds,
            "images_per_second_at_250_steps": batch / seconds * steps / 250,
        }

    row = {"preset": name, "mode": "sample"}
    tasks: list[tuple[Row, float, Callable[[], Row]]] = [
        ({**row, "way": way}, 3.0, partial(call, chosen_way, images))
        for images in (batch, 1)
        for way, chosen_way in ways
    ]
    tasks.append(({**row, "way": "defaults"}, 8.0, partial(whole, 4 if small else 10)))
    yield from in_time(clock, tasks, device)


def loop(device: str, small: bool, clock: Clock) -> Iterator[Row]:
    """Train DiMR-XL by the command on random latents: loading, noise, agreement, log and all."""
    name = chosen(XL, small)
    batch = first_batch(XL, device, small)
    steps, images = (6, 64) if small else (60, 2_000)
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "latents", Path(folder) / "run"
        info = preset_info(name)
        write_random_latents(
            data,
            images,
            size=info.config.size,
            channels=info.config.channels,
            classes=info.config.num_classes,
            codec=info.codec,
        )
        command = [
            sys.executable, "-m", "mezzotint", "train", name, "--data", str(data),
            "--out", str(run), f"batch={batch}", f"images={steps * batch}",
            f"log_every_images={steps // 6 * batch}",
            "samples.every_images=0", "save.every_images=1000000000", "engine.precision=bf16",
        ]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=clock.left, check=False
        )
        row: Row = {"preset": name, "mode": "loop", "batch": batch, "steps": steps}
        if done.returncode:
            yield {**row, "error": done.stderr[-500:]}
            return
        for line in (run / "log.jsonl").read_text().splitlines():
            yield {**row, **_logged(json.loads(line))}


def _logged(line: dict[str, Any]) -> Row:
    return {key: line[key] for key in ("images", "loss", "images_per_second") if key in line}
