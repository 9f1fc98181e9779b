"""Choose the run for a budget in hours: network, size, batch, length and learning rate.

`choose_run` and `fit_run` are functions of facts that `tools.budget_facts` finds: the data, the
device, and a network's seconds per image. Their recipe is an ordinary one, its length in images.
Measurements decide the family, see `tools.measurements`. The constants below are our choice where
nothing is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from typing import NamedTuple

from mezzotint import config
from mezzotint.backbones import native_side
from mezzotint.config import Recipe, SampleGrid
from mezzotint.data.image_dataset import split_source
from mezzotint.evaluate.memorization import QUANTILE
from mezzotint.models import meta_model, preset_info, presets
from mezzotint.recipes import recipe_for
from mezzotint.sampling.sample import count_network_calls
from mezzotint.tools.measurements import (
    compare_distances,
    is_nearer,
    measured_part,
    read_table,
    rows_of,
)
from mezzotint.tools.summary import format_count, read_summary
from mezzotint.train.sample_grid import grid_settings

SIZES = (16, 28, 32, 64, 128, 256)  # of images in training, in pixels; 28 is MNIST's
NETWORK_SIZE = 64  # the network is chosen at this size, that of most measurements
GROWTH = ("tiny", "mini", "small", "base")  # sizes of a family, as its presets are named
# Fewest images seen that justify 64 pixels, half of a tiny recipe's; proportional to the pixels.
LEAST_IMAGES = 100_000
# Fewest images seen per parameter that justify a larger network; published runs see 2 to 17.
IMAGES_PER_PARAMETER = 0.5
LEAST_STEPS = 20  # of a run: a twentieth of them, the warm-up, is one step
# Steps and batches between which `choose_run` stays. After 3 minutes a batch of 8 was better than
# 16, and 16 than 32 (benchmarks/results/choices-eurosat.json).
FEWEST_STEPS, MOST_STEPS, SMALLEST_BATCH, LARGEST_BATCH = 2_000, 20_000, 8, 64
LEAST_GAIN = 1.1  # steps for which a batch is halved, as a multiple of those before
# Parts of the time for the start, checkpoints and what a timed step leaves out, and for grids.
MARGIN, GRIDS = 0.1, 0.05
MOST_GRIDS, LOG_LINES, LOG_SECONDS, CHECKPOINTS_PER_HOUR = 16, 200, 5, 6
# Longest warm-up and half-life of the average, as parts of a run (EDM: arXiv 2206.00364 table 7).
WARMUP = HALF_LIFE = 0.05
# The fewer images, the sooner a network repeats them (arXiv 2310.02664).
FEW_IMAGES, HUNDREDS = 5_000, 500
# Probability of augmentation for few images, up to 32 pixels and above: EDM's on CIFAR-10 and FFHQ
# (arXiv 2206.00364 appendix F.2).
AUGMENT_SMALL, AUGMENT = 0.12, 0.15


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a choice depends on in the data.

    sides: shorter side of each image of a sample, in pixels; () for latents and shards.
    largest: of all images; None for images that are drawn, and for latents and shards.
    fixed_size: the only size in which the images come, if there is one.
    """

    source: str
    count: int
    num_classes: int
    sides: tuple[int, ...]
    largest: int | None
    fixed_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """One rank's device, the precision of its passes, and the number of ranks.

    kind: cpu or cuda.
    """

    name: str
    precision: str
    ranks: int = 1
    kind: str = "cpu"


class Speed(NamedTuple):
    """Seconds per image on one rank, and images per pass where its whole share does not fit."""

    seconds: float
    microbatch: int | None = None


MeasureSpeed = Callable[[Recipe], Speed]  # ValueError for a network that cannot be built


class Choice(NamedTuple):
    """A recipe, the reason for each choice by its name, and warnings."""

    recipe: Recipe
    reasons: dict[str, str]
    warnings: list[str]


def least_for_size(size: int) -> float:
    """Return the fewest images that justify a size."""
    return LEAST_IMAGES * (size / NETWORK_SIZE) ** 2


def least_for_parameters(preset: str) -> float:
    """Return the fewest images that justify a network's parameters, where nothing is measured."""
    return IMAGES_PER_PARAMETER * read_summary(preset)["params"]


def choose_run(
    hours: float,
    data: DataFacts,
    device: DeviceFacts,
    measure: MeasureSpeed,
    overrides: Sequence[str] = (),
) -> Choice:
    """Choose network, size, batch and length for a budget.

    Args:
        measure: returns the speed of a recipe's network here, in its batch.
        overrides: fields of the recipe that are fixed already, as for `config.override`.

    Errors: ValueError for fewer than two images, for a size above every image, and as `fit_run`.
    """
    if data.count < 2:
        raise ValueError(
            f"{data.source} holds {data.count} image, which a model can only repeat; give some "
            "hundreds at least"
        )
    recipe, reasons = _choose_network(hours, data, device, measure, overrides)
    images, batch = images_within(hours, measure(recipe), device), recipe.batch
    while images < FEWEST_STEPS * batch and batch // 2 >= SMALLEST_BATCH:
        fewer = images_within(hours, measure(replace(recipe, batch=batch // 2)), device)
        # On a GPU a step of half the batch may take as long: there would be no more steps.
        if fewer < LEAST_GAIN * images / 2:
            break
        images, batch = fewer, batch // 2
    while images > MOST_STEPS * batch and 2 * batch <= LARGEST_BATCH:
        batch *= 2
    batch = max(1, batch // device.ranks) * device.ranks
    if data.count < FEW_IMAGES:
        augment = AUGMENT_SMALL if size_of(recipe) <= 32 else AUGMENT
        recipe = replace(recipe, data=replace(recipe.data, augment=augment))
    recipe = config.override(replace(recipe, batch=batch), overrides)
    if recipe.data.augment:
        reasons["augment"] = f"{recipe.data.augment:g} of EDM's augmentations, for few images"
    choice = fit_run(hours, recipe, data, device, measure, overrides)
    return choice._replace(reasons={**reasons, **choice.reasons})


def any_recipe(make: Callable[[str], Recipe]) -> Recipe:
    """Return the recipe of the first measured preset whose network can be built.

    Errors: ValueError of the first, where none can be.
    """
    first: ValueError | None = None
    for preset in measured_presets():
        try:
            recipe = make(preset)
            size_of(recipe)
            return recipe
        except ValueError as error:
            first = first or error
    assert first is not None, "some are measured"
    raise first


def images_within(hours: float, speed: Speed, device: DeviceFacts) -> float:
    """Return about how many images all ranks train on in a budget."""
    return (1 - MARGIN - GRIDS) * 3600 * hours * device.ranks / speed.seconds


def _choose_network(
    hours: float,
    data: DataFacts,
    device: DeviceFacts,
    measure: MeasureSpeed,
    overrides: Sequence[str],
) -> tuple[Recipe, dict[str, str]]:
    """Choose family, network and size, in this order."""

    @cache
    def draft(preset: str, size: int) -> Recipe:
        recipe = recipe_for(preset)
        if device.kind == "cuda":  # slow per image in the small batches of a CPU's recipes
            recipe = replace(recipe, batch=max(recipe.batch, LARGEST_BATCH))
        model = {"size": size, "num_classes": data.num_classes}
        source = replace(recipe.data, source=data.source)
        return config.override(replace(recipe, model=model, data=source), overrides)

    @cache
    def images(preset: str, size: int) -> float:
        try:
            return images_within(hours, measure(draft(preset, size)), device)
        except ValueError:  # no network of this size
            return 0.0

    fixed = any(assignment.startswith("model.size=") for assignment in overrides)
    sizes = _usual_sizes(data)
    if fixed:
        sizes = [size_of(any_recipe(lambda preset: draft(preset, NETWORK_SIZE)))]
    check_size(sizes[-1], data)
    size = max((s for s in sizes if s <= NETWORK_SIZE), default=sizes[0])
    if not any(images(preset, size) for preset in measured_presets()):
        measure(any_recipe(lambda preset: draft(preset, size)))  # raises what is wrong
    preset, family = _choose_family(images, size)
    preset, network = _grow_network(images, preset, size)
    if fixed:
        chosen, reason = size, "as asked"
    else:
        chosen, reason = _choose_size(images, preset, size, sizes)
        if chosen != size:  # another family may be the nearest there
            preset, family = _choose_family(images, chosen)
            preset, network = _grow_network(images, preset, chosen)
    reasons = {"network": f"{family}; {network}" if network else family}
    return draft(preset, chosen), {**reasons, "size": f"{chosen} px, {reason}"}


_Images = Callable[[str, int], float]  # images that a preset sees at a size; 0 without a network


def _choose_family(images: _Images, size: int) -> tuple[str, str]:
    """Return the tiny preset of least expected distance after the images that it sees here."""
    seen = {preset: images(preset, size) for preset in measured_presets()}
    seen = {preset: n for preset, n in seen.items() if n}
    expected, part = compare_distances(seen, size), measured_part(seen, size)
    ranking = sorted(expected, key=lambda preset: expected[preset])
    row = rows_of(ranking, size)[ranking[0]][-1]
    values = ", ".join(f"{preset} {expected[preset]:.3g}" for preset in ranking)
    return ranking[0], (
        f"{ranking[0]}, nearest to real images of those measured on {row['data']} at "
        f"{row['size']} px ({read_table()['metric']}{_at_part(part)}: {values})"
    )


def _at_part(part: float) -> str:
    """Return words for a part of a run that is not all of it."""
    return (
        f" after {100 * part:.2g} % of such a run, as far as all are measured" if part < 1 else ""
    )


def measured_presets() -> list[str]:
    """Return the measured tiny presets."""
    names = dict.fromkeys(row["preset"] for row in read_table()["rows"])
    return [name for name in names if name in presets() and name.endswith(GROWTH[0])]


def _grow_network(images: _Images, preset: str, size: int) -> tuple[str, str]:
    """Return the largest preset of the family that sees enough images, and why."""
    reasons = []
    for word in GROWTH[1:]:
        larger = f"{preset.rpartition('-')[0]}-{word}"
        if larger not in presets():
            continue
        seen = images(preset, size)
        least = max(least_for_size(size), least_for_parameters(larger))
        measured = bool(rows_of((larger, preset), size))
        # A larger network is no faster: it is timed only where it is measured, or where the
        # smaller one sees enough.
        seen_larger = images(larger, size) if measured or seen >= least else 0.0
        nearer = None
        if measured and seen_larger:
            nearer = is_nearer(larger, preset, size, {preset: seen, larger: seen_larger})
        if nearer is not None:
            better = nearer
            reasons.append(f"{larger} measured {'nearer' if better else 'no nearer'} than {preset}")
        else:
            better = seen_larger >= least
            reasons.append(
                f"{larger} ({format_count(read_summary(larger)['params'])} parameters) "
                f"{'sees' if better else 'would not see'} the {least:,.0f} images that it needs"
            )
        if not better:
            break
        preset = larger
    return preset, "; ".join(reasons)


def _choose_size(images: _Images, preset: str, size: int, sizes: list[int]) -> tuple[int, str]:
    """Return the largest of `sizes`, from `size` up or down, that is seen often enough, and why."""

    def least(size: int) -> float:
        parameters = 0.0 if rows_of((preset,), size) else least_for_parameters(preset)
        return max(least_for_size(size), parameters)

    def enough(size: int) -> bool:
        return images(preset, size) >= least(size)

    at = sizes.index(size)
    while at + 1 < len(sizes) and enough(sizes[at + 1]):
        at += 1
    while at > 0 and not enough(sizes[at]):
        at -= 1
    if at + 1 == len(sizes):
        return sizes[at], "the largest usual size that half of the images reach"
    needed = f"{least(sizes[at + 1]):,.0f} images seen"
    return sizes[at], f"because {sizes[at + 1]} px would need {needed}"


def _usual_sizes(data: DataFacts) -> list[int]:
    """Return the usual sizes that half of the images reach; 16 and 28 only below 32 pixels."""
    if data.fixed_size is not None:
        return [data.fixed_size]
    reached = [size for size in SIZES if size <= median(data.sides)]
    return [size for size in reached if size >= 32] or reached[-1:] or [SIZES[0]]


def size_of(recipe: Recipe) -> int:
    """Return the side of a recipe's input in pixels; of one that is oblong, of the equal square.

    Errors: ValueError for an unknown preset or field.
    """
    return native_side(preset_info(recipe.preset, **recipe.model).config)


def check_size(size: int, data: DataFacts) -> None:
    """Raise ValueError where every image is smaller than `size`."""
    if data.largest is not None and size > data.largest:
        raise ValueError(
            f"a size of {size} pixels is above every image of {data.source}: the shorter side of "
            f"the largest is {data.largest} pixels; set model.size to that or less"
        )


def fit_run(
    hours: float,
    recipe: Recipe,
    data: DataFacts,
    device: DeviceFacts,
    measure: MeasureSpeed,
    overrides: Sequence[str] = (),
) -> Choice:
    """Choose the length of a recipe for a budget, and what follows from the length.

    Warm-up and half-life are parts of the length, and the rate decays to zero at its end. Sample
    grids, checkpoints and log lines are evenly spaced.

    Args:
        overrides: see `choose_run`.

    Errors: ValueError for a budget that ends inside the warm-up.
    """
    check_size(size_of(recipe), data)
    speed = measure(recipe)
    seconds = speed.seconds / device.ranks
    budget, per_sample = 3600 * hours, seconds * _steps_per_sample(recipe)
    samples, grids = _fit_grids(recipe, per_sample, budget, data.num_classes, overrides)
    grid, per_image = samples.count * per_sample, 0.0
    if _is_set("samples.every_images", overrides) and samples.every_images:
        # Grids that are asked for take a part of each image's time, and one is at the end.
        per_image, grids = grid / samples.every_images, 1
    per_step = (seconds + per_image) * recipe.batch
    steps = int(((1 - MARGIN) * budget - grids * grid) / per_step)
    if steps < LEAST_STEPS:
        least = LEAST_STEPS * per_step
        one = min(grids, 1) * (grid if _is_set("samples.count", overrides) else per_sample)
        needed = max(least / (1 - MARGIN - GRIDS), (least + one) / (1 - MARGIN)) / 3600
        raise ValueError(
            f"--hours {hours:g} ends inside the warm-up: it is enough for {max(steps, 0)} steps of "
            f"batch {recipe.batch} at {1 / seconds:,.3g} images/s; give at least "
            f"--hours {_round_up(needed)}, or take a smaller batch, network or size"
        )
    images = steps * recipe.batch

    def every(parts: float) -> int:
        return math.ceil(steps / max(1, parts)) * recipe.batch

    optim, ema = recipe.optim, recipe.ema
    warmup = min(optim.warmup_images, int(WARMUP * images))
    half_life = min(ema.half_life_images, round(HALF_LIFE * images))
    checkpoints = hours * CHECKPOINTS_PER_HOUR
    fitted = replace(
        recipe,
        hours=hours,
        images=images,
        optim=replace(optim, warmup_images=warmup, decay="cosine"),
        ema=replace(ema, half_life_images=half_life),
        log_every_images=every(min(max(LOG_LINES, checkpoints), 3600 * hours / LOG_SECONDS)),
        samples=replace(samples, every_images=every(grids) if grids else 0),
        save=replace(recipe.save, every_images=every(checkpoints)),
        engine=replace(recipe.engine, microbatch=recipe.engine.microbatch or speed.microbatch),
    )
    fitted = config.override(fitted, overrides)
    if fitted.optim.warmup_images >= images:
        raise ValueError(
            f"--hours {hours:g} is enough for {images:,} images and ends inside the warm-up of "
            f"optim.warmup_images={fitted.optim.warmup_images}; leave that out, or give more hours"
        )
    if _is_set("samples.every_images", overrides):
        asked = fitted.samples.every_images
        grids = math.ceil(images / asked) if asked and fitted.samples.count else 0
    decays = "decays to zero" if fitted.optim.decay != "constant" else "stays constant"
    sides = f", half of them of {median(data.sides):g} px or more" if data.sides else ""
    reasons = {
        "data": f"{data.source}: {data.count:,} images, "
        f"{f'{data.num_classes:,} classes' if data.num_classes else 'no labels'}{sides}",
        "device": f"{device.name}: {1 / seconds:,.3g} images/s in {device.precision}, by a step "
        f"timed now{f', times {device.ranks} processes' if device.ranks > 1 else ''}",
        "length": f"{images:,} images in batches of {fitted.batch}: each image about "
        f"{images / data.count:,.3g} times; sample grids: {grids}; the rate {decays}",
        "expect": describe_comparable(fitted),
    }
    return Choice(
        fitted, reasons, [*_warn_of_length(fitted, seconds), *_warn_of_data(fitted, data)]
    )


def _steps_per_sample(recipe: Recipe) -> float:
    """Return the time of a sample of the grids, in training steps of one image."""
    model = meta_model(preset_info(recipe.preset, **recipe.model))
    # A forward pass is a third of a step (Kaplan et al., arXiv 2001.08361, section 2.1).
    return count_network_calls(model, grid_settings(recipe.samples)) / 3


def _fit_grids(
    recipe: Recipe, per_sample: float, budget: float, num_classes: int, overrides: Sequence[str]
) -> tuple[SampleGrid, int]:
    """Return the grid with as many samples as time allows, and the number of grids.

    A number of samples that is set stays. Another one is whole rows, one per class, where it can.

    Args:
        per_sample, budget: in seconds.
    """
    samples = recipe.samples
    if not (samples.count and samples.every_images):
        return samples, 0
    affordable = GRIDS * budget / per_sample
    count = samples.count
    if not _is_set("samples.count", overrides):
        count = max(1, min(count, int(affordable)))
        count -= count % num_classes if 0 < num_classes < count else 0
    return replace(samples, count=count), max(1, min(MOST_GRIDS, int(affordable / count)))


def _is_set(field: str, overrides: Sequence[str]) -> bool:
    """Return whether a command sets a field, or the group that it is of."""
    given = {assignment.partition("=")[0] for assignment in overrides}
    return bool(given & {field, field.partition(".")[0]})


def _round_up(hours: float) -> str:
    """Return hours with two significant digits, rounded up."""
    unit = 10.0 ** (math.floor(math.log10(hours)) - 1)
    return f"{math.ceil(hours / unit) * unit:.2g}"


def describe_comparable(recipe: Recipe) -> str:
    """Return a sentence about the measured run that is nearest to a recipe's."""
    size, images = size_of(recipe), recipe.images
    family, _, word = recipe.preset.rpartition("-")
    names = [recipe.preset, f"{family}-{GROWTH[0]}"] if word in GROWTH else [recipe.preset]
    rows = next((found[name] for name in names if (found := rows_of((name,), size))), None)
    if rows is None:
        return f"no comparable run is measured for {recipe.preset}"
    row = min(rows, key=lambda r: abs(math.log(r["images"] / images)))
    minutes, far = row["core_minutes"], "worse than " if 2 * images < row["images"] else ""
    picture = f"; picture: {row['picture']} in the repository" if row.get("picture") else ""
    return (
        f"{far}{row['preset']} on {row['data']} at {row['size']} px after {row['images']:,} images"
        f"{f' ({minutes:,.0f} core-minutes)' if minutes else ''}: {read_table()['metric']} "
        f"{row['distance']:.3g}, held-out real images {row['held_out']:.3g}{picture}"
    )


def _warn_of_length(recipe: Recipe, seconds: float) -> list[str]:
    """Warn of a run too short for its size, with the hours that would suffice."""
    info = preset_info(recipe.preset, **recipe.model)
    if (recipe.data.codec or info.codec) != "pixels":
        return []  # what a size of latents needs is not measured
    least = least_for_size(size_of(recipe))
    if recipe.images >= least:
        return []
    hours = least * seconds / (3600 * (1 - MARGIN - GRIDS))
    return [
        f"little time for {size_of(recipe)} px: expect colours and rough shapes; {least:,.0f} "
        f"images take --hours {_round_up(hours)}"
    ]


def _warn_of_data(recipe: Recipe, data: DataFacts) -> list[str]:
    """Warn that a model may copy few images, and say how to check."""
    if data.count >= FEW_IMAGES:
        return []
    what = (
        "are too few to generalise from: samples will be blurs, and later copies"
        if data.count < HUNDREDS
        else "are few: samples may copy them"
    )
    source, split = split_source(data.source)
    if split or not data.sides:
        check = "mezzotint evaluate --train-images looks for copies afterwards"
    elif data.count < 10 / QUANTILE:
        check = f"with {10 / QUANTILE:,.0f} one could keep enough of them to look for copies"
    else:
        check = f"to look for copies afterwards, keep some out of training: --data {source}:train"
    return [f"{data.count:,} images {what}; some thousands are better; {check}"]


def render_choice(choice: Choice) -> str:
    """Lay out a choice as text, warnings last."""
    order = ("data", "device", "network", "size", "augment", "length", "expect")
    lines = [f"{name:8} {choice.reasons[name]}" for name in order if name in choice.reasons]
    return "\n".join([*lines, *(f"! {warning}" for warning in choice.warnings)])
