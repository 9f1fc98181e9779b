"""Is this machine ready to train, and is this data fit for it? Half a minute of looking, then a list of concerns."""

from __future__ import annotations

import importlib.metadata
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mezzotint.core import distributed, rng
from mezzotint.core.machine import describe_machine
from mezzotint.data.audit import Audit, concerns, describe
from mezzotint.data.image_dataset import DecodedImage, ImageDataset, open_images
from mezzotint.data.loader import load_batches
from mezzotint.data.transforms import UnreadableImage
from mezzotint.tools.benchmark import matmul_ceiling

OPTIONAL = (
    "diffusers",
    "transformers",
    "scikit-learn",
    "gradio",
    "tensorboard",
    "wandb",
    "trackio",
)
SIDES = (32, 64, 128, 256, 512, 1024)  # usual resolutions, in pixels
REFERENCE = 64  # side at which simple diffusion's cosine schedule is not shifted
DISK_BYTES = 128 << 20
BLOCK = 64  # pictures between two looks at the clock
# Our thresholds of concern: a checkpoint of a 500 M network is 8 GB, and a JPEG of 256 px decodes in 0.3 ms.
LEAST_FREE_BYTES, LEAST_WRITE, LEAST_IMAGES_PER_SECOND = 20e9, 100e6, 300


def examine(
    data: str = "",
    *,
    size: int | None = None,
    channels: int = 3,
    folder: Path = Path(),
    seconds: float = 10.0,
) -> dict[str, Any]:
    """Everything, JSON-ready; "concerns" is a list of sentences, empty when there is nothing to say.

    Args:
        data: as for training; none is examined when empty. size, channels: what it will be trained at; without a size
            the largest usual one that half of the pictures reach.
        folder: where runs will be written. seconds: for reading the data; what could not be read in time is left out.
    """
    found: dict[str, Any] = {
        "environment": environment(),
        "matmul": matmul(),
        "distributed": smoke(),
        "disk": disk(folder),
        "data": examine_data(data, size, channels, seconds) if data else None,
    }
    said = [*_machine_concerns(found), *(found["data"]["concerns"] if data else [])]
    return {**found, "concerns": said}


def environment() -> dict[str, Any]:
    """Processor, threads, load, versions, devices and what of the optional packages is installed."""
    cuda = torch.cuda.is_available()
    devices = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        devices.append({"name": torch.cuda.get_device_name(i), "bytes": total, "free": free})
    return {
        **describe_machine("cuda" if cuda else "cpu"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": devices,
        "packages": {name: _version(name) for name in OPTIONAL},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def matmul() -> dict[str, float]:
    """FLOP/s of a matrix product, by precision. Small on a CPU, where bf16 without hardware for it is very slow."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = None if device == "cuda" else 768
    return {precision: matmul_ceiling(device, precision, side) for precision in ("float32", "bf16")}


def smoke(timeout: float = 60.0) -> dict[str, Any]:
    """Do several processes find each other and add up numbers? All GPUs under NCCL, else two processes under gloo.

    Launched as training is, by torchrun, and stopped after `timeout` seconds.
    """
    gpus = torch.cuda.device_count()
    processes, backend = (gpus, "nccl") if gpus > 1 else (2, "gloo")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        **({} if gpus > 1 else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    began = time.monotonic()
    result: dict[str, Any] = {
        "backend": backend,
        "processes": processes,
        "passed": False,
        "error": "",
    }
    try:
        done = subprocess.run(
            [*command, "-m", "mezzotint.tools.doctor"],
            capture_output=True, text=True, timeout=timeout, env=environment, check=False,
        )  # fmt: skip
        result["passed"] = done.returncode == 0
        lines = [line for line in done.stderr.splitlines() if "Error" in line]
        result["error"] = (
            ""
            if result["passed"]
            else (lines or done.stderr.splitlines() or ["no output"])[0][-300:]
        )
    except subprocess.TimeoutExpired:
        result["error"] = f"no answer within {timeout:g} s; is a firewall between the processes?"
    return {**result, "seconds": time.monotonic() - began}


def _smoke_rank() -> None:
    """One process of `smoke`: the ranks' numbers must add up."""
    world = distributed.init_distributed()
    total = distributed.sum_over_ranks(
        torch.full((1024,), float(world.rank + 1), device=world.device), world
    )
    expected = world.size * (world.size + 1) / 2
    if not bool((total == expected).all()):
        raise RuntimeError(f"the ranks add up to {total[0].item()}, not {expected}")
    distributed.shutdown_distributed()


def disk(folder: Path) -> dict[str, Any]:
    """Bytes per second to and from the disk under `folder`, and bytes free; None for speeds where it is read-only."""
    present = folder.absolute()
    while not present.exists():
        present = present.parent
    free = shutil.disk_usage(present).free
    facts: dict[str, Any] = {"folder": str(folder), "free": free, "write": None, "read": None}
    if free < 2 * DISK_BYTES:
        return facts
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=present, prefix=".mezzotint-doctor-") as file:
            began = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            facts["write"] = DISK_BYTES / (time.perf_counter() - began)
            if hasattr(os, "posix_fadvise"):  # out of the page cache, or memory would be measured
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                file.seek(0)
                began = time.perf_counter()
                while file.read(1 << 20):
                    pass
                facts["read"] = DISK_BYTES / (time.perf_counter() - began)
    except OSError as error:
        facts["error"] = str(error)
    return facts


def examine_data(data: str, size: int | None, channels: int, seconds: float) -> dict[str, Any]:
    """What the pictures are, how fast they load, and the shift of log-SNR that their resolution asks for.

    Pictures are read in a fixed random order until all are or the time is over, so that part of a set sorted by class
    still speaks for the whole; classes are counted over the whole set.
    """
    size = size or usual_size(data)
    images = open_images(data, size=size, channels=channels, keep_in_memory=False)
    summary = audit_for(images, seconds)
    threads = sorted({1, os.cpu_count() or 1})
    speeds = {str(n): load_speed(images, n) for n in threads}
    said = concerns(summary)
    if max(speeds.values()) < LEAST_IMAGES_PER_SECOND:
        said.append(
            f"no more than {max(speeds.values()):.0f} images/s are loaded; resize once: "
            f"mezzotint prepare {data} FOLDER --size {size}"
        )
    return {
        "source": data,
        "size": size,
        "total": len(images),
        "examined": summary["images"] + len(summary["unreadable"]),
        "audit": summary,
        "images_per_second": speeds,
        # simple diffusion section 2: logsnr(t) + 2 log(64 / d)
        "logsnr_shift": 2 * math.log(REFERENCE / size),
        "overrides": [
            "schedule.name=cosine",
            f"schedule.options.image_d={size}",
            f"schedule.options.noise_d={REFERENCE}",
        ],
        "concerns": said,
    }


def usual_size(data: str) -> int:
    """The largest usual side, in pixels, that half of the first hundred readable pictures reach; at least 32."""
    images = open_images(data, size=SIDES[0], keep_in_memory=False)
    sides: list[int] = []
    for i in range(min(100, len(images))):
        try:
            decoded = images.decode(i)
        except UnreadableImage:
            continue
        sides.append(min(decoded.width, decoded.height))
    return max([side for side in SIDES if sides and side <= median(sides)], default=SIDES[0])


def audit_for(images: ImageDataset, seconds: float) -> dict[str, Any]:
    """`mezzotint.data.audit` of as many pictures as can be read in that time, on all cores, with all labels."""

    def one(i: int) -> DecodedImage | UnreadableImage:
        try:
            return images.decode(i)
        except UnreadableImage as reason:
            return reason

    found, began = Audit(images.size), time.monotonic()
    order = rng.philox("order", 0, 0).permutation(len(images)).tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for chosen in (order[k : k + BLOCK] for k in range(0, len(order), BLOCK)):
            for i, decoded in zip(chosen, pool.map(one, chosen), strict=True):
                found.add(images, i, decoded)
            if time.monotonic() - began > seconds:
                break
    summary = found.summary(images)
    if (names := images.label_names) is None:
        return summary
    counted = Counter(dict.fromkeys(names, 0))
    counted.update(
        "no label" if (k := images.label(i)) is None else names[k] for i in range(len(images))
    )
    present = {name: n for name, n in counted.items() if n}
    return {
        **summary,
        "classes": present,
        "classes_without_images": [name for name in names if not counted[name]],
    }


def load_speed(images: ImageDataset, threads: int, seconds: float = 1.5) -> float:
    """Images per second of the training loader with that many threads, decoded at every read."""
    batch = max(1, min(32, len(images)))
    feed = load_batches(images, seed=0, start_image=0, batch=batch, workers=threads)
    next(feed)
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        next(feed)
        count += batch
    speed = count / (time.perf_counter() - began)
    feed.close()  # type: ignore[attr-defined]
    return speed


def _machine_concerns(found: dict[str, Any]) -> list[str]:
    """What deserves a look before training on this machine."""
    env, rate, together, store = (
        found[k] for k in ("environment", "matmul", "distributed", "disk")
    )
    said = []
    if not env["gpus"] and env["threads"] > 1 and env["load"][0] > 0.5 * env["cores"]:
        said.append(
            f"{env['threads']} threads on {env['cores']} cores with a load of {env['load'][0]:g}: OpenMP collapses "
            "when other jobs share its cores; set OMP_NUM_THREADS=1 or wait"
        )
    if rate["bf16"] < rate["float32"]:
        said.append(
            f"bf16 is slower here than float32 ({rate['bf16'] / 1e9:,.0f} and {rate['float32'] / 1e9:,.0f} GFLOP/s); "
            "set engine.precision=float32"
        )
    for gpu in env["gpus"]:
        if gpu["free"] < 0.9 * gpu["bytes"]:
            said.append(
                f"{gpu['name']}: only {gpu['free'] / 2**30:.1f} of {gpu['bytes'] / 2**30:.1f} GiB are free"
            )
    if not together["passed"]:
        said.append(
            f"{together['processes']} processes do not work together under {together['backend']}: {together['error']}"
        )
    if store["free"] < LEAST_FREE_BYTES:
        said.append(f"{store['folder']}: {store['free'] / 1e9:.1f} GB are free for checkpoints")
    if "error" in store:
        said.append(f"{store['folder']} cannot be written: {store['error']}")
    elif store["write"] is not None and store["write"] < LEAST_WRITE:
        said.append(
            f"{store['folder']} takes {store['write'] / 1e6:.0f} MB/s; large checkpoints will stall training"
        )
    return said


def render(found: dict[str, Any]) -> str:
    """`examine` in lines for a terminal, concerns last."""
    env, rate, together, store, data = (
        found[k] for k in ("environment", "matmul", "distributed", "disk", "data")
    )
    packages = ", ".join(
        f"{name} {version}" for name, version in env["packages"].items() if version
    )
    gpus = [
        f"{g['name']}, {g['free'] / 2**30:.1f} of {g['bytes'] / 2**30:.1f} GiB free"
        for g in env["gpus"]
    ]
    speed = [f"{word} {store[word] / 1e6:,.0f} MB/s" for word in ("write", "read") if store[word]]
    lines = [
        f"python       {env['python']}, torch {env['torch']}; {packages or 'no optional packages'}",
        f"processor    {env['processor']}; {env['cores']} cores, {env['threads']} threads, load {env['load'][0]:g}, "
        f"{env['memory_bytes'] / 2**30:.0f} GiB",
        *[f"gpu {i}        {line}" for i, line in enumerate(gpus)],
        f"matmul       float32 {rate['float32'] / 1e9:,.0f}, bf16 {rate['bf16'] / 1e9:,.0f} GFLOP/s",
        f"distributed  {together['processes']} processes under {together['backend']} "
        f"{'agree' if together['passed'] else 'fail'} ({together['seconds']:.1f} s)",
        f"disk         {store['folder']}: {store['free'] / 1e9:,.0f} GB free"
        + "".join(f", {word}" for word in speed),
    ]
    if data:
        speeds = ", ".join(
            f"{v:,.0f} with {n} thread(s)" for n, v in data["images_per_second"].items()
        )
        lines += [
            f"data         {data['source']} at {data['size']} px: {data['examined']:,} of {data['total']:,} read",
            *[
                f"             {line}"
                for line in describe(data["audit"]).splitlines()
                if not line.startswith("!")
            ],
            f"loading      images/s: {speeds}",
            f"schedule     log-SNR shift for {data['size']} px: 2 log({REFERENCE}/{data['size']}) = "
            f"{data['logsnr_shift']:+.2f}; {' '.join(data['overrides'])}",
            "             (presets of simple diffusion shift by themselves with model.size)",
        ]
    said = found["concerns"]
    return "\n".join([*lines, "", *([f"! {s}" for s in said] or ["no concerns"])])


if __name__ == "__main__":
    _smoke_rank()
