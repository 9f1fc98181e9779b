"""Recipes: YAML round trip, unknown keys, dotted overrides."""

import pytest

from mezzotint import config
from mezzotint.config import Optim, Recipe
from mezzotint.core.registry import Spec


def test_yaml_round_trip(tmp_path):
    recipe = Recipe(
        preset="uvit-tiny",
        model={"size": 64},
        schedule=Spec("cosine", {"noise_d": 32}),
        optim=Optim(lr=3e-4, betas=(0.9, 0.95), clip=None),
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml(recipe))
    assert config.from_yaml(path) == recipe


def test_overrides_reach_every_depth():
    recipe = config.override(
        Recipe(preset="uvit-tiny"),
        ["images=2e6", "optim.lr=3e-4", "model.size=64", "schedule.name=cosine",
         "schedule.options.noise_d=32", "optim.clip=null", "objective.name=sigmoid",
         "objective.options.bias=-1"],
    )  # fmt: skip
    assert recipe.images == 2_000_000
    assert recipe.optim.lr == 3e-4
    assert recipe.optim.clip is None
    assert recipe.model == {"size": 64}
    assert recipe.schedule == Spec("cosine", {"noise_d": 32})
    assert recipe.objective == Spec("sigmoid", {"bias": -1})


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.l=3", "lr"),
        ("optim.lr=fast", "a number is needed"),
        ("engine.precision=bf17", "bf16"),
        ("imagse=3", "images"),
        ("data.flip=3", "true or false is needed"),
        ("images=0", "at least 1"),
        ("log_every_images=0", r"log_every_images 0 .*1"),
        ("optim.lr=-1", r"optim\.lr -1\.0 must be at least 0"),
        ("engine.microbatch=0", r"engine\.microbatch 0 must be at least 1"),
        ("data.workers=-1", r"data\.workers -1 must be at least 0"),
        ("save.keep=0", r"save\.keep 0 must be at least 1"),
        ("save.every_images=-5", r"save\.every_images -5 must be at least 0"),
        ("samples.steps=0", r"samples\.steps 0 must be at least 1"),
        ("samples.count=-1", r"samples\.count -1 must be at least 0"),
        ("ema.half_life_images=0", r"ema\.half_life_images 0.* must be at least 1"),
        ("ema.half_life_images=.nan", r"half_life_images nan must be"),
        ("grid.count=4", r"no field 'grid'"),
        ("images=1.5", "a whole number is needed"),
        ("label_drop=1.5", "probability"),
        ("optim.betas=[0.9]", "2 are needed"),
        ("optim", "key=value"),
        ("optim.lr.x=1", r"optim\.lr"),
    ],
)
def test_a_wrong_override_names_the_field_and_what_is_allowed(assignment, message):
    with pytest.raises(ValueError, match=message):
        config.override(Recipe(preset="uvit-tiny"), [assignment])


def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: uvit-tiny\noptim: {lrr: 1}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml.*optim\.lrr.*lr"):
        config.from_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml.*mapping"):
        config.from_yaml(path)
    with pytest.raises(ValueError, match=r"nothere\.yaml.*No such file"):
        config.from_yaml(tmp_path / "nothere.yaml")
