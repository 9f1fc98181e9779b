"""Recipes: one function per preset, which returns its Recipe as published.

A recipe has the name of its preset; its docstring holds the result that the paper reports. With
`-few-steps` after the name it is that of `few_steps`. To add recipes, add a file to this folder.
The sizes of a preset are at the end of its backbone's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from mezzotint import config
from mezzotint.config import Ema, Optim, Recipe, SampleGrid, Save, Time
from mezzotint.core.boxed import refuse_boxed
from mezzotint.core.registry import Registry, Spec

registry: Registry[Callable[[], Recipe]] = Registry("preset", __name__)
recipe = registry.register

WARMUP = 0.015  # of a `-small` or `-base` run; our choice
FEW_STEPS = "-few-steps"
STAGES = 8  # of a `-few-steps` run; the last has r/t = 1 - n(t) / 256, which ECT ends with too


def recipe_for(preset: str) -> Recipe:
    """Return the recipe of a preset, or of its tuning, `PRESET-few-steps`.

    Errors: ValueError lists near names.
    """
    name = preset.removesuffix(FEW_STEPS)
    refuse_boxed(name)
    recipe = registry[name]()
    return recipe if name == preset else few_steps(recipe)


def ema_from_decay(decay: float, batch: int) -> Ema:
    """Return the average of a paper's per-step decay: decay^(half_life_images / batch) = 1/2."""
    return Ema(half_life_images=batch * math.log(0.5) / math.log(decay), rampup=None)


def few_steps(teacher: Recipe) -> Recipe:
    """Return the recipe that tunes a trained network of `teacher`'s to sample in 1 to 4 steps.

    ECT's (specs/consistency.md): noise levels, RAdam, batch, average, dropout of `-small`; of
    `-tiny` and `-mini` batch and rate are for CPU minutes, and there is no dropout: at 1e-3 two
    steps got worse (docs/few-steps.md). Start it with --init-from.
    """
    batch, images, dropout = 128, 12_800_000, {}
    optim, ema = Optim(name="radam", lr=1e-4, betas=(0.9, 0.999)), ema_from_decay(0.9999, batch)
    if teacher.preset.endswith(("-tiny", "-mini")):
        batch, images = 16, teacher.images // 4
        optim, ema = replace(optim, lr=2e-4, betas=(0.9, 0.99)), Ema()
    elif teacher.preset.endswith("-small") and not teacher.preset.startswith("dimr"):
        dropout = {"dropout": 0.2}
    return replace(
        teacher,
        model={**teacher.model, **dropout},
        # ECT: ln sigma ~ N(-1.1, 2.0^2)
        schedule=Spec("lognormal", {"mean": -1.1, "std": 2.0}),
        objective=Spec("consistency", {"stage_images": images // STAGES}),
        time=Time(sampling=teacher.time.sampling),
        optim=optim,
        ema=ema,
        images=images,
        batch=batch,
        log_every_images=100 * batch,
        samples=SampleGrid(
            every_images=images // STAGES,
            count=teacher.samples.count,
            sampler="consistency",
            steps=2,
        ),
        save=Save(every_images=images // STAGES),
    )


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
