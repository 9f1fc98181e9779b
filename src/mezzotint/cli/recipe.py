"""The recipe of a `train` command: that of a preset or file, or one chosen for a budget."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.core.console import echo

if TYPE_CHECKING:
    from mezzotint.config import Recipe
    from mezzotint.core.distributed import World

AUTO = "auto"  # given in place of a preset


def choose_recipe(preset: str, overrides: tuple[str, ...], data: str, file: Path | None) -> Recipe:
    """Return the preset's recipe, or that of a file, with the data and overrides of a command."""
    from mezzotint import config
    from mezzotint.models import presets
    from mezzotint.recipes import recipe_for

    if preset == AUTO:
        raise ValueError("auto chooses a network for a time: add --hours H, e.g. --hours 8")
    if preset not in presets() and difflib.get_close_matches(preset, [AUTO], cutoff=0.7):
        raise ValueError(f"unknown preset {preset!r}; did you mean auto, with --hours H?")
    if not file:
        return apply_changes(recipe_for(preset), data, overrides)
    chosen = config.from_yaml(file)
    if chosen.preset != preset:
        raise ValueError(
            f"{file} is a recipe of {chosen.preset}, not of {preset}; give {chosen.preset}"
        )
    return apply_changes(chosen, data, overrides)


def apply_changes(recipe: Recipe, data: str, overrides: tuple[str, ...]) -> Recipe:
    """Return a recipe with the data and overrides of a command applied."""
    from mezzotint import config

    if data:
        recipe = replace(recipe, data=replace(recipe.data, source=data))
    return config.override(recipe, overrides)


def choose_for_hours(
    hours: float,
    preset: str,
    overrides: tuple[str, ...],
    *,
    data: str,
    file: Path | None,
    out: Path,
    world: World,
) -> Recipe:
    """Return the recipe for a budget in hours; a run that has begun keeps its own.

    All ranks call it together; rank 0 chooses and prints the reasons.

    Errors: ValueError for a given length, for auto with a file, for tuning to few steps, and as
        `recall_choice`.
    """
    from mezzotint.core.distributed import on_rank0
    from mezzotint.tools import budget

    def choose() -> Recipe:
        if length := [a for a in overrides if a.startswith("images=")]:
            raise ValueError(f"--hours {hours:g} and {length[0]} both set the length; give one")
        if preset == AUTO and file:
            raise ValueError(f"auto chooses the recipe; leave --recipe {file} out")
        kept = recall_choice(hours, preset, out)
        if kept is None:
            if preset == AUTO:
                named = budget.any_recipe(lambda name: choose_recipe(name, overrides, data, None))
            else:
                named = choose_recipe(preset, overrides, data, file)
            if named.objective.name == "consistency":
                raise ValueError(
                    f"{file or preset} tunes to few steps in stages of so many images; give its "
                    "length as images=N, not --hours"
                )
            kept = recall_stored_choice(hours, preset, out, named.save.store)
            if kept is None:
                return choose_fitting_recipe(hours, preset, named, overrides, out, world)
        if file:
            echo(f"--recipe {file} was read when the run began, and does not change it now")
        return kept

    # Each rank applies its own data and fields; training compares them at its start.
    return apply_changes(on_rank0(choose, world), data, overrides)


def recall_choice(hours: float, preset: str, folder: Path) -> Recipe | None:
    """Return the recipe of a run that has begun with these hours; None where none has begun.

    Errors: ValueError for a run of other hours or of another preset.
    """
    from mezzotint import config
    from mezzotint.train.run_folder import RECIPE, has_started

    if not ((folder / RECIPE).is_file() and has_started(folder)):
        return None
    return _check_kept(config.from_yaml(folder / RECIPE), hours, preset, str(folder), "--out")


def recall_stored_choice(hours: float, preset: str, folder: Path, store: str) -> Recipe | None:
    """Return the recipe of a run that its store alone holds, e.g. after the loss of a machine.

    store: an address; none if it is empty.

    Errors: see `recall_choice`; StoreUnavailable.
    """
    from mezzotint.train.checkpoint_store import stored_recipe
    from mezzotint.train.run_folder import check_run_folder

    kept = stored_recipe(store) if store else None
    if kept is None:
        return None
    check_run_folder(folder, kept.data.source)
    return _check_kept(kept, hours, preset, store, "save.store")


def _check_kept(kept: Recipe, hours: float, preset: str, place: str, option: str) -> Recipe:
    """Return a run's recipe if it is of these hours and this preset.

    place: what holds the run; option: by which it is given.
    """
    if kept.hours != hours:
        begun = "without --hours" if kept.hours is None else f"with --hours {kept.hours:g}"
        raise ValueError(
            f"{place} began {begun} and goes on to its {kept.images:,} images; start it as it "
            f"began, or give another {option} for --hours {hours:g}"
        )
    if preset not in (AUTO, kept.preset):
        raise ValueError(f"{place} trains {kept.preset}, not {preset}; give another {option}")
    echo(f"{place} goes on: {kept.preset}, {kept.images:,} images, as --hours {hours:g} chose")
    return kept


def choose_fitting_recipe(
    hours: float,
    preset: str,
    named: Recipe,
    overrides: tuple[str, ...],
    out: Path,
    world: World,
) -> Recipe:
    """Return the recipe that fits the data, the machine and the budget; print the reasons.

    named: of the command, with any network for auto.
    """
    from mezzotint.tools import budget, budget_facts
    from mezzotint.train.loop import check_data_given
    from mezzotint.train.run_folder import check_run_folder

    auto = preset == AUTO
    check_data_given(named)
    check_run_folder(out, named.data.source)
    device = budget_facts.describe_device(named, world)
    measure = budget_facts.make_speed_meter(world)
    if auto:
        asked = budget.size_of(named) if "size" in named.model else 0
        facts = budget_facts.examine_images(named, asked)
        choice = budget.choose_run(hours, facts, device, measure, overrides)
    else:
        facts = budget_facts.examine_data(named, world)
        choice = budget.fit_run(hours, named, facts, device, measure, overrides)
    echo(budget.render_choice(choice))
    return choice.recipe
