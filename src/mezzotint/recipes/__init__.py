"""Recipes: one function per preset, which returns its Recipe as published.

A recipe has the name of its preset; its docstring holds the result that the paper reports. To add
recipes, add a file to this folder. The sizes of a preset are at the end of its backbone's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mezzotint import config
from mezzotint.config import Ema, Recipe
from mezzotint.core.boxed import refuse_boxed
from mezzotint.core.registry import Registry

registry: Registry[Callable[[], Recipe]] = Registry("preset", __name__)
recipe = registry.register

WARMUP = 0.015  # of a `-small` or `-base` run; our choice


def recipe_for(preset: str) -> Recipe:
    """Return the recipe of a preset; ValueError lists near names."""
    refuse_boxed(preset)
    return registry[preset]()


def ema_from_decay(decay: float, batch: int) -> Ema:
    """Return the average of a paper's per-step decay: decay^(half_life_images / batch) = 1/2."""
    return Ema(half_life_images=batch * math.log(0.5) / math.log(decay), rampup=None)


def small(tiny: Recipe, width: float) -> Recipe:
    """Return the recipe of a family's `-small`, for one consumer GPU or a CPU over a weekend.

    Args:
        tiny: recipe of the family's `-tiny`; only rate, warm-up, batch and length differ.
        width: of the widest layer, over that of `-tiny`.
    """
    return _enlarge(tiny, "small", width, images=5_000_000, batch=64, save_every=100_000)


def base(tiny: Recipe, width: float) -> Recipe:
    """Return the recipe of a family's `-base`, for one or several GPUs over days; see `small`."""
    return _enlarge(tiny, "base", width, images=50_000_000, batch=256, save_every=1_000_000)


def _enlarge(
    tiny: Recipe, size: str, width: float, images: int, batch: int, save_every: int
) -> Recipe:
    optim = replace(
        tiny.optim,
        # Yang et al. (arXiv 2203.03466), table 3: Adam's rate of hidden weights ~ 1 / fan-in. Most
        # weights are hidden, so all share that rate (benchmarks/width_transfer.py).
        lr=tiny.optim.lr / width,
        warmup_images=int(WARMUP * images),
    )
    return replace(
        tiny,
        preset=f"{tiny.preset.removesuffix('tiny')}{size}",
        optim=optim,
        images=images,
        batch=batch,
        log_every_images=100 * batch,
        samples=replace(tiny.samples, every_images=save_every),
        save=replace(tiny.save, every_images=save_every),
    )


def describe_changes(changed: Recipe) -> str:
    """Return one line for each field in which a recipe differs from that of its preset."""
    published = config.to_dict(recipe_for(changed.preset))
    lines = [
        f"  {path}: {old} -> {new}"
        for path, old, new in _pair_fields(published, config.to_dict(changed), "")
        if old != new
    ]
    title = f"difference from the recipe of {changed.preset}:"
    return "\n".join([title, *(lines or ["  none"])])


def _pair_fields(old: object, new: object, path: str) -> list[tuple[str, object, object]]:
    """Return (dotted path, old value, new value) of every field of two nested dictionaries."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [(path, old, new)]
    keys = list(dict.fromkeys([*old, *new]))
    return [
        pair
        for k in keys
        for pair in _pair_fields(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))
    ]
