"""Measured distances to real images over images seen, and what they say of a run to come.

The rows of `time_to_quality.json`, which docs/make_tables.py writes from benchmarks/results.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TABLE = Path(__file__).with_name("time_to_quality.json")
# A run that sees fewer images than this part of those of the first row is not measured; our choice.
LEAST_PART = 0.8
# Of the fall of the distance before the first row; our choice. The first two rows of U-ViT on
# CIFAR-10 and of U-Net on EuroSAT fall with 0.39 and 0.27.
EXPONENT = 0.3

Row = dict[str, Any]


@cache
def read_table() -> dict[str, Any]:
    """Return the measured distances: metric, source and rows.

    A row has preset, data, size in pixels, images, core_minutes or None, distance, and held_out.
    """
    return json.loads(TABLE.read_text(encoding="utf-8"))


def rows_of(names: Iterable[str], size: int) -> dict[str, list[Row]]:
    """Return the rows of each preset by images seen, all on one dataset; empty if there is none.

    It is the dataset nearest in size of those on which all were measured.
    """
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in sorted(read_table()["rows"], key=lambda row: row["images"]):
        on_data = found.setdefault((row["data"], row["size"]), {})
        on_data.setdefault(row["preset"], []).append(row)
    names = list(names)
    common = [key for key, rows in found.items() if all(name in rows for name in names)]
    if not common:
        return {}
    nearest = min(common, key=lambda key: abs(math.log(key[1] / size)))
    return {name: found[nearest][name] for name in names}


def interpolate_distance(rows: list[Row], images: float) -> float:
    """Return the distance after `images`: log-log between rows, and constant after the last.

    Before the first row it falls as a power of the images, see EXPONENT.
    """
    seen, distances = ([row[key] for row in rows] for key in ("images", "distance"))
    distance = float(np.exp(np.interp(np.log(images), np.log(seen), np.log(distances))))
    return distance * max(1.0, seen[0] / images) ** EXPONENT


def measured_part(seen: Mapping[str, float], size: int) -> float:
    """Return the part of the images `seen`, at most 1, for which all presets are measured."""
    rows = rows_of(seen, size)
    return min(1.0, *(rows[name][-1]["images"] / images for name, images in seen.items()))


def compare_distances(seen: Mapping[str, float], size: int) -> dict[str, float]:
    """Return the distance of each preset after its images seen; empty without common rows.

    If one of them will see more images than its last row, all are compared at the same part of
    their images.
    """
    rows = rows_of(seen, size)
    if not rows:
        return {}
    part = measured_part(seen, size)
    return {name: interpolate_distance(rows[name], part * seen[name]) for name in seen}


def is_nearer(larger: str, smaller: str, size: int, seen: Mapping[str, float]) -> bool | None:
    """Return whether the larger network is nearer to real images; None if that is not measured.

    Where it is measured for a part of the images `seen` only, a lead counts, since it stays. A lag
    does not: the larger network may catch up.
    """
    rows = rows_of((larger, smaller), size)
    if not rows:
        return None
    part = measured_part(seen, size)
    if part * seen[larger] < LEAST_PART * rows[larger][0]["images"]:
        return None
    distances = compare_distances(seen, size)
    nearer = distances[larger] < distances[smaller]
    return nearer if nearer or part == 1 else None
