"""`mezzotint train ... --hours`: choice, resume, and what is refused before anything is written."""

from __future__ import annotations

import sys

import pytest

from helpers.image_files import png, write_folder
from helpers.runs import assert_same_run
from mezzotint import cli, config
from mezzotint.recipes import recipe_for
from mezzotint.tools import budget, budget_facts, measurements
from mezzotint.tools.budget import Speed
from mezzotint.train import loop

# A network that trains on a hundred images of 16 px in a second.
FIELDS = [
    "model.size=16", "model.width=8", "model.emb_dim=16", "model.multipliers=[1,1]",
    "model.blocks=[1,1]", "model.attention=[false,true]", "model.heads=1", "batch=2",
    "samples.count=2", "samples.steps=2", "engine.precision=float32",
]  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    names = [f"{name}/{i}.png" for name in ("daisy", "rose") for i in range(6)]
    return write_folder(
        tmp_path / "photos", {name: png(i, (20, 16)) for i, name in enumerate(names)}
    )


@pytest.fixture
def speed(monkeypatch):
    """Say how fast a network is, and count how often it is asked; None fails when asked."""
    asked = []

    def use(seconds):
        def measure(recipe):
            assert seconds is not None, "a resumed run is not measured"
            asked.append(recipe.preset)
            return Speed(seconds)

        monkeypatch.setattr(budget_facts, "make_speed_meter", lambda world: measure)
        return asked

    run = {
        "preset": "unet-tiny", "data": "photos", "size": 16, "images": 30_000,
        "core_minutes": 10, "distance": 0.6, "held_out": 0.1,
    }  # fmt: skip
    table = {"metric": "FD", "source": "a test", "rows": [run]}
    for module in (budget, measurements):
        monkeypatch.setattr(module, "read_table", lambda: table)

    use(0.2)
    return use


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["mezzotint", *map(str, args)])
    cli.main()


def refused(monkeypatch, capsys, *args):
    """Return the sentence that the command prints before it ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *args)
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("mezzotint: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


def test_auto_trains_a_folder_and_a_resumed_run_keeps_its_length(
    photos, speed, tmp_path, monkeypatch, capsys
):
    """A run that stopped at its first sample grid goes on as if it never had."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ("train", "auto", *FIELDS, "--data", photos, "--hours", "0.003", "--out")
    run(monkeypatch, *command, whole)
    printed = capsys.readouterr().out
    assert "12 images, 2 classes" in printed
    assert "network  unet-tiny" in printed
    assert "! 12 images are too few" in printed
    recipe = config.from_yaml(whole / "recipe.yaml")
    assert (recipe.preset, recipe.hours, recipe.model["num_classes"]) == ("unet-tiny", 0.003, 2)
    assert recipe.images == 44  # of 10.8 s, nine tenths less two grids, at 0.2 s an image
    assert recipe.optim.decay == "cosine"
    assert [p.name for p in sorted((whole / "samples").iterdir())] == [
        f"{images:012}.png" for images in (22, 44)
    ]

    with monkeypatch.context() as broken:
        broken.setattr(loop, "draw_grid", stop)
        with pytest.raises(RuntimeError, match="power cut"):
            run(broken, *command, cut, "save.every_images=8")
    speed(None)
    capsys.readouterr()
    run(monkeypatch, *command, cut, "save.every_images=8")
    assert "goes on: unet-tiny, 44 images, as --hours 0.003 chose" in capsys.readouterr().out
    assert_same_run(whole, cut)

    for words, *changed in (
        ("began with --hours 0.003 and goes on to its 44 images", "train", "auto", "0.006"),
        ("trains unet-tiny, not uvit-tiny", "train", "uvit-tiny", "0.003"),
    ):
        name, preset, hours = changed
        error = refused(
            monkeypatch, capsys, name, preset, "--data", photos, "--hours", hours, "--out", cut
        )
        assert words in error


def stop(*_):
    raise RuntimeError("power cut")


def test_a_run_goes_on_from_its_store_on_a_new_machine(
    photos, speed, tmp_path, monkeypatch, capsys
):
    """Nothing is timed again, and another start is compared with the run of the store."""
    store = f"file://{tmp_path / 'store'}"
    command = (
        "train",
        "auto",
        *FIELDS,
        "--data",
        photos,
        "--hours",
        "0.0028",
        f"save.store={store}",
    )
    run(monkeypatch, *command, "--out", tmp_path / "first")
    first = config.from_yaml(tmp_path / "first" / "recipe.yaml")
    speed(None)
    run(monkeypatch, *command, "--out", tmp_path / "second")
    assert f"{store} goes on: unet-tiny, {first.images:,} images" in capsys.readouterr().out
    assert config.from_yaml(tmp_path / "second" / "recipe.yaml").images == first.images
    other = [*command[:-3], "--hours", "1", command[-1]]
    words = refused(monkeypatch, capsys, *other, "--out", tmp_path / "third")
    assert f"{store} began with --hours 0.0028" in words
    assert not (tmp_path / "third").exists()


def test_a_run_without_hours_is_not_given_any(photos, speed, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    run(
        monkeypatch, "train", "unet-tiny", *FIELDS, "images=4", "samples.count=0",
        "model.num_classes=2", "--data", photos, "--out", folder,
    )  # fmt: skip
    error = refused(
        monkeypatch, capsys,
        "train", "unet-tiny", "--data", photos, "--hours", "1", "--out", folder,
    )  # fmt: skip
    assert "began without --hours and goes on to its 4 images" in error


def test_a_dry_run_prints_the_choice_and_writes_nothing(
    photos, speed, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    run(
        monkeypatch, "train", "unet-tiny", *FIELDS, "model.num_classes=2", "--data", photos,
        "--hours", "1", "--out", out, "--dry-run",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "length   16,178 images" in printed
    assert "optim.decay: constant -> cosine" in printed
    assert "hours: None -> 1.0" in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("auto --data PHOTOS", "add --hours H, e.g. --hours 8"),
        ("auto --data PHOTOS --hours 0", "--hours 0.0 must be above 0"),
        ("auto --data PHOTOS --hours -3", "--hours -3.0 must be above 0"),
        ("auto --data PHOTOS --hours nan", "--hours nan must be above 0"),
        ("auto --data PHOTOS --hours inf", "--hours inf must be above 0 and at most 10,000"),
        ("auto --data PHOTOS --hours 1e9", "at most 10,000"),
        ("unet-tiny images=64 --data PHOTOS --hours 1", "--hours 1 and images=64 both set"),
        ("unet-tiny hours=3 --data PHOTOS", "hours=3: a budget is an option of train: --hours 3"),
        ("auto --hours 1", "no data given; add --data FOLDER"),
        ("auto --data EMPTY --hours 1", "EMPTY holds no files"),
        ("auto --data ONE --hours 1", "holds 1 image, which a model can only repeat"),
        ("auto --data NOWHERE --hours 1", "no data at"),
        ("auto --data PHOTOS --hours 1", "a size of 16 pixels is above every image"),
        ("unet-tiny model.size=64 --data PHOTOS --hours 1", "is above every image"),
        (
            "diffit-latent-tiny data.augment=0.1 --data PHOTOS --hours 1",
            "data.augment 0.1 needs a network on pixels",
        ),
        ("auto --data PHOTOS --hours 1 --recipe x.yaml", "leave --recipe x.yaml out"),
        ("auto model.size=8 --data PHOTOS --hours 1e-4", "ends inside the warm-up"),
        ("unet-tiny-few-steps --data PHOTOS --hours 1", "length as images=N, not --hours"),
        ("unet-tiny --recipe few.yaml --data PHOTOS --hours 1", "few.yaml tunes to few steps"),
        (
            "unet-tiny model.size=8 optim.warmup_images=1e6 --data PHOTOS --hours 1",
            "ends inside the warm-up of optim.warmup_images=1000000",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_and_writes_nothing(
    args, words, speed, tmp_path, monkeypatch, capsys
):
    write_folder(tmp_path / "PHOTOS", {f"{i}.png": png(i) for i in range(3)})
    write_folder(tmp_path / "ONE", {"a.png": png(0, (40, 40))})
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "few.yaml").write_text(config.to_yaml(recipe_for("unet-tiny-few-steps")))
    monkeypatch.chdir(tmp_path)
    assert words in refused(monkeypatch, capsys, "train", *args.split(), "--out", "run")
    assert not (tmp_path / "run").exists()
