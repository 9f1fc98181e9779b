"""Find the facts on which the choice for a budget depends: data, device and speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from mezzotint.backbones import native_side
from mezzotint.config import Recipe
from mezzotint.core.distributed import World
from mezzotint.core.machine import describe_machine
from mezzotint.data.image_dataset import BUILTIN, ImageDataset, open_images, split_source
from mezzotint.data.shard_index import is_sharded
from mezzotint.models import meta_model, preset_info
from mezzotint.tools.budget import DataFacts, DeviceFacts, MeasureSpeed, Speed
from mezzotint.tools.plan import time_step
from mezzotint.train.dataset import open_recipe_dataset
from mezzotint.train.precision import choose_precision
from mezzotint.train.setup import check_memory

LOOKED_AT = 256  # images whose size is read first, evenly over the data
ANY_SIZE = 32  # for data that comes in any size


def examine_images(recipe: Recipe, size: int = 0) -> DataFacts:
    """Return the facts of a recipe's images, whatever its network; ValueError without images.

    Args:
        size: in pixels; if it exceeds every side of the sample, all images are read.
    """
    source = recipe.data.source
    if is_sharded(source):
        raise ValueError(
            f"{source} holds shards, whose images are not looked at one by one; name a preset and "
            "a size in place of auto, e.g. unet-tiny model.size=64"
        )
    images, own_size = _open_images(recipe)
    classes = images.num_classes
    if split_source(source)[0] in BUILTIN:
        return DataFacts(
            source=source,
            count=len(images),
            num_classes=classes,
            sides=(images.size,),
            largest=None,
            fixed_size=images.size if own_size else None,
        )
    looked = np.linspace(0, len(images) - 1, min(len(images), LOOKED_AT)).astype(int).tolist()
    sides = _sides(images, looked)
    if max(sides, default=0) < size:
        sides = _sides(images, range(len(images)))
    return DataFacts(
        source=source,
        count=len(images),
        num_classes=classes,
        sides=tuple(sides),
        largest=max(sides, default=0),
    )


def _open_images(recipe: Recipe) -> tuple[ImageDataset, bool]:
    """Return the images, and whether they are open in their own size or in ANY_SIZE."""
    data = recipe.data
    options: dict[str, Any] = {
        "columns": {k: v for k, v in dataclasses.asdict(data.columns).items() if v is not None},
        "keep_in_memory": False,
        "full_scale": data.full_scale,
    }
    try:
        return open_images(data.source, **options), True
    except ValueError:  # there is no own size, or a fault that comes again
        return open_images(data.source, size=ANY_SIZE, **options), False


def _sides(images: ImageDataset, numbers: Iterable[int]) -> list[int]:
    """Return the shorter side of each readable image."""
    return [min(size) for i in numbers if (size := images.stored_size(i))]


def examine_data(recipe: Recipe, world: World) -> DataFacts:
    """Return the facts of a recipe's data, of latents and shards without their size."""
    info = preset_info(recipe.preset, **recipe.model)
    is_pixels = info.codec == "pixels" and not recipe.data.codec
    if is_pixels and not is_sharded(recipe.data.source):
        return examine_images(recipe, native_side(info.config))
    dataset = open_recipe_dataset(recipe, info, world)
    return DataFacts(
        source=recipe.data.source,
        count=len(dataset),
        num_classes=dataset.num_classes,
        sides=(),
        largest=None,
    )


def describe_device(recipe: Recipe, world: World) -> DeviceFacts:
    """Return the device of this rank and the precision in which a recipe trains on it."""
    machine = describe_machine(world.device.type)
    threads = f", {machine['threads']} thread(s)" if world.device.type == "cpu" else ""
    return DeviceFacts(
        name=f"{machine['processor']}{threads}",
        precision=choose_precision(recipe.engine, world.device.type),
        ranks=world.size,
        kind=world.device.type,
    )


def make_speed_meter(world: World) -> MeasureSpeed:
    """Return a function that times training steps of a recipe on this rank, once for each batch."""
    device = world.device.type
    known: dict[str, Speed] = {}

    def measure(recipe: Recipe) -> Speed:
        key = repr((recipe.preset, recipe.model, recipe.engine, recipe.objective, recipe.batch))
        if key not in known:
            check_memory(recipe, meta_model(preset_info(recipe.preset, **recipe.model)), world)
            share = max(1, recipe.batch // world.size)
            most = min(recipe.engine.microbatch or share, share)
            precision = choose_precision(recipe.engine, device)
            images, seconds = time_step(recipe, precision, 1, most, device)
            fits = device == "cpu" or images == most
            known[key] = Speed(seconds / images, None if fits else images)
            if device == "cuda":
                torch.cuda.empty_cache()
        return known[key]

    return measure
