"""What the data tells a run: images without a label, classes to come, images that are enlarged."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from helpers.data import open_recipe_data
from helpers.runs import small
from mezzotint.cli import training
from mezzotint.data import loader
from mezzotint.data.prepare import prepare_source
from mezzotint.models import load_model
from mezzotint.sampling.sample import sample
from mezzotint.train import step
from mezzotint.train.dataset import data_notes
from mezzotint.train.loop import check, train

TINY = ("model.channels=3", "images=16", "samples.count=8", "samples.every_images=16", "batch=8")


def png(seed: int, side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, labels: list[int | None]) -> Path:
    images = pa.array([{"bytes": png(i), "path": None} for i in range(len(labels))])
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int64())}), path)
    return path


@pytest.fixture
def partly(tmp_path) -> Path:
    """Six images, two of them without a label: one null, one -1 as in test splits of the hub."""
    return parquet(tmp_path / "x.parquet", [0, None, 1, 1, -1, 0])


@pytest.mark.parametrize("prepared", [False, True])
def test_images_without_a_label_train_the_null_label_and_are_counted(
    partly, tmp_path, capsys, prepared
):
    source = partly
    if prepared:
        source = tmp_path / "set"
        prepare_source(partly, source, 8, progress=False)
    run = train(small(f"data.source={str(source)!r}", *TINY), tmp_path / "run")
    printed = "".join(capsys.readouterr())
    assert printed.count("2 of 6 images have no label and train the null label") == 1
    assert json.loads((run / "data.json").read_text())["unlabelled"] == 2
    assert (run / "samples" / "000000000016.png").is_file()


def test_a_missing_label_becomes_the_null_label_of_the_batch(partly):
    recipe = small(f"data.source={str(partly)!r}", "label_drop=0", "batch=6", *TINY[:-1])
    dataset = open_recipe_data(recipe)
    loaded = next(loader.load_batches(dataset, seed=0, start_image=0, batch=6))
    assert loaded.labels is not None
    batch = step.make_batch(recipe, dataset, 2, loaded, torch.device("cpu"))
    assert sorted(loaded.labels.tolist()) == [-1, -1, 0, 0, 1, 1]
    assert batch.cond.label is not None
    expected = [2 if label == -1 else label for label in loaded.labels.tolist()]
    assert batch.cond.label.tolist() == expected


def test_a_network_without_a_null_label_refuses_them_when_the_data_is_opened(partly, tmp_path):
    from mezzotint import config
    from mezzotint.backbones import needs_label
    from mezzotint.models import preset_info
    from mezzotint.recipes import recipe_for

    preset = "dimr-tiny"
    no_null = ["model.null_label=false", "model.size=16", "label_drop=0"]
    recipe = config.override(recipe_for(preset), [f"data.source={str(partly)!r}", *no_null])
    assert needs_label(preset_info(preset, **recipe.model).config)
    with pytest.raises(
        ValueError, match=r"2 of 6 images of .* have no label, and dimr-tiny has no"
    ):
        check(recipe, tmp_path / "run")


def class_folders(root: Path, side: int = 8) -> Path:
    for k, name in enumerate(("ant", "bee", "cow")):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(png(10 * k + i, side))
    return root


def test_more_classes_than_names_train_draw_and_sample(tmp_path):
    source = class_folders(tmp_path / "set")
    recipe = small(f"data.source={str(source)!r}", "model.num_classes=10", *TINY)
    run = train(recipe, tmp_path / "run", quiet=True)
    assert (run / "samples" / "000000000016.png").is_file()
    model = load_model(run / "model")
    assert model.info.config.num_classes == 10
    assert model.info.labels == ("ant", "bee", "cow")
    images = sample(model, seeds=[0, 1], label=["cow", "7"], steps=2)
    assert images.shape == (2, 3, 8, 8)
    training.report(run)
    assert "ant" in (run / "report.html").read_text()


def test_fewer_classes_than_names_are_refused_before_the_first_step(tmp_path):
    source = class_folders(tmp_path / "set")
    recipe = small(f"data.source={str(source)!r}", "model.num_classes=2", *TINY)
    with pytest.raises(ValueError, match=r"3 classes, more than model\.num_classes=2"):
        train(recipe, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("kind", ["folder", "prepared", "buckets", "fits"])
def test_enlarged_images_are_told(tmp_path, kind):
    source, overrides = class_folders(tmp_path / "set", 12), ["model.size=16"]
    expected = "9 of 9 images are smaller than 16 x 16 pixels (e.g. 12 x 12) and are enlarged"
    if kind == "prepared":
        prepare_source(source, tmp_path / "p", 8, progress=False)
        source, expected = tmp_path / "p", expected.replace("12 x 12", "8 x 8")
    elif kind == "buckets":
        overrides.append("data.buckets=[[16,24],[16,16]]")
    elif kind == "fits":
        overrides = ["model.size=8"]
    start = check(small(f"data.source={str(source)!r}", *TINY, *overrides), tmp_path / "run")
    told = [note for note in data_notes(start.info, start.dataset) if "buckets:" not in note]
    assert told == ([] if kind == "fits" else [expected])


def test_train_and_its_dry_run_say_that_images_are_enlarged(tmp_path, capsys):
    source = class_folders(tmp_path / "set", 4)
    recipe = small(f"data.source={str(source)!r}", *TINY)
    train(recipe, tmp_path / "run")
    told = "9 of 9 images are smaller than 8 x 8 pixels (e.g. 4 x 4) and are enlarged"
    assert told in "".join(capsys.readouterr())
    training.train(
        "unet-tiny",
        ("model.size=32", "images=64"),
        data=str(source),
        out=tmp_path / "b",
        dry_run=True,
    )
    assert "! 9 of 9 images are smaller than 32 x 32 pixels" in capsys.readouterr().out


def grey_and_heic(root: Path) -> tuple[Path, list[str]]:
    root.mkdir()
    for i in range(8):
        deep = (np.linspace(0, 4095, 64).reshape(8, 8) - i).clip(0).astype(np.uint16)
        Image.fromarray(deep).save(root / f"{i}.png")
    (root / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    return root, ["grey of 16 bits: full scale 4095", "pip install pillow-heif"]


def two_label_columns(root: Path) -> tuple[Path, list[str]]:
    root.mkdir()
    images = pa.array([{"bytes": png(i), "path": None} for i in range(8)])
    table = pa.table({"image": images, "label": ["a", "b"] * 4, "species": ["x", "y"] * 4})
    pq.write_table(table, root / "x.parquet")
    return root / "x.parquet", ["columns: image 'image', label 'label'", "label 'species'"]


def rows_of_no_image(root: Path) -> tuple[Path, list[str]]:
    root.mkdir()
    for i in range(8):
        (root / f"{i}.png").write_bytes(png(i))
    rows = [f"{i}.png,{'ab'[i % 2]}" for i in (*range(6), 30)]
    (root / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    return root, ["1 of 7 rows of 'metadata.csv' name no image", "2 of 8 images have no label"]


@pytest.mark.parametrize("make", [grey_and_heic, two_label_columns, rows_of_no_image])
def test_train_and_its_dry_run_print_the_notes_of_the_data(tmp_path, capsys, make):
    source, told = make(tmp_path / "set")
    fields = ["model.num_classes=0"] if make is grey_and_heic else []
    train(small(f"data.source={str(source)!r}", *TINY, *fields), tmp_path / "run")
    printed = "".join(capsys.readouterr())
    assert [words for words in told if printed.count(words) != 1] == []
    fields = (*fields, "model.size=8", "images=64")
    training.train("unet-tiny", fields, data=str(source), out=tmp_path / "b", dry_run=True)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("! ")]
    assert [words for words in told if words not in "".join(lines)] == []


@pytest.mark.parametrize("field", ["lanes=4", "missing=skip", "cache_gb=3", "shuffle_images=64"])
def test_fields_of_shards_without_shards_are_refused(field, tmp_path):
    with pytest.raises(ValueError, match=r"digits is no address.*data\.shards does nothing"):
        train(small(f"data.shards.{field}"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
