"""The log of a run: log.jsonl, one line per window of images, with the loss split by log-SNR;
events.jsonl for unusual steps; unreadable.txt for images that could not be read.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.core.distributed import World, sum_over_ranks
from mezzotint.core.files import atomic_write, no_follow
from mezzotint.core.text import escape_name

# Edges of the log-SNR bins of the logged loss; the outer two bins are open.
EDGES = torch.arange(-10.0, 11.0, 4.0)
BINS = len(EDGES) + 1
# A metrics window is one row of sums: HEAD of loss, images, steps; loss per bin; images per bin;
# norm of the whole gradient; norm of each part.
HEAD = 3
# Keys of a log line that depend on the machine. All others depend on the recipe alone.
MEASURED = ("images_per_second", "tflops", "utilisation", "peak_memory_gib")


def new_window(device: torch.device, parts: int) -> Tensor:
    """Return a metrics window of zeros; float64, so that adding a million losses loses nothing.

    Args:
        parts: number of parts of the gradient whose norms are logged.
    """
    return torch.zeros(HEAD + 2 * BINS + 1 + parts, dtype=torch.float64, device=device)


def add_step(window: Tensor, losses: Tensor, logsnr: Tensor, norms: Tensor, world: World) -> None:
    """Add one step to the window, without waiting for the device.

    Args:
        losses, logsnr: of this rank, (b,).
        norms: of the whole gradient, then of each part; equal on all ranks and added on rank 0.
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


def reset_window(window: Tensor, parts: Sequence[str], world: World) -> dict[str, Any]:
    """Return the means over the window and all ranks, without empty bins, and set it to zero."""
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
    """Return images and 1e12 floating-point operations per second of all ranks, and peak memory.

    Args:
        images: seen by all ranks in `seconds`.
        flop_per_image: of forward and backward pass, without recomputation.
        peak_tflops: of one device; given, the fraction of it that is reached is returned too.
    """
    speed = images / max(seconds, 1e-9)
    tflops = speed * flop_per_image / 1e12
    cuda = world.device.type == "cuda"
    peak_bytes = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
    result = {
        "images_per_second": round(speed, 2),
        "tflops": float(f"{tflops:.4g}"),
        "peak_memory_gib": round(peak_bytes / 2**30, 3),
    }
    if peak_tflops is not None:
        result["utilisation"] = float(f"{tflops / (peak_tflops * world.size):.4g}")
    return result


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


class Log:
    """A file of JSON lines. Opening it drops records beyond `images` and a line cut short.

    Lines that cannot be written, e.g. on a full disk, wait for the next `write` or `flush`: the log
    never ends training.

    Args:
        check_folder: raises OSError where nothing may be written to the folder of `path`.
    """

    def __init__(self, path: Path, images: int, check_folder: Callable[[], None] = lambda: None):
        self.path, self.check_folder, self.waiting = path, check_folder, ""
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise ValueError(
                f"{path} is a link or no file; a log is a file of its run folder. Remove it"
            )
        text = path.read_text("utf-8", "replace") if path.exists() else ""
        kept = "".join(f"{line}\n" for line in text.splitlines() if _images_of_line(line) <= images)
        if kept != text:
            atomic_write(path, kept)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, whose "images" are the images seen."""
        self.waiting += json.dumps(record) + "\n"
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, all or none."""
        if not self.waiting:
            return
        try:
            self.check_folder()
            with open(self.path, "ab", buffering=0, opener=no_follow) as file:
                size = file.tell()
                if file.write(data := self.waiting.encode()) < len(data):
                    file.truncate(size)  # no room for all of it
                    return
        except OSError:
            return
        self.waiting = ""


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log without those of evaluations; none where there is no file."""
    return [record for record in _read_records(path) if "evaluation" not in record]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a log: "images", and a value per metric in "evaluation"."""
    return [record for record in _read_records(path) if "evaluation" in record]


def _read_records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _images_of_line(line) < math.inf]


def _images_of_line(line: str) -> float:
    """Return the images seen at a log line; infinity for a line cut short, or of another kind."""
    try:
        images = json.loads(line)["images"]
        return float(images) if type(images) in (int, float) else math.inf
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf


def append_unreadable(path: Path, reasons: dict[str, str]) -> int:
    """Add images that could not be read to the list at `path`; return how many are new to it.

    Args:
        reasons: by name of the image; each line of the file holds a name, a tab and a reason, with
            backslash escapes for bytes that are no UTF-8 and for control characters.
    """
    text = path.read_text("utf-8", "replace") if path.is_file() else ""
    lines = [line for line in text.split("\n") if line]
    listed = {line.partition("\t")[0] for line in lines}
    named = {
        escape_name(name): escape_name(" ".join(reason.split())) for name, reason in reasons.items()
    }
    new = [f"{name}\t{reason}" for name, reason in named.items() if name not in listed]
    if new:
        atomic_write(path, "".join(f"{line}\n" for line in sorted([*lines, *new])))
    return len(new)
