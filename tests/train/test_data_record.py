"""A run knows its data by content: it resumes on a copy, and refuses or remaps changed data."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.runs import events, small
from mezzotint.models import load_model
from mezzotint.train import data_record
from mezzotint.train.loop import check, train
from mezzotint.train.replay import replay

SHORT = (
    "model.channels=3", "data.flip=false", "batch=8", "log_every_images=8", "samples.count=0",
    "save.every_images=8",
)  # fmt: skip


def recipe(source: Path | str, images: int, *overrides: str):
    return small(f"data.source={str(source)!r}", f"images={images}", *SHORT, *overrides)


def draw(path: Path, seed: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def draw_pets(folder: Path) -> Path:
    for k, name in enumerate(("ant", "bee", "cow")):
        for i in range(4):
            draw(folder / name / f"{i}.png", 10 * k + i)
    return folder


@pytest.fixture
def pets(tmp_path) -> Path:
    return draw_pets(tmp_path / "pets")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 8 images on the images of `pets`."""
    folder = tmp_path_factory.mktemp("trained")
    return train(recipe(draw_pets(folder / "pets"), 8), folder / "run", quiet=True)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def facts(run: Path) -> dict:
    return json.loads((run / "data.json").read_text())


def labels(run: Path) -> tuple[str, ...]:
    names = load_model(run / "model").info.labels
    assert names is not None
    return names


def images_seen(run: Path) -> int:
    return load_model(run / "model").info.images


@pytest.mark.parametrize("where", ["slash", "relative", "copy", "zip"])
def test_a_run_resumes_on_its_data_elsewhere(run, pets, tmp_path, monkeypatch, where):
    before, source = (run / "data.npy").read_bytes(), f"{pets}/"
    if where == "relative":
        monkeypatch.chdir(tmp_path)
        source = "./pets"
    elif where == "copy":
        source = str(
            shutil.copytree(pets, tmp_path / "scratch" / "job-7", copy_function=shutil.copy)
        )
    elif where == "zip":
        source = str(tmp_path / "pets.zip")
        with zipfile.ZipFile(source, "w") as file:
            for image in pets.rglob("*.png"):
                file.write(image, image.relative_to(tmp_path))
    train(recipe(source, 16), run, quiet=True)
    assert images_seen(run) == 16
    assert (run / "data.npy").read_bytes() == before
    assert facts(run)["history"] == []
    assert f"source: {source}" in (run / "recipe.yaml").read_text()


def rename_class(pets: Path):
    (pets / "ant").rename(pets / "zebra")


def remove(pets: Path):
    (pets / "ant" / "0.png").unlink()


def exchange(pets: Path):
    image, other = pets / "bee" / "1.png", pets / "cow" / "1.png"
    content = image.read_bytes()
    image.write_bytes(other.read_bytes())
    other.write_bytes(content)


def remove_class(pets: Path):
    shutil.rmtree(pets / "ant")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rename_class, r"class ant renamed zebra; class numbers would move: bee from 1 to 0, cow"),
        (remove, "1 image removed"),
        (lambda pets: draw(pets / "bee" / "9.png", 5), "1 image added"),
        (lambda pets: draw(pets / "bee" / "1.png", 55), "1 image replaced"),
        (exchange, "2 images relabelled"),
        (remove_class, "4 images removed, gone class ant; class numbers would move: bee from 1"),
        (lambda pets: draw(pets / "dog" / "0.png", 5), "1 image added, new class dog"),
    ],
)
def test_changed_data_is_refused_with_what_changed(run, pets, change, told):
    change(pets)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"pets is not the data .*{told}.*--accept-changed-data"):
        train(recipe(pets, 16), run, quiet=True)
    with pytest.raises(ValueError, match=told):  # a dry run says the same
        check(recipe(pets, 16), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "classes", "told"),
    [
        (
            rename_class,
            ("zebra", "bee", "cow"),
            "class ant renamed zebra; class numbers: 0 is zebra",
        ),
        (remove_class, ("ant", "bee", "cow"), "4 images removed, gone class ant"),
        (remove, ("ant", "bee", "cow"), "1 image removed"),
    ],
)
def test_accepted_changes_keep_the_number_of_every_class_by_name(run, pets, change, classes, told):
    change(pets)
    train(recipe(pets, 16), run, quiet=True, accept_changed_data=True)
    assert images_seen(run) == 16
    assert labels(run) == classes
    assert [told in record["changes"] for record in facts(run)["history"]] == [True]
    assert facts(run)["history"][0]["images"] == 8
    assert [(e["event"], e["images"]) for e in events(run)] == [("data changed", 8)]
    start = check(recipe(pets, 24), run)  # the changed data is now the data of the run
    for i in range(len(start.dataset)):
        label = start.dataset.label(i)
        assert label is not None
        assert start.dataset.name(i).startswith(f"{classes[label]}/")
    if change is rename_class:
        train(recipe(pets, 24), run, quiet=True)
        assert labels(run) == classes
        assert len(facts(run)["history"]) == 1


def test_a_new_class_takes_a_free_number_then_that_of_a_class_that_is_gone(pets, tmp_path):
    four = "model.num_classes=4"
    run = train(recipe(pets, 8, four), tmp_path / "run", quiet=True)
    draw(pets / "aardvark" / "0.png", 70)
    remove_class(pets)
    train(recipe(pets, 16, four), run, quiet=True, accept_changed_data=True)
    assert labels(run) == ("ant", "bee", "cow", "aardvark")
    draw(pets / "dog" / "0.png", 71)
    train(recipe(pets, 24, four), run, quiet=True, accept_changed_data=True)
    assert labels(run) == ("dog", "bee", "cow", "aardvark")
    assert "class numbers: 0 is dog (was ant)" in facts(run)["history"][1]["changes"]
    draw(pets / "emu" / "0.png", 72)
    with pytest.raises(ValueError, match=r"class emu is new.*4 classes, all in use.*--init-from"):
        train(recipe(pets, 32, four), run, quiet=True, accept_changed_data=True)


def test_a_run_begun_without_a_record_resumes_and_gets_one(run, pets):
    for name in (data_record.FACTS, data_record.IMAGES):
        (run / name).unlink()
    remove(pets)
    train(recipe(pets, 16), run, quiet=True)
    assert facts(run)["images"] == 11
    for name in (data_record.FACTS, data_record.IMAGES):
        (run / name).unlink()
    rename_class(pets)  # the names are in its model
    with pytest.raises(ValueError, match="new class zebra, gone class ant"):
        train(recipe(pets, 24), run, quiet=True)


@pytest.mark.parametrize("damage", [b"\x93NUMPY", None])
def test_a_damaged_list_of_images_is_repaired_where_the_fingerprint_is_the_same(run, pets, damage):
    intact = (run / "data.npy").read_bytes()
    (run / "data.npy").write_bytes(intact[:-1] + b"x" if damage is None else damage)
    train(recipe(pets, 16), run, quiet=True)
    assert (run / "data.npy").read_bytes() == intact
    (run / "data.npy").write_bytes(b"")
    remove(pets)
    with pytest.raises(ValueError, match="other images"):
        train(recipe(pets, 24), run, quiet=True)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"label_names": 3}'])
def test_a_damaged_record_is_a_sentence(run, pets, content):
    (run / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json.*remove it"):
        check(recipe(pets, 16), run)


def test_the_rest_of_the_recipe_still_counts(run, pets):
    with pytest.raises(
        ValueError, match=r"(?s)another recipe:\n  data\.crop: adm there, plain asked\n"
    ):
        train(recipe(pets, 16, "data.crop=plain"), run, quiet=True)


def test_a_bundle_replays_with_the_numbers_of_its_classes(pets, tmp_path):
    rename_class(pets)
    bad = ("optim.lr=100", "optim.clip=null")
    run = train(recipe(pets, 8, *bad), tmp_path / "run", quiet=True)  # zebra is class 2 of this run
    (pets / "zebra").rename(pets / "ant")
    with pytest.raises(FloatingPointError):
        train(recipe(pets, 800, *bad), run, quiet=True, accept_changed_data=True)
    bundle = next((run / "bundles").iterdir())
    assert json.loads((bundle / "bundle.json").read_text())["classes"] == ["bee", "cow", "ant"]
    assert replay(bundle, str(pets), device=torch.device("cpu")).fails
