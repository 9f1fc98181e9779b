"""What training leaves to read: log.jsonl, one line per window of images, with the loss split by log-SNR."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.ranks import World, add_ranks

# Edges of the log-SNR bins of the logged loss; the outer two bins are open.
EDGES = torch.arange(-10.0, 11.0, 4.0)
BINS = len(EDGES) + 1
# A window is a row of sums: loss, images, gradient norm, steps, then loss per bin, images per bin.
WINDOW = 4 + 2 * BINS


def new_window(device: torch.device) -> Tensor:
    """Sums since the last log line, all zero; float64, so that adding a million losses loses nothing."""
    return torch.zeros(WINDOW, dtype=torch.float64, device=device)


def add_losses(window: Tensor, losses: Tensor, logsnr: Tensor) -> None:
    """Add one microbatch's losses (b,) at their log-SNR (b,), without leaving the device."""
    losses = losses.detach().double()
    bins = torch.bucketize(logsnr.float(), EDGES.to(logsnr.device))
    window[0] += losses.sum()
    window[1] += len(losses)
    window[4 : 4 + BINS].index_add_(0, bins, losses)
    window[4 + BINS :].index_add_(0, bins, torch.ones_like(losses))


def add_norm(window: Tensor, norm: Tensor, world: World) -> None:
    """Add one step's gradient norm, which is the same on all ranks and counted on the first."""
    if world.main:
        window[2] += norm
        window[3] += 1


def summary(window: Tensor, world: World) -> dict[str, Any]:
    """The window's means, over all ranks; resets it. Empty bins are left out."""
    total = add_ranks(window.clone(), world).tolist()
    window.zero_()
    between = [f"{a:.0f}..{b:.0f}" for a, b in pairwise(EDGES.tolist())]
    names = [f"<{EDGES[0]:.0f}", *between, f">{EDGES[-1]:.0f}"]
    sums, counts = total[4 : 4 + BINS], total[4 + BINS :]
    return {
        "loss": total[0] / max(total[1], 1),
        "grad_norm": total[2] / max(total[3], 1),
        "loss_by_logsnr": {n: s / c for n, s, c in zip(names, sums, counts, strict=True) if c},
    }


class Log:
    """Append-only JSON lines that a resumed run first cuts back to where its checkpoint was."""

    def __init__(self, path: Path, images: int):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _images(line) <= images]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        temporary.replace(path)

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
    """All whole records of a log."""
    return [json.loads(line) for line in path.read_text().splitlines() if _images(line) < math.inf]
