"""Recipes: functions that return one Recipe per preset, as its paper trains it, with the number it reaches there.

A recipe's name is its preset's. One file adds recipes; the scan finds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from mezzotint import config
from mezzotint.config import Ema, Recipe
from mezzotint.core.registry import Registry

registry: Registry[Callable[[], Recipe]] = Registry("recipe", __name__)
recipe = registry.register


def recipe_for(preset: str) -> Recipe:
    """The recipe of a preset; ValueError lists near names."""
    return registry[preset]()


def ema_of(decay: float, batch: int) -> Ema:
    """A paper's per-step decay as a half-life in images: decay^(half_life / batch) = 1/2."""
    return Ema(half_life_images=batch * math.log(0.5) / math.log(decay), rampup=None)


def difference(changed: Recipe) -> str:
    """Where a recipe differs from the one its paper (or this library, for laptop presets) states; one line a field."""
    published = config.to_dict(recipe_for(changed.preset))
    lines = [
        f"  {k}: {a} -> {b}"
        for k, a, b in _leaves(published, config.to_dict(changed), "")
        if a != b
    ]
    title = f"difference from the recipe of {changed.preset}:"
    return "\n".join([title, *(lines or ["  none"])])


def _leaves(old: object, new: object, path: str) -> list[tuple[str, object, object]]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [(path, old, new)]
    keys = list(dict.fromkeys([*old, *new]))
    return [
        leaf for k in keys for leaf in _leaves(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))
    ]
