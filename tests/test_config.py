"""Recipes: YAML round trip, unknown keys, dotted overrides."""

import dataclasses
import re
import time
import typing
from typing import Annotated, Literal

import pytest
import yaml

from mezzotint import backbones, config
from mezzotint.config import Optim, Recipe
from mezzotint.core.fields import Range, check_ranges, type_hints
from mezzotint.core.registry import Spec
from mezzotint.process import objectives, schedules
from mezzotint.sampling.settings import Guidance, SamplingSettings


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


_SIGMOID = Recipe(
    preset="uvit-tiny",
    schedule=Spec("cosine", {"noise_d": 32}),
    objective=Spec("sigmoid", {"bias": 2.0}),
)


@pytest.mark.parametrize(
    ("assignments", "objective"),
    [
        (["objective.name=eps_mse"], Spec("eps_mse")),
        (["objective.name=sigmoid"], Spec("sigmoid", {"bias": 2.0})),
        (["objective.name=min_snr", "objective.options.gamma=3"], Spec("min_snr", {"gamma": 3})),
        (["objective.options.gamma=3", "objective.name=min_snr"], Spec("min_snr", {"gamma": 3})),
    ],
)
def test_a_new_name_drops_the_options_of_the_old_one(assignments, objective):
    recipe = config.override(_SIGMOID, assignments)
    assert recipe.objective == objective
    assert recipe.schedule == _SIGMOID.schedule
    assert config.override(_SIGMOID, ["schedule.name=linear"]).schedule == Spec("linear")


@pytest.mark.parametrize("options", ["3", "[1]", "words"])
def test_options_that_are_no_mapping_are_named_after_a_new_name_too(options):
    typed = f"objective={{name: sigmoid, options: {options}}}"
    for assignments in ([typed], [typed, "objective.name=eps_mse"]):
        with pytest.raises(ValueError, match=r"objective\.options"):
            config.override(_SIGMOID, assignments)


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
        ("lr=1e-3", r"no field 'lr'; did you mean optim\.lr\?"),
        ("half_life_images=5", r"did you mean ema\.half_life_images\?"),
        ("every_images=5", r"evaluate\.every_images or .*save\.every_images"),
        ("data.every_images=5", r"did you mean .*samples\.every_images"),
        ("size=32", r"no field 'size'; .*a field of the network is model\.size"),
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


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.clip=-1", r"optim\.clip -1\.0 must be at least .*null for none"),
        ("optim.clip=0", r"optim\.clip 0\.0 must be"),
        ("optim.eps=.inf", r"optim\.eps inf must be above 0 and at most 10"),
        ("optim.betas=[0.9,1]", r"optim\.betas\[1\] 1\.0 must be .*below 1"),
        ("optim.warmup_images=1e30", r"optim\.warmup_images 1\d+ must be at most|warmup_images"),
        ("ema.rampup=.nan", r"ema\.rampup nan must be"),
        ("ema.rampup=-1", r"ema\.rampup -1\.0 must be"),
        ("ema.half_life_images=.inf", r"ema\.half_life_images inf must be"),
        ("ema.power_stds=[0.1,-1]", r"ema\.power_stds\[1\] -1\.0 must be.*EDM2"),
        ("ema.power_stds=[0.1,0.1]", r"ema\.power_stds .*twice"),
        ("samples.guidance=-1e308", r"samples\.guidance -1e\+308 must be"),
        ("evaluate.guidance=.nan", r"evaluate\.guidance nan must be"),
        ("evaluate.num_images=1", r"evaluate\.num_images 1 must be at least 2"),
        ("engine.peak_tflops=0", r"engine\.peak_tflops 0\.0 must be"),
        ("engine.peak_tflops=-1", r"engine\.peak_tflops -1\.0 must be"),
        ("nonfinite.spike=-1", r"nonfinite\.spike -1\.0 must be above 0"),
        ("seed=-1", r"seed -1 must be at least 0"),
        (f"seed={2**63}", r"seed 9223372036854775808 must be at most|seed .* at most"),
        ("batch=1e30", r"batch 1\d+ must be at least 1 and at most 1,000,000"),
        ("data.buckets=[[64,-1]]", r"data\.buckets\[0\]\[1\] -1 must be"),
    ],
)
def test_a_number_out_of_range_is_refused_with_field_range_and_reason(assignment, message):
    with pytest.raises(ValueError, match=message):
        config.override(Recipe(preset="uvit-tiny"), [assignment])


def test_a_range_holds_in_python_too():
    with pytest.raises(ValueError, match=r"optim\.lr nan must be"):
        Optim(lr=float("nan"))
    with pytest.raises(ValueError, match=r"x is True; a number is needed"):
        check_ranges("x", True, Annotated[float, Range(0, 1)] | None)


NUMBER = Annotated[float, Range(0, 1)]
NAMED = NUMBER | Literal["auto"]


@pytest.mark.parametrize(
    ("value", "kind", "named"),
    [
        (None, NUMBER, "x is None"),
        ("0.5", NUMBER, "x is '0.5'"),
        ("0.5", NUMBER | None, "x is '0.5'"),
        (None, NAMED, "x is None"),
        ((0.5, None), tuple[NUMBER, NUMBER], r"x\[1\] is None"),
        (("0.5",), tuple[NUMBER | None, ...], r"x\[0\] is '0.5'"),
        ((None, 0.5), NUMBER | tuple[NUMBER, ...], r"x\[0\] is None"),
        ((0.5, "y"), Annotated[tuple[float, ...], Range(0, 1)], r"x\[1\] is 'y'"),
    ],
)
def test_what_is_no_number_is_refused_where_a_range_holds(value, kind, named):
    with pytest.raises(ValueError, match=f"{named}; a number is needed"):
        check_ranges("x", value, kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, NUMBER | None), (None, Annotated[float | None, Range(0, 1)]), (0.5, NUMBER | None),
        ("auto", NAMED), ("any", NUMBER | str), ("any", Annotated[float | str, Range(0, 1)]),
        ((None, 0.5), tuple[NUMBER | None, ...]), (("auto", 0.5), tuple[NAMED, NUMBER]),
        (None, NAMED | None), (None, tuple[NUMBER, ...] | None), (None, str | None),
    ],
)  # fmt: skip
def test_none_and_text_are_taken_where_the_type_has_them(value, kind):
    check_ranges("x", value, kind)


def test_every_number_of_a_recipe_has_a_range():
    """A field without one would take nan, infinity and 1e30."""

    def without_range(kind, path):
        origin, parts = typing.get_origin(kind), typing.get_args(kind)
        if dataclasses.is_dataclass(kind):
            hints = type_hints(kind)
            return [
                p
                for f in dataclasses.fields(kind)
                for p in without_range(hints[f.name], f"{path}.{f.name}")
            ]
        if origin is Annotated and any(isinstance(part, Range) for part in parts):
            return []
        if kind in (int, float):
            return [path]
        return [p for part in parts if origin is not Literal for p in without_range(part, path)]

    kinds = [Recipe, Guidance, SamplingSettings, *(f.config for f in backbones.registry.values())]
    assert [p for kind in kinds for p in without_range(kind, kind.__name__)] == []
    builders = [*schedules.registry.values(), *objectives.registry.values()]
    assert [
        f"{builder.__name__}.{name}"
        for builder in builders
        for name, kind in type_hints(builder).items()
        if name not in ("return", "betas") and without_range(kind, name)
    ] == []


@pytest.mark.parametrize(
    "field", ["batch", "optim.betas", "data.buckets", "model.blocks", "trackers"]
)
@pytest.mark.parametrize(
    "text",
    ["[1", "{a: 1", "'x", "!!python/object:os.system x", "&a [*a]", "[" * 5000, "\x00", "@",
     "!!bool foo", '!!int ""', "!!timestamp x", "!x y", "{a: 1, a: 2}"],
)  # fmt: skip
def test_text_that_is_no_yaml_is_a_sentence_with_the_field(field, text):
    with pytest.raises(ValueError, match=rf"(?s)^{re.escape(field)}.* is not YAML: ") as error:
        config.override(Recipe(preset="uvit-tiny"), [f"{field}={text}"])
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "path",
    ["plain", "a b", "back\\slash", "tab\tx", "new\nline", "both'\"quotes", "[1", "x: y", "#1",
     "2024", "1:30", "-x", "~user", "@a", "null.npz", "a\udcff", "é", "true", "{a}"],
)  # fmt: skip
def test_a_path_is_taken_as_it_is_and_survives_the_run_folder(path, tmp_path):
    recipe = config.override(Recipe(preset="uvit-tiny"), [f"evaluate.reference={path}"])
    assert recipe.evaluate.reference == path
    file = tmp_path / "recipe.yaml"
    file.write_text(config.to_yaml(recipe), "utf-8")
    assert config.from_yaml(file) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: [1", "not YAML"),
        ("preset: uvit-tiny\nbatch: -3\n", r"batch -3 must be"),
        ("preset: uvit-tiny\nmodel: {1: 2}\n", "model is"),
        ("preset: uvit-tiny\noptim: 3\n", "optim is 3; a mapping"),
        ("a: &a [x, x]\nb: [*a, *a]\n", "aliases"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\x00", "utf-8"),
        ("preset: " + "x" * 1_000_001, "1,000,000 bytes"),
    ],
)
def test_a_broken_recipe_file_is_a_sentence(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"recipe\.yaml is not a recipe: .*{message}"):
        config.from_yaml(path)
    with pytest.raises(ValueError, match="is not a recipe"):
        config.from_yaml(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["batch: !!bool foo", 'batch: !!int ""', "batch: !!timestamp x", "batch: !x y", "batch: ! 8",
     "batch: !!int 8", 'batch: !!float "."', "batch: !!binary x", "batch: !<tag:y.org,2002:a> 8",
     "optim: !!map {lr: 1}", "optim: !!omap 3", "trackers: !!seq []", "model: !!set [1]",
     "!!str batch: 8", "optim: {!!str lr: 1}", "model: {multipliers: [1, !!int 2]}"],
)  # fmt: skip
def test_a_tag_in_a_recipe_is_refused(tmp_path, line):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"preset: uvit-tiny\n{line}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml is not a recipe: .* tags \(.+\) are not"):
        config.from_yaml(path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("preset: uvit-tiny\nbatch: 64\nbatch: 8\n", "batch"),
        ("preset: uvit-tiny\nbatch: 8\nseed: 1\nbatch: 8\n", "batch"),
        ("preset: uvit-tiny\npreset: unet-tiny\n", "preset"),
        ("preset: uvit-tiny\noptim: {lr: 1}\nimages: 8\noptim: {eps: 0.1}\n", "optim"),
        ("preset: uvit-tiny\noptim: {lr: 0.1, eps: 0.1, lr: 0.2}\n", "lr"),
        ("preset: uvit-tiny\noptim:\n  lr: 0.1\n  lr: 0.2\n", "lr"),
        ("preset: uvit-tiny\nmodel: {size: 8, 'size': 16}\n", "size"),
        (
            "preset: uvit-tiny\nschedule: {name: cosine, options: {noise_d: 8, noise_d: 9}}",
            "noise_d",
        ),
    ],
)
def test_a_key_that_repeats_is_refused(tmp_path, text, key):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.yaml is not a recipe: .*key '{key}' repeats"):
        config.from_yaml(path)


def test_a_key_may_stand_in_several_mappings(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "preset: uvit-tiny\nsamples: {every_images: 8, steps: 2}\nsave: {every_images: 16}\n"
        "objective: {name: sigmoid, options: {bias: -1}}\nschedule: {name: cosine, options: {}}\n"
        "'seed': 3\n"
    )
    recipe = config.from_yaml(path)
    assert (recipe.samples.every_images, recipe.save.every_images, recipe.seed) == (8, 16, 3)
    assert recipe.objective == Spec("sigmoid", {"bias": -1})


def test_many_keys_are_compared_in_time():
    keys = [yaml.ScalarNode("tag:yaml.org,2002:str", f"a{i}") for i in range(40_000)]
    value = yaml.ScalarNode("tag:yaml.org,2002:int", "1")
    node = yaml.MappingNode("tag:yaml.org,2002:map", [(key, value) for key in keys])
    began = time.process_time()
    assert len(config._Loader("").construct_mapping(node)) == 40_000
    assert time.process_time() - began < 2  # each with each: 15 seconds
