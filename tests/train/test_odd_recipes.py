"""Odd values in every field of a recipe: a dry run and a start agree, and none is a traceback."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from helpers.runs import small
from mezzotint import backbones, config
from mezzotint.config import Recipe
from mezzotint.core.fields import type_hints
from mezzotint.core.registry import build
from mezzotint.models import meta_model, preset_info
from mezzotint.process import objectives, schedules
from mezzotint.train import loop
from mezzotint.train.nonfinite import NonFiniteError
from mezzotint.train.run_folder import run_lock
from mezzotint.train.setup import setup

ODD = (
    "-1", "0", ".nan", ".inf", "-.inf", "1e30", "-1e308", "9" * 400, "0.5", "1e-300", "[]", "{}",
    "[-1]", "[.nan, 1]", "null", "true", "abc", "'abc:x=1'", "''", "2020-01-01", "1:30",
)  # fmt: skip


def leaves(kind: type, prefix: str = "") -> list[str]:
    """The dotted path of every field of a dataclass."""
    hints = type_hints(kind)
    return [
        path
        for f in dataclasses.fields(typing.cast(typing.Any, kind))
        for path in (
            leaves(hints[f.name], f"{prefix}{f.name}.")
            if dataclasses.is_dataclass(hints[f.name])
            else [prefix + f.name]
        )
    ]


def assignments() -> list[list[str]]:
    """Overrides that set one field of a recipe, network, schedule or objective to an odd value."""
    networks = {
        name: [f"model.{path}" for path in leaves(family.config)]
        for name, family in backbones.registry.items()
    }
    found = [[f"{path}={odd}"] for path in [*leaves(Recipe), *networks["unet"]] for odd in ODD]
    for what, registry in (("schedule", schedules.registry), ("objective", objectives.registry)):
        for name, builder in registry.items():
            options = [option for option in type_hints(builder) if option != "return"]
            found += [
                [f"{what}={{name: {name}}}", f"{what}.options.{option}={odd}"]
                for option in options
                for odd in ODD
            ]
    return found


def recipe_of(changes: list[str]) -> Recipe:
    """A tiny recipe with these changes, whose functions and network's config can be built."""
    recipe = small("images=64", "samples.count=2", *changes)
    info = preset_info(recipe.preset, **recipe.model)
    build(schedules.registry, recipe.schedule or info.schedule)
    build(objectives.registry, recipe.objective)
    return recipe


def survivors(every: int = 1) -> tuple[list[list[str]], int]:
    """Of every n-th override: those that parse, and the number of those refused in a sentence."""
    kept, sentences = [], []
    for changes in assignments()[::every]:
        sentence = refusal(recipe_of, changes)
        if sentence is None:
            kept.append(changes)
        else:
            sentences.append((changes[-1].partition("=")[0], sentence))
    for path, sentence in sentences:
        field = path.rpartition(".")[2]
        assert field in sentence or field in ("name", "model", "options", "row"), (path, sentence)
        assert len(sentence) < 1500, (path, sentence)
    return kept, len(sentences)


# Values of a network's field beyond those of ODD: whole numbers that do not fit together, lists.
ODD_SIZES = (-1, 0, 1, 3, 7, float("nan"), float("inf"), 1e30, 10**9, 0.5, [], [-1], [0], [1, 2],
             [float("nan")], None, True, "abc", "", {}, [[1]], ["res"])  # fmt: skip


def network_refusals(family: str, build_network: bool) -> tuple[int, int]:
    """The number of odd values tried in every field of a family's config, and of those refused."""
    entry = backbones.registry[family]
    preset = next(name for name in entry.presets if name.endswith("tiny"))

    def make(field: str, value: object) -> None:
        info = preset_info(preset, **{field: value})
        if build_network:
            meta_model(info)

    cases = [(f.name, value) for f in dataclasses.fields(entry.config) for value in ODD_SIZES]
    return len(cases), sum(refusal(make, *case) is not None for case in cases)


@pytest.mark.parametrize("family", backbones.registry)
def test_an_odd_field_of_a_network_is_refused_in_a_sentence(family):
    tried, refused = network_refusals(family, build_network=False)
    assert refused > 0.7 * tried


@pytest.mark.slow
@pytest.mark.parametrize("family", backbones.registry)
def test_a_network_that_cannot_be_built_is_refused_in_a_sentence(family):
    tried, refused = network_refusals(family, build_network=True)
    print(f"{family}: {refused} of {tried} odd values refused")
    assert refused > 0.8 * tried


def refusal(action, *args) -> str | None:
    """The sentence with which an action refuses, None for none; any other error is the test's."""
    try:
        action(*args)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def start(recipe: Recipe, folder: Path) -> None:
    """Start as `train` does."""
    loop.check_extras(recipe, None)
    with run_lock(folder, recipe.data.source):
        run = setup(recipe, folder, loop.distributed.init_distributed(), lambda line: None)
        run.writer.close()


def assert_agree(changes: list[str], folder: Path) -> bool:
    """Whether both a dry run and a start take these changes; a dry run writes nothing."""
    recipe = recipe_of(changes)
    dry = refusal(loop.check, recipe, folder)
    assert not folder.exists(), changes
    assert refusal(start, recipe, folder) == dry, changes
    return dry is None


def test_every_odd_value_is_taken_or_refused_in_a_sentence_and_a_start_agrees(tmp_path):
    kept, refused = survivors(every=4)
    print(f"{refused} odd values refused at once, {len(kept)} parse")
    assert refused > 400
    for i, changes in enumerate(kept[::10]):
        assert_agree(changes, tmp_path / str(i))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # engine.compile=true
@pytest.mark.parametrize("part", range(4))
def test_a_dry_run_and_a_start_agree_on_every_odd_value_and_what_starts_trains(tmp_path, part):
    kept, refused = survivors()
    kept = kept[part::4]
    taken = 0
    for i, changes in enumerate(kept):
        if assert_agree(changes, tmp_path / str(i)):
            taken += 1
            recipe = config.override(recipe_of(changes), ["images=32"])
            try:
                loop.train(recipe, tmp_path / f"{i}-trained", quiet=True)
            except NonFiniteError as error:
                print(f"{changes}: {error}")
    print(
        f"{refused} odd values refused at once; part {part} of the others: {taken} of {len(kept)} "
        "train, the others are refused by a dry run and a start"
    )
