"""Modelled training steps of large presets on an H200 or H100: what `plan` takes without a GPU.

step_times.json comes from `benchmarks/step_model.py`, which counts the kernels of a step; nothing
in it is measured. `python docs/make_tables.py` writes it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from mezzotint.config import Recipe

TABLE = Path(__file__).with_name("step_times.json")
# The rates of the model: those of an H200. An H100 has the same products and slower memory.
FLOPS, BYTES_PER_SECOND = 680e12, {"h200": 3.9e12, "h100": 3.0e12}
# The model leaves out gaps between kernels and counts attention at its best. Our choice, within the
# 5 to 15 % that it states.
OPTIMISM = 1.1


@cache
def read_table() -> dict[str, dict[str, Any]]:
    """Return for each preset: batch, teraflop, and milliseconds of an eager and a compiled step."""
    return json.loads(TABLE.read_text())


def modelled_flops(recipe: Recipe, device: str) -> float | None:
    """Return the FLOP/s that a bf16 step of this recipe reaches by the model.

    On an H100 the time of products stays, and all other time grows as the bandwidth falls: our
    estimate.

    Returns: None for a network or a device that was not modelled.
    """
    row = read_table().get(recipe.preset)
    if row is None or device not in BYTES_PER_SECOND or recipe.model.keys() - {"num_classes"}:
        return None
    flop = row["teraflop"] * 1e12
    seconds = row["compiled" if recipe.engine.compile else "eager"] / 1e3
    products = flop / FLOPS
    other = max(0.0, seconds - products)
    slower = BYTES_PER_SECOND["h200"] / BYTES_PER_SECOND[device]
    return flop / (OPTIMISM * (products + other * slower))
