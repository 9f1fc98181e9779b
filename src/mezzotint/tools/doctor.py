"""Check this machine and a dataset before training."""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import torch

from mezzotint.core import rng
from mezzotint.core.distributed import default_device
from mezzotint.core.machine import describe_machine, memory_bytes
from mezzotint.data.audit import Audit, describe_audit, list_problems
from mezzotint.data.image_dataset import DecodedImage, ImageDataset, open_images
from mezzotint.data.loader import load_batches
from mezzotint.data.transforms import UnreadableImage
from mezzotint.tools.benchmark import measure_matmul_flops
from mezzotint.tools.describe_data import (
    check_samples,
    describe_data,
    render_data,
    save_samples,
    stated_notes,
)
from mezzotint.tools.rehearsal import check_processes

OPTIONAL_PACKAGES = (
    "diffusers",
    "transformers",
    "scikit-learn",
    "gradio",
    "tensorboard",
    "wandb",
    "trackio",
)
SIZES = (32, 64, 128, 256, 512, 1024)  # usual resolutions, in pixels
REFERENCE_SIZE = 64  # pixels at which simple diffusion's cosine schedule is not shifted
DISK_BYTES = 128 << 20
BLOCK = 64  # images decoded between two checks of the time
# Our thresholds: a checkpoint of a 500 M network is 8 GB, and a JPEG of 256 px decodes in 0.3 ms.
MIN_FREE_BYTES, MIN_WRITE_BYTES_PER_SECOND, MIN_IMAGES_PER_SECOND = 20e9, 100e6, 300


def diagnose(
    data: str = "",
    *,
    size: int | None = None,
    channels: int = 3,
    folder: Path = Path(),
    seconds: float = 10.0,
    samples: Path | None = None,
) -> dict[str, Any]:
    """Check the machine and the data.

    Args:
        data: source as for training; "" checks the machine alone.
        size, channels: of the images in training; see `choose_size` for the default size.
        folder: where runs will be written.
        seconds: for reading the data; images that could not be read in time are left out.
        samples: PNG of samples of the data to write; None for none.

    Returns:
        JSON-ready; "concerns" lists sentences, empty if nothing is wrong.

    Errors: ValueError for data that cannot be opened, a `SplitError` where a split has to be
        chosen, and for a place where `samples` may not lie.
    """
    found = examine_data(data, size, channels, seconds, samples) if data else None
    facts: dict[str, Any] = {
        "environment": describe_environment(),
        "matmul": measure_matmul(),
        "distributed": check_processes(),
        "disk": measure_disk(folder),
        "data": found,
    }
    data_concerns = found["concerns"] if found else []
    return {**facts, "concerns": [*_machine_concerns(facts), *data_concerns]}


def describe_environment() -> dict[str, Any]:
    """Return processor, threads, load, versions, GPUs and installed optional packages."""
    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append({"name": torch.cuda.get_device_name(i), "bytes": total, "free": free})
    return {
        **describe_machine(default_device().type),
        "memory_bytes": memory_bytes(torch.device("cpu")),
        "gpus": gpus,
        "packages": {name: _version(name) for name in OPTIONAL_PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure_matmul() -> dict[str, float]:
    """Return the FLOP/s of a matrix product by precision."""
    device = default_device().type
    # Small on a CPU, where bf16 is very slow without hardware support.
    side = None if device == "cuda" else 768
    return {
        precision: measure_matmul_flops(device, precision, side)
        for precision in ("float32", "bf16")
    }


def measure_disk(folder: Path) -> dict[str, Any]:
    """Return the free bytes and the speed in bytes per second of the disk that holds `folder`.

    The speeds are None where the disk is almost full or cannot be written.
    """
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    facts: dict[str, Any] = {"folder": str(folder), "free": free, "write": None, "read": None}
    if free < 2 * DISK_BYTES:
        return facts
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".mezzotint-doctor-") as file:
            start = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            facts["write"] = DISK_BYTES / (time.perf_counter() - start)
            if hasattr(os, "posix_fadvise"):
                # Empty the page cache first, or memory would be measured.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                start = time.perf_counter()
                while file.read(1 << 20):
                    pass
                facts["read"] = DISK_BYTES / (time.perf_counter() - start)
    except OSError as error:
        facts["error"] = str(error)
    return facts


def examine_data(
    data: str, size: int | None, channels: int, seconds: float, samples: Path | None = None
) -> dict[str, Any]:
    """Return how the data was understood, an audit, loading speed, and log-SNR shift for its size.

    Images are read in a fixed random order until the time is over, so that a part of a dataset
    sorted by class represents the whole. Labels are counted over the whole dataset.
    """
    if samples is not None:
        check_samples(samples, data)
    size = size or choose_size(data)
    images = open_images(data, size=size, channels=channels, keep_in_memory=False)
    drawn = 0 if samples is None else save_samples(images, samples)
    audit = audit_within(images, seconds)
    threads = sorted({1, os.cpu_count() or 1})
    speeds = {str(n): measure_loading(images, n) for n in threads}
    stated = stated_notes(images)
    data_concerns = [problem for problem in list_problems(audit) if problem not in stated]
    if max(speeds.values()) < MIN_IMAGES_PER_SECOND:
        sides = [audit[side].get("median", 0) for side in ("original_width", "original_height")]
        advice = "the disk or the processor is slow"
        if min(sides) > size:
            advice = f"resize once: mezzotint prepare {quote(data)} FOLDER --size {size}"
        data_concerns.append(f"loading reaches only {max(speeds.values()):.0f} images/s; {advice}")
    return {
        "source": data,
        "size": size,
        "total": len(images),
        "layout": describe_data(images),
        "samples": {"path": str(samples), "count": drawn} if drawn else None,
        "examined": audit["images"] + len(audit["unreadable"]),
        "audit": audit,
        "images_per_second": speeds,
        # simple diffusion section 2: logsnr(t) + 2 log(64 / d)
        "logsnr_shift": 2 * math.log(REFERENCE_SIZE / size),
        "overrides": [
            "schedule.name=cosine",
            f"schedule.options.image_d={size}",
            f"schedule.options.noise_d={REFERENCE_SIZE}",
        ],
        "concerns": data_concerns,
    }


def choose_size(data: str) -> int:
    """Return the largest usual size in pixels that half of the first 100 readable images reach.

    It is at least 32.
    """
    images = open_images(data, size=SIZES[0], keep_in_memory=False)
    sides: list[int] = []
    for i in range(min(100, len(images))):
        try:
            decoded = images.decode(i)
        except UnreadableImage:
            continue
        sides.append(min(decoded.width, decoded.height))
    reached = [size for size in SIZES if sides and size <= median(sides)]
    return max(reached, default=SIZES[0])


def audit_within(images: ImageDataset, seconds: float) -> dict[str, Any]:
    """Audit as many images as can be decoded in that time on all cores, and count all labels."""

    def decode(i: int) -> DecodedImage | UnreadableImage:
        try:
            return images.decode(i)
        except UnreadableImage as reason:
            return reason

    audit, start = Audit(images.size), time.monotonic()
    order = rng.philox("order", 0, 0).permutation(len(images)).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for block in (order[k : k + BLOCK] for k in range(0, len(order), BLOCK)):
            for i, decoded in zip(block, pool.map(decode, block), strict=True):
                audit.add(images, i, decoded)
            if time.monotonic() - start > seconds:
                break
    summary = audit.summary(images)
    names = images.label_names
    if names is None:
        return summary
    counts = Counter(dict.fromkeys(names, 0))
    for i in range(len(images)):
        label = images.label(i)
        counts["no label" if label is None else names[label]] += 1
    return {
        **summary,
        "classes": {name: n for name, n in counts.items() if n},
        "classes_without_images": [name for name in names if not counts[name]],
    }


def measure_loading(images: ImageDataset, threads: int, seconds: float = 1.5) -> float:
    """Return the images per second of the training loader with that many threads."""
    batch = max(1, min(32, len(images)))
    batches = load_batches(images, seed=0, start_image=0, batch=batch, workers=threads)
    next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch
    speed = count / (time.perf_counter() - start)
    batches.close()  # type: ignore[attr-defined]
    return speed


def _machine_concerns(facts: dict[str, Any]) -> list[str]:
    """Return what may slow down or break training on this machine."""
    env, matmul, processes, disk = (
        facts[k] for k in ("environment", "matmul", "distributed", "disk")
    )
    found = []
    if not env["gpus"] and env["threads"] > 1 and env["load"][0] > 0.5 * env["cores"]:
        found.append(
            f"{env['threads']} threads on {env['cores']} cores with a load of {env['load'][0]:g}: "
            "OpenMP is very slow when other jobs share its cores; set OMP_NUM_THREADS=1 or wait"
        )
    if matmul["bf16"] < matmul["float32"]:
        found.append(
            f"bf16 is slower here than float32 ({matmul['bf16'] / 1e9:,.0f} and "
            f"{matmul['float32'] / 1e9:,.0f} GFLOP/s); set engine.precision=float32"
        )
    for gpu in env["gpus"]:
        if gpu["free"] < 0.9 * gpu["bytes"]:
            found.append(f"{_describe_gpu(gpu)}: another process uses it")
    if not processes["passed"]:
        found.append(
            f"{processes['processes']} processes did not communicate by {processes['backend']}: "
            f"{processes['error']}"
        )
    if disk["free"] < MIN_FREE_BYTES:
        found.append(f"{disk['folder']}: only {disk['free'] / 1e9:.1f} GB free for checkpoints")
    if "error" in disk:
        found.append(f"{disk['folder']} cannot be written: {disk['error']}")
    elif disk["write"] is not None and disk["write"] < MIN_WRITE_BYTES_PER_SECOND:
        found.append(
            f"{disk['folder']} writes {disk['write'] / 1e6:.0f} MB/s; "
            "large checkpoints will stall training"
        )
    return found


def _describe_gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']}, {gpu['free'] / 2**30:.1f} of {gpu['bytes'] / 2**30:.1f} GiB free"


def render_diagnosis(facts: dict[str, Any]) -> str:
    """Lay out the result of `diagnose` as text, concerns last."""
    env, matmul, processes, disk, data = (
        facts[k] for k in ("environment", "matmul", "distributed", "disk", "data")
    )
    installed = [f"{name} {version}" for name, version in env["packages"].items() if version]
    speeds = [f", {way} {disk[way] / 1e6:,.0f} MB/s" for way in ("write", "read") if disk[way]]
    gflops = {precision: f"{rate / 1e9:,.0f}" for precision, rate in matmul.items()}
    lines = [
        f"python       {env['python']}, torch {env['torch']}; "
        f"{', '.join(installed) or 'no optional packages'}",
        f"processor    {env['processor']}; {env['cores']} cores, {env['threads']} threads, "
        f"load {env['load'][0]:g}, {env['memory_bytes'] / 2**30:.0f} GiB",
        *[f"gpu {i}        {_describe_gpu(gpu)}" for i, gpu in enumerate(env["gpus"])],
        f"matmul       float32 {gflops['float32']}, bf16 {gflops['bf16']} GFLOP/s",
        f"distributed  {processes['processes']} processes by {processes['backend']} "
        f"{'communicate' if processes['passed'] else 'fail'} ({processes['seconds']:.1f} s)",
        f"disk         {disk['folder']}: {disk['free'] / 1e9:,.0f} GB free{''.join(speeds)}",
        *(_render_data(data) if data else []),
    ]
    return "\n".join([*lines, "", *([f"! {c}" for c in facts["concerns"]] or ["no concerns"])])


def _render_data(data: dict[str, Any]) -> list[str]:
    size, samples = data["size"], data["samples"]
    sides = {**data["audit"], "classes": {}, "captions": 0}  # `render_data` prints these
    audit = [line for line in describe_audit(sides).splitlines() if not line.startswith("!")]
    understood = render_data(data["layout"], data["audit"]["captions"], data["audit"]["images"])
    drawn = [f"samples      {samples['path']}: {samples['count']} of them"] if samples else []
    speeds = [f"{v:,.0f} with {n} thread(s)" for n, v in data["images_per_second"].items()]
    return [
        f"data         {data['source']} at {size} px: "
        f"{data['examined']:,} of {data['total']:,} images looked at",
        *[f"             {line}" for line in audit],
        *understood,
        *drawn,
        f"loading      images/s: {', '.join(speeds)}",
        f"schedule     log-SNR shift for {size} px: 2 log({REFERENCE_SIZE}/{size}) = "
        f"{data['logsnr_shift']:+.2f}; presets follow model.size by themselves",
        f"             for another schedule: {' '.join(data['overrides'])}",
    ]
