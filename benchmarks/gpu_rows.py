"""Rows of the GPU benchmark: written as they are measured, in time, at a batch that fits."""

from __future__ import annotations

import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
GB = 1e9
FREE = 0.94  # part of the free memory that a step may take; the rest is workspaces and fragments


class Clock:
    """The time that is left of a part.

    Args:
        seconds: of the part, from now on.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the part must end."""
        return self.end - time.monotonic()


class RowFile:
    """One JSON object a line, on the disk before the next is measured; parts append to one file."""

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: Row) -> None:
        """Append a row and show it."""
        line = json.dumps({"part": self.part, **row})
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(line[:400], flush=True)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


# Bytes of a training step in bf16: fixed (weights, gradients, moments, one average) and per image,
# in 1e9, counted by tools.memory on fake tensors.
TRAINING_GB = {
    "dimr-xl-2r-256": (8.9, 0.69),
    "diffit-256": (10.0, 0.36),
    "sid2-256": (7.2, 0.73),
}


def batch_that_fits(preset: str, wanted: int, free_bytes: float) -> int:
    """Return the largest of wanted, wanted / 2, ... whose training step fits; at least 1.

    Presets that are not in `TRAINING_GB` are tiny.
    """
    fixed, each = TRAINING_GB.get(preset, (0.0, 0.0))
    batch = wanted
    while batch > 1 and (fixed + each * batch) * GB > FREE * free_bytes:
        batch //= 2
    return batch


def free_bytes(device: str) -> float:
    """Return the free memory of the GPU; without end for the CPU."""
    return float(torch.cuda.mem_get_info()[0]) if device == "cuda" else float("inf")


def release(device: str) -> None:
    """Free what a row has left."""
    gc.collect()  # a compiled block holds itself
    if device == "cuda":
        torch.cuda.empty_cache()


def guarded(device: str, row: Row, measure: Callable[[], Row]) -> Row:
    """Return row and measure()'s; an error is a finding and must not cost the rows after it."""
    try:
        return {**row, **measure()}
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return {**row, "error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        release(device)


def halving(batch: int, measure: Callable[[int], Row]) -> Row:
    """Return measure(batch), at half the batch where the memory does not suffice, and so on."""
    while True:
        try:
            return {"batch": batch, **measure(batch)}
        except torch.OutOfMemoryError as error:
            if batch == 1:
                raise
            traceback.clear_frames(error.__traceback__)
            batch //= 2
        torch.cuda.empty_cache()


def in_time(
    clock: Clock, tasks: list[tuple[Row, float, Callable[[], Row]]], device: str
) -> Iterator[Row]:
    """Yield the row of every task; one that needs more seconds than are left is not begun."""
    for row, seconds, measure in tasks:
        if clock.left < seconds:
            yield {**row, "error": f"not begun: {clock.left:.0f} s left of {seconds:.0f}"}
        else:
            began = time.monotonic()
            done = guarded(device, row, measure)
            yield {**done, "took": round(time.monotonic() - began, 1)}
