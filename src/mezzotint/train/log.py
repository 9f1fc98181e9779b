"""What training leaves to read: log.jsonl, one line per window of images, with the loss split by log-SNR; events.jsonl
for what is out of the ordinary; unreadable.txt for the pictures that could not be read.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.core.distributed import World, sum_over_ranks
from mezzotint.core.files import atomic_replace

# Edges of the log-SNR bins of the logged loss; the outer two bins are open.
EDGES = torch.arange(-10.0, 11.0, 4.0)
BINS = len(EDGES) + 1
# A window is a row of sums: loss, images, steps; loss per bin, images per bin; gradient norm, of the whole and by part.
HEAD = 3
# Of a log line, what depends on the machine and the hour; all else is a function of the recipe.
MEASURED = ("images_per_second", "tflops", "utilisation", "peak_memory_gib")


def new_window(device: torch.device, parts: int) -> Tensor:
    """Sums since the last log line, all zero; float64, so that adding a million losses loses nothing."""
    return torch.zeros(HEAD + 2 * BINS + 1 + parts, dtype=torch.float64, device=device)


def add(window: Tensor, losses: Tensor, logsnr: Tensor, norms: Tensor, world: World) -> None:
    """Add one step, without leaving the device.

    Args:
        losses, logsnr: this rank's, (b,).
        norms: of the gradient, of the whole and by part; the same on all ranks and counted on the first.
    """
    losses = losses.double()
    bins = torch.bucketize(logsnr.float(), EDGES.to(logsnr.device, non_blocking=True))
    window[0] += losses.sum()
    window[1] += len(losses)
    window[HEAD : HEAD + BINS].index_add_(0, bins, losses)
    window[HEAD + BINS : HEAD + 2 * BINS].index_add_(0, bins, torch.ones_like(losses))
    if world.is_rank0:
        window[2] += 1
        window[HEAD + 2 * BINS :] += norms


def summary(window: Tensor, parts: Sequence[str], world: World) -> dict[str, Any]:
    """The window's means, over all ranks; resets it. Empty bins are left out."""
    total = sum_over_ranks(window.clone(), world).tolist()
    window.zero_()
    between = [f"{a:.0f}..{b:.0f}" for a, b in pairwise(EDGES.tolist())]
    names = [f"<{EDGES[0]:.0f}", *between, f">{EDGES[-1]:.0f}"]
    sums, counts = total[HEAD : HEAD + BINS], total[HEAD + BINS : HEAD + 2 * BINS]
    norm, *by_part = [n / max(total[2], 1) for n in total[HEAD + 2 * BINS :]]
    return {
        "loss": total[0] / max(total[1], 1),
        "grad_norm": norm,
        "loss_by_logsnr": {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c},
        "grad_norm_by_part": dict(zip(parts, by_part, strict=True)),
    }


def measure_speed(
    images: int, seconds: float, flop_per_image: float, peak_tflops: float | None, world: World
) -> dict:
    """Speed and memory: images per second and 1e12 floating-point operations per second of all ranks together.

    Args:
        images: seen by all ranks in `seconds`.
        flop_per_image: of forward and backward pass, without recomputation.
        peak_tflops: of one device; with it, the fraction reached is added.
    """
    speed = images / max(seconds, 1e-9)
    tflops = speed * flop_per_image / 1e12
    cuda = world.device.type == "cuda"
    result = {
        "images_per_second": round(speed, 2),
        "tflops": float(f"{tflops:.4g}"),
        "peak_memory_gib": round(
            (torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()) / 2**30, 3
        ),
    }
    if peak_tflops is not None:
        result["utilisation"] = float(f"{tflops / (peak_tflops * world.size):.4g}")
    return result


def peak_resident_bytes() -> int:
    """The most memory this process has had resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


class Log:
    """Append-only JSON lines that a resumed run first cuts back to where its checkpoint was."""

    def __init__(self, path: Path, images: int):
        self.path = path
        text = path.read_text() if path.exists() else ""
        kept = "".join(f"{line}\n" for line in text.splitlines() if _images(line) <= images)
        if kept != text:
            atomic_replace(path, lambda beside: beside.write_text(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; "images" says where it belongs."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def _images(line: str) -> float:
    """Images seen at a log line; a line cut short by a kill belongs nowhere and is dropped."""
    try:
        return json.loads(line)["images"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read(path: Path) -> list[dict[str, Any]]:
    """All whole records of a log but those of evaluations."""
    return [record for record in _whole(path) if "evaluation" not in record]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The records of evaluations in a log: "images", and in "evaluation" a value for each metric."""
    return [record for record in _whole(path) if "evaluation" in record]


def _whole(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if _images(line) < math.inf]


def append_unreadable(path: Path, found: dict[str, str]) -> int:
    """Add pictures that could not be read to the list at `path`, name and reason a line; returns how many are new."""
    lines = path.read_text().splitlines() if path.exists() else []
    listed = {line.partition("\t")[0] for line in lines}
    new = [
        f"{name}\t{' '.join(reason.split())}"
        for name, reason in found.items()
        if name not in listed
    ]
    if new:
        atomic_replace(
            path,
            lambda beside: beside.write_text(
                "".join(f"{line}\n" for line in sorted([*lines, *new]))
            ),
        )
    return len(new)
