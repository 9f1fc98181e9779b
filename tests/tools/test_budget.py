"""The choice of a run for a budget in hours, from given facts and speeds."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from mezzotint import config
from mezzotint.models import presets
from mezzotint.recipes import recipe_for
from mezzotint.tools import budget, measurements
from mezzotint.tools.budget import DataFacts, DeviceFacts, Speed, choose_run, fit_run
from mezzotint.train.optim import learning_rate

ROOT = Path(__file__).parents[2]
LAPTOP = DeviceFacts(name="a laptop", precision="float32")
# Seconds per image at 64 px of a laptop of two cores; `at` makes other machines of it.
TINY = {
    "unet-tiny": 0.02, "uvit-tiny": 0.03, "dimr-tiny": 0.05, "sid2-tiny": 0.05, "diffit-tiny": 0.1,
}  # fmt: skip


def flowers(**changes):
    facts = {
        "source": "flowers",
        "count": 50_000,
        "num_classes": 5,
        "sides": (128,),
        "largest": 128,
    }
    return DataFacts(**{**facts, **changes})


def at(factor=1.0, speeds=TINY):
    """A machine `factor` times as fast as the laptop; the cost grows with the pixels.

    Networks without a speed take too long for every budget.
    """

    def measure(recipe):
        size = recipe.model.get("size", 32)
        return Speed(speeds.get(recipe.preset, 1000) / factor * (size / 64) ** 2)

    return measure


def row(preset, images, distance, size=64):
    return {
        "preset": preset, "data": "EuroSAT", "size": size, "images": images,
        "core_minutes": 30.0, "distance": distance, "held_out": 0.005,
    }  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """Replace the table of measurements."""

    def use(*rows):
        table = {"metric": "FD", "source": "a test", "rows": list(rows)}
        for module in (budget, measurements):
            monkeypatch.setattr(module, "read_table", lambda: table)

    use(row("unet-tiny", 30_000, 0.6), row("uvit-tiny", 25_000, 1.1))
    return use


@pytest.fixture(autouse=True)
def tiny_presets(monkeypatch):
    """Leave out the larger presets, whose speeds no test states."""
    names = [name for name in presets() if name.endswith("-tiny")]
    monkeypatch.setattr(budget, "presets", lambda: names)


def chosen(hours, data=None, machine=None, device=LAPTOP, overrides=()):
    choice = choose_run(hours, data or flowers(), device, machine or at(), overrides)
    return choice.recipe, choice


def test_the_table_is_that_of_the_measurements():
    """If it fails, run `python docs/make_tables.py`."""
    table = runpy.run_path(str(ROOT / "docs" / "make_tables.py"))["time_to_quality"]()
    assert json.loads(measurements.TABLE.read_text()) == table
    assert measurements.rows_of(budget.measured_presets(), 64)


def test_the_measured_family_is_chosen():
    recipe, choice = chosen(1)
    assert recipe.preset == "unet-tiny"
    ranking = re.findall(r"([a-z0-9]+-tiny) ([0-9.]+)", choice.reasons["network"])
    assert {name for name, _ in ranking} == set(budget.measured_presets())
    assert ranking[0][0] == "unet-tiny"
    assert " % of such a run, as far as all are measured: unet-tiny" in choice.reasons["network"]
    distances = [float(distance) for _, distance in ranking]
    assert distances == sorted(distances)
    assert recipe.model == {"size": 64, "num_classes": 5}
    assert recipe.data.source == "flowers"


@pytest.mark.parametrize(
    ("hours", "preset"),
    # In an hour the U-Net sees 153,000 images, the U-ViT 102,000.
    [(0.05, "uvit-tiny"), (0.1, "uvit-tiny"), (3, "unet-tiny")],
)
def test_the_family_may_depend_on_the_time(measured, hours, preset):
    measured(
        row("unet-tiny", 5_000, 9), row("unet-tiny", 100_000, 0.5),
        row("uvit-tiny", 5_000, 4), row("uvit-tiny", 100_000, 0.6),
    )  # fmt: skip
    assert chosen(hours, overrides=("model.size=64",))[0].preset == preset


def test_a_faster_network_may_win_over_one_that_is_better_at_equal_images(measured):
    rows = [(1_000, 8.0), (10_000, 4.0), (100_000, 1.0)]
    measured(
        *(row("unet-tiny", n, d) for n, d in rows),
        *(row("uvit-tiny", n, 0.9 * d) for n, d in rows),
    )
    assert chosen(0.2, machine=at(speeds={**TINY, "uvit-tiny": 0.022}))[0].preset == "uvit-tiny"
    assert chosen(0.2, machine=at(speeds={**TINY, "uvit-tiny": 0.06}))[0].preset == "unet-tiny"


def test_distances_are_interpolated_between_rows_and_constant_after_them():
    rows = [row("unet-tiny", 1_000, 8.0), row("unet-tiny", 100_000, 2.0)]
    expect = measurements.interpolate_distance
    assert expect(rows, 10_000) == pytest.approx(4)  # half-way of both logarithms
    # A network that sees few images is not credited with the distance of many.
    assert expect(rows, 10) == pytest.approx(8 * 100**0.3)
    assert expect(rows, 1e9) == pytest.approx(2)


def test_the_rows_of_the_nearest_size_count(measured):
    measured(row("unet-tiny", 1_000, 8.0), row("unet-tiny", 1_000, 3.0, size=32))
    assert measurements.compare_distances({"unet-tiny": 1_000}, 128)["unet-tiny"] == pytest.approx(
        8
    )
    assert measurements.compare_distances({"unet-tiny": 1_000}, 28)["unet-tiny"] == pytest.approx(3)


def test_networks_are_compared_on_one_dataset(measured):
    cifar = {"data": "CIFAR-10", "size": 32}
    measured(
        row("unet-tiny", 1_000, 8.0), row("unet-tiny", 1_000, 1.0) | cifar,
        row("uvit-tiny", 1_000, 7.0), row("sid2-tiny", 1_000, 2.0) | cifar,
    )  # fmt: skip
    compare = measurements.compare_distances
    assert compare({"unet-tiny": 1e3, "uvit-tiny": 1e3}, 32) == pytest.approx(
        {"unet-tiny": 8.0, "uvit-tiny": 7.0}
    )
    assert compare({"unet-tiny": 1e3, "sid2-tiny": 1e3}, 64)["unet-tiny"] == pytest.approx(1.0)
    assert compare({"uvit-tiny": 1e3, "sid2-tiny": 1e3}, 64) == {}


def test_a_family_measured_for_longer_is_not_nearer_for_that(measured):
    measured(
        row("unet-tiny", 10_000, 2.0), row("unet-tiny", 100_000, 0.5),
        row("uvit-tiny", 10_000, 1.5),
    )  # fmt: skip
    # In half an hour the U-Net sees 76,500 images; the U-ViT, measured up to 10,000, 51,000.
    assert chosen(0.5, overrides=("model.size=64",))[0].preset == "uvit-tiny"


@pytest.mark.parametrize("seen", [1_000, 6_303, 12_345, 1e9])
def test_one_row_of_each_is_enough(measured, seen):
    measured(row("unet-tiny", 6_304, 2.0), row("unet-small", 6_304, 1.0))
    both = {"unet-tiny": seen, "unet-small": seen}
    nearer = measurements.is_nearer("unet-small", "unet-tiny", 64, both)
    assert nearer is (True if seen > 6_000 else None)


@pytest.mark.parametrize(
    ("hours", "size"),
    # 153,000 images an hour at 64 px in 0.85 of the time; 100,000 are enough, 400,000 at 128 px.
    [(0.05, 32), (0.6, 32), (0.7, 64), (8, 64), (11, 128), (1000, 128)],
)
def test_the_size_follows_the_time(hours, size):
    assert chosen(hours)[0].model["size"] == size


@pytest.mark.parametrize(
    ("sides", "size"),
    [((300, 300, 20), 256), ((200,), 128), ((60,), 32), ((28,), 28), ((20,), 16)],
)
def test_the_size_follows_the_images(sides, size):
    facts = flowers(sides=sides, largest=max(sides))
    assert chosen(9000, facts)[0].model["size"] == size


@pytest.mark.parametrize(
    ("hours", "preset", "size"), [(0.3, "uvit-tiny", 32), (3, "unet-tiny", 64)]
)
def test_the_family_is_the_nearest_at_the_size_that_trains(measured, hours, preset, size):
    """U-Net leads at 64 px, U-ViT at 32 px."""
    measured(
        row("unet-tiny", 5_000, 0.5), row("uvit-tiny", 5_000, 0.9),
        row("unet-tiny", 5_000, 0.9, size=32) | {"data": "CIFAR-10"},
        row("uvit-tiny", 5_000, 0.5, size=32) | {"data": "CIFAR-10"},
    )  # fmt: skip
    recipe, choice = chosen(hours)
    assert (recipe.preset, recipe.model["size"]) == (preset, size)
    assert choice.reasons["network"].startswith(f"{preset}, nearest")
    assert f"at {size} px" in choice.reasons["network"]


def test_the_size_may_be_fixed():
    recipe, choice = chosen(0.05, overrides=("model.size=96", "batch=8"))
    assert (recipe.model["size"], recipe.batch) == (96, 8)
    assert "as asked" in choice.reasons["size"]
    assert "little time for 96 px" in choice.warnings[0]
    fixed = flowers(fixed_size=48)
    assert chosen(0.05, fixed)[0].model["size"] == 48


@pytest.fixture
def sizes(monkeypatch):
    """Give the U-Net a larger preset, of 20 million parameters."""
    names = [*budget.presets(), "unet-small"]
    read = budget.read_summary
    monkeypatch.setattr(budget, "presets", lambda: names)
    monkeypatch.setattr(
        budget,
        "read_summary",
        lambda p: {"params": 20_000_000} if p == "unet-small" else read(p),
    )
    small = replace(recipe_for("unet-tiny"), preset="unet-small")
    monkeypatch.setattr(
        budget, "recipe_for", lambda p: small if p == "unet-small" else recipe_for(p)
    )
    monkeypatch.setattr(budget, "size_of", lambda recipe: recipe.model["size"])


@pytest.mark.parametrize(
    ("hours", "machine", "preset", "size"),
    [
        (8, 1, "unet-tiny", 64),
        (8, 60, "unet-small", 64),  # 14.7 M images at 64 px of the 10 M that it needs
        (48, 60, "unet-small", 128),
    ],
)
def test_a_larger_network_needs_half_an_image_per_parameter(sizes, hours, machine, preset, size):
    timed = []

    def measure(recipe):
        timed.append(recipe.preset)
        return at(machine, {**TINY, "unet-small": 0.1})(recipe)

    recipe, choice = chosen(hours, machine=measure)
    assert (recipe.preset, recipe.model["size"]) == (preset, size)
    assert "10,000,000 images" in choice.reasons["network"]
    # What the tiny network cannot do in the time, a larger one cannot: it is not timed.
    assert ("unet-small" in timed) == (machine > 1)


@pytest.mark.parametrize(("distance", "preset"), [(0.3, "unet-small"), (0.7, "unet-tiny")])
def test_measurements_count_more_than_parameters(sizes, measured, distance, preset):
    measured(
        row("unet-tiny", 100_000, 0.5), row("unet-small", 15_000, distance),
        row("uvit-tiny", 100_000, 0.9),
    )  # fmt: skip
    assert chosen(1, machine=at(speeds={**TINY, "unet-small": 0.1}))[0].preset == preset


@pytest.mark.parametrize(
    ("hours", "machine", "distance", "preset"),
    [
        (0.05, 1, 0.3, "unet-tiny"),  # it would see fewer images than were measured
        (0.4, 1, 0.3, "unet-small"),
        (0.4, 1, 0.9, "unet-tiny"),
        (8, 1, 0.3, "unet-small"),  # beyond the measurements it stays nearer
        (8, 1, 0.9, "unet-tiny"),
        (8, 60, 0.9, "unet-small"),  # not nearer then, but by now it sees enough
    ],
)
def test_a_measured_gain_lasts_beyond_the_measurements(
    sizes, measured, hours, machine, distance, preset
):
    measured(
        row("unet-tiny", 10_000, 2.0), row("unet-tiny", 80_000, 0.6),
        row("unet-small", 20_000, 1.0), row("unet-small", 60_000, distance),
    )  # fmt: skip
    machine = at(machine, {**TINY, "unet-small": 0.03})
    recipe, _ = chosen(hours, machine=machine, overrides=("model.size=64",))
    assert recipe.preset == preset


def test_the_parameters_of_a_measured_network_do_not_make_the_images_smaller(sizes, measured):
    measured(row("unet-tiny", 10_000, 2.0), row("unet-small", 5_000, 1.0))
    recipe, _ = chosen(8, machine=at(speeds={**TINY, "unet-small": 0.03}))
    assert (recipe.preset, recipe.model["size"]) == ("unet-small", 64)


@pytest.mark.parametrize(("hours", "batch"), [(0.1, 8), (0.5, 8), (2, 16), (8, 64)])
def test_a_longer_run_takes_larger_batches(hours, batch):
    assert chosen(hours, overrides=("model.size=64",))[0].batch == batch


def test_several_ranks_see_more_images_in_batches_that_they_can_share():
    one = chosen(1)[0]
    three = chosen(1, device=replace(LAPTOP, ranks=3))[0]
    assert three.batch % 3 == 0
    assert three.images == pytest.approx(3 * one.images, rel=0.05)


@pytest.mark.parametrize("hours", [0.01, 0.5, 8, 100, 9999])
def test_the_length_takes_the_time(hours):
    recipe, choice = chosen(hours, overrides=("model.size=64",))
    assert recipe.hours == hours
    assert recipe.images % recipe.batch == 0
    grids = -(-recipe.images // recipe.samples.every_images)
    grid = recipe.samples.count * recipe.samples.steps * 0.02 / 3
    seconds = recipe.images * 0.02 + grids * grid
    assert 0.84 < seconds / (3600 * hours) <= 0.901
    assert grids * grid <= 0.05 * 3600 * hours or (grids, recipe.samples.count) == (1, 1)
    assert grids <= 16
    for every in (recipe.save.every_images, recipe.log_every_images, recipe.samples.every_images):
        assert every % recipe.batch == 0
        assert 0 < every <= recipe.images
    # A checkpoint every ten minutes, a log line every five seconds at most.
    assert recipe.save.every_images * 0.02 <= 600 + recipe.batch * 0.02
    assert recipe.log_every_images * 0.02 > 4
    assert f"{recipe.images:,} images" in choice.reasons["length"]


def test_warm_up_and_average_follow_the_length_and_the_rate_ends_at_zero():
    short, long = chosen(0.05, overrides=("model.size=64",))[0], chosen(100)[0]
    assert short.optim.warmup_images == int(0.05 * short.images)
    assert short.ema.half_life_images == pytest.approx(0.05 * short.images, abs=0.5)
    assert long.optim.warmup_images == recipe_for("unet-tiny").optim.warmup_images
    for recipe in (short, long):
        rates = [learning_rate(recipe.optim, n, recipe.images) for n in (0, 1, recipe.images)]
        assert rates[0] == 0 < rates[1]
        assert rates[2] == pytest.approx(0, abs=1e-12)


def test_what_the_user_sets_stays():
    fields = (
        "optim.decay=constant", "samples.every_images=640", "samples.count=7", "optim.lr=1e-5",
        "ema.half_life_images=99", "seed=4", "save.every_images=0", "batch=10",
    )  # fmt: skip
    recipe, _ = chosen(1, overrides=fields)
    assert config.override(recipe, fields) == recipe
    assert recipe.optim.decay == "constant"
    assert recipe.images % 10 == 0


@pytest.mark.parametrize(
    "fields",
    [
        ("samples.every_images=640",), ("samples.every_images=640", "samples.count=40"),
        ("samples.count=100",), ("samples.sampler=heun",), ("samples.guidance=2",),
        ("samples.sampler=heun", "samples.guidance=2", "samples.every_images=2000"),
    ],
)  # fmt: skip
def test_grids_that_the_user_sets_are_in_the_budget(fields):
    """Two network calls a step of Heun's method or of guidance, four of both; one in the last."""
    recipe, choice = chosen(0.5, overrides=("model.size=64", *fields))
    assert config.override(recipe, fields) == recipe
    grids = -(-recipe.images // recipe.samples.every_images)  # one at the end too
    steps = recipe.samples.steps
    calls = (2 * steps - 1 if "heun" in recipe.samples.sampler else steps) * (
        2 if recipe.samples.guidance else 1
    )
    seconds = recipe.images * 0.02 + grids * recipe.samples.count * calls * 0.02 / 3
    assert 0.84 < seconds / 1800 < 0.91
    assert f"sample grids: {grids};" in choice.reasons["length"]


@pytest.mark.parametrize(
    ("field", "words"),
    [("constant", "the rate stays constant"), ("cosine", "the rate decays to zero")],
)
def test_the_reasons_say_how_the_rate_ends(field, words):
    choice = chosen(1, overrides=(f"optim.decay={field}",))[1]
    assert choice.reasons["length"].endswith(words)


def test_a_shorter_grid_shows_classes_equally_often():
    recipe, _ = chosen(0.02, overrides=("model.size=64",))
    assert 5 < recipe.samples.count < recipe_for("unet-tiny").samples.count
    assert recipe.samples.count % 5 == 0


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_length_is_that_of_the_batch_that_trains(kind):
    """A GPU's step takes as long for 8 images as for 64."""
    asked = []

    def measure(recipe):
        asked.append(recipe.batch)
        return Speed(0.2 / recipe.batch if kind == "cuda" else 0.02)

    device = DeviceFacts(name="a machine", precision="float32", kind=kind)
    fitted = fit_run(0.5, recipe_for("unet-tiny"), flowers(), device, measure).recipe
    assert asked == [8] == [fitted.batch]
    assert fitted.images == pytest.approx(
        0.85 * 1800 / (0.025 if kind == "cuda" else 0.02), rel=0.07
    )
    recipe, _ = chosen(0.5, machine=measure, device=device)
    assert recipe.batch == (64 if kind == "cuda" else 8)
    steps = recipe.images / recipe.batch
    seconds = steps * (0.2 if kind == "cuda" else 0.02 * recipe.batch)
    assert 0.84 < seconds / 1800 < 0.91


def test_a_gpu_takes_smaller_batches_only_for_more_steps():
    """A step of a large network takes as long as its images do."""
    device = DeviceFacts(name="a machine", precision="float32", kind="cuda")
    recipe, _ = chosen(0.1, machine=at(), device=device, overrides=("model.size=64",))
    assert recipe.batch == 8
    assert recipe.images == pytest.approx(0.85 * 360 / 0.02, rel=0.07)
    fixed = chosen(0.1, machine=at(), device=device, overrides=("model.size=64", "batch=32"))[0]
    assert fixed.batch == 32


@pytest.mark.parametrize(
    ("side", "overrides"),
    [(28, ("model.size=28",)), (40, ("model.size=40",)), (64, ("model.emb_dim=64",))],
)
def test_a_size_or_field_that_some_networks_lack_is_no_hindrance(side, overrides):
    """With the real table, whose first preset may not have it."""
    images = flowers(sides=(side,), largest=side)
    recipe, _ = chosen(1, images, overrides=overrides)
    assert recipe.model == {"num_classes": 5, "size": side} | recipe.model
    with pytest.raises(ValueError, match="no_field"):
        chosen(1, images, overrides=(*overrides, "model.no_field=1"))


def test_latents_are_not_taken_for_pixels():
    latents = flowers(sides=(), largest=None)
    recipe = config.override(recipe_for("dimr-latent-tiny"), ["data.source=latents"])
    assert not fit_run(0.01, recipe, latents, LAPTOP, lambda _: Speed(0.1)).warnings


def test_a_preset_keeps_its_network_batch_and_rate():
    published = config.override(recipe_for("uvit-128"), ["data.source=flowers"])
    choice = fit_run(8, published, flowers(), LAPTOP, lambda _: Speed(0.01))
    recipe = choice.recipe
    assert recipe.images == pytest.approx(0.85 * 8 * 3600 / 0.01, rel=0.06)
    assert "network" not in choice.reasons
    same = ("preset", "model", "batch", "objective", "time", "label_drop", "data", "schedule")
    assert all(getattr(recipe, name) == getattr(published, name) for name in same)
    assert recipe.optim.lr == published.optim.lr


def test_a_share_that_does_not_fit_the_device_is_split():
    recipe = fit_run(
        1, recipe_for("unet-tiny"), flowers(), LAPTOP, lambda _: Speed(0.01, 16)
    ).recipe
    assert recipe.engine.microbatch == 16


def test_a_run_without_grids_has_none():
    off = ("samples.every_images=0", "samples.count=0")
    assert all(chosen(1, overrides=(o,))[0].samples.every_images == 0 for o in off)


@pytest.mark.parametrize(
    ("count", "words"),
    [(300, "300 images are too few to generalise"), (1_000, "1,000 images are few: .* copy")],
)
def test_few_images_are_warned_of(count, words):
    _, choice = chosen(8, flowers(count=count))
    assert any(re.search(words, warning) for warning in choice.warnings)
    advice = {300: "with 1,000 one could keep enough", 1_000: "--data flowers:train"}[count]
    assert any(advice in warning for warning in choice.warnings)
    assert chosen(8, flowers(count=5_000))[1].warnings == []


@pytest.mark.parametrize(
    ("count", "size", "augment"), [(300, 32, 0.12), (4_999, 64, 0.15), (5_000, 64, 0.0)]
)
def test_few_images_are_augmented(count, size, augment):
    fixed = (f"model.size={size}",)
    recipe, choice = chosen(1, flowers(count=count), overrides=fixed)
    assert recipe.data.augment == augment
    assert ("augment" in choice.reasons) == (augment > 0)
    recipe, _ = chosen(1, flowers(count=count), overrides=(*fixed, "data.augment=0.3"))
    assert recipe.data.augment == 0.3


def test_too_little_time_is_said_with_what_would_be_enough():
    _, choice = chosen(0.01)
    (warning,) = choice.warnings
    assert "25,000 images take --hours 0.041" in warning
    assert chosen(0.042)[0].images >= 25_000
    assert chosen(0.042)[1].warnings == []


def test_the_comparable_run_is_the_nearest():
    recipe = config.override(recipe_for("unet-tiny"), ["model.size=64", "images=41000"])
    assert "EuroSAT at 64 px after 41,488 images (10 core-minutes): FD-EfficientNet-Lite0 152" in (
        budget.describe_comparable(recipe)
    )
    assert "picture: docs/images/time-to-quality-eurosat.png" in budget.describe_comparable(recipe)
    assert "CIFAR-10" in budget.describe_comparable(config.override(recipe, ["model.size=32"]))
    assert budget.describe_comparable(recipe).startswith("unet-tiny")
    # The picture shows ten minutes.
    longer = config.override(recipe, ["images=70000"])
    assert "picture" not in budget.describe_comparable(longer)
    short = config.override(recipe, ["images=900"])
    assert budget.describe_comparable(short).startswith("worse than unet-tiny on EuroSAT")
    assert "no comparable run" in budget.describe_comparable(recipe_for("uvit-128"))


@pytest.mark.parametrize(
    ("changes", "hours", "overrides", "words"),
    [
        ({"count": 1}, 1, (), "holds 1 image, which"),
        ({}, 1, ("model.size=256",), "a size of 256 pixels is above every image .* is 128 pixels"),
        (
            {"sides": (9,), "largest": 9},
            1,
            (),
            "a size of 16 pixels is above every image .* is 9 pixels",
        ),
        ({}, 1e-5, (), "ends inside the warm-up: it is enough for 0 steps .* --hours 0.0"),
        ({}, 0.1, ("optim.warmup_images=1e6",), "ends inside the warm-up of optim.warmup_images="),
        ({}, 1, ("model.size=0",), "model.size 0 must be at least 1"),
        ({}, 1, ("model.widht=3",), "widht.* did you mean width"),
        ({}, 1, ("hours=3",), "--hours 3"),
    ],
)
def test_bad_requests_are_one_sentence(changes, hours, overrides, words):
    with pytest.raises(ValueError, match=words) as error:
        chosen(hours, flowers(**changes), overrides=overrides)
    assert "\n" not in str(error.value)


def test_the_hours_of_the_error_are_enough():
    with pytest.raises(ValueError, match="--hours") as error:
        chosen(1e-4)
    enough = float(str(error.value).split("at least --hours ")[1].split(",")[0])
    assert 1e-4 < enough < 0.01
    assert chosen(enough)[0].images > 0
