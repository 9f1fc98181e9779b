"""Columns are chosen by name and said; labels and captions of any type; cells of paths stay in."""

from __future__ import annotations

import io
import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mezzotint import config
from mezzotint.data.columns import caption_text, parse_columns
from mezzotint.data.decode import UnreadableImage
from mezzotint.data.image_dataset import open_images
from mezzotint.data.tables import TableSource, open_table, table_source


def cell(colour: str) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


RED, WHITE = [cell("red")] * 4, [cell("white")] * 4


def table(rows, features=None, **options):
    import datasets

    features = datasets.Features(features) if features else None
    return table_source(datasets.Dataset.from_dict(rows, features=features), "x", **options)


def test_columns_are_chosen_by_name_before_type():
    from datasets import ClassLabel
    from datasets import Image as ImageFeature

    images = {"conditioning_image": ImageFeature(), "image": ImageFeature()}
    source = table({"conditioning_image": WHITE, "image": RED}, images)
    assert source.read(0).convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert "not used, though they may hold the same: image 'conditioning_image'" in source.notes[0]
    labels = {
        "image": ImageFeature(),
        "gender": ClassLabel(names=["f", "m"]),
        "label": ClassLabel(names=["cat", "dog"]),
    }
    rows = {"image": RED, "gender": [0, 1, 0, 1], "label": [0, 1, 1, 0]}
    source = table(rows, labels)
    assert source.label_names == ("cat", "dog")
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 1, 0]
    assert "label 'gender'" in source.notes[0]
    chosen = table(rows, labels, columns={"label": "gender"})
    assert chosen.label_names == ("f", "m")
    assert table(rows, labels, columns={"label": ""}).labels is None
    assert not table({"image": RED, "label": [0, 1] * 2, "text": list("abcd")}).notes


@pytest.mark.parametrize(
    ("columns", "names", "words"),
    [
        ({"species": ["b", "a"] * 2}, ("a", "b"), "label 'species'"),
        ({"target": [3, 4, 3, 4]}, ("3", "4"), "label 'target'"),
        ({"artist": ["b", "a"] * 2, "url": list("wxyz")}, ("a", "b"), "label 'artist'"),
        ({"json": [{"label": 0}, {"label": 1}] * 2}, ("0", "1"), "label 'json.label'"),
        ({"target": [0.1, 0.2, 0.3, 0.4]}, None, "label 'target'"),
        ({"species": ["a", "b"] * 2, "breed": ["c", "d"] * 2}, None, "label 'species', 'breed'"),
        ({"url": list("wxyz")}, None, ""),
    ],
)
def test_a_column_of_another_name_is_taken_where_that_is_plain(columns, names, words):
    source = table({"image": RED, **columns})
    assert source.label_names == names
    assert words in " ".join(source.notes)


@pytest.mark.parametrize("name", ["img_bytes", "content", "pixel_values", "images"])
def test_the_only_column_of_encoded_images_is_taken_by_any_name(tmp_path, name):
    png = RED[0]["bytes"]
    columns = {"id": ["a", "b"], name: pa.array([None, png], pa.binary()), "label": [0, 1]}
    pq.write_table(pa.table({**columns, "hash": pa.array([b"x", b"y"])}), tmp_path / "x.parquet")
    images = open_images(tmp_path / "x.parquet", size=8)
    assert images.image(1)[:, 0, 0].tolist() == [255, 0, 0]
    assert f"image '{name}'" in " ".join(images.report.notes)
    pq.write_table(pa.table({**columns, "mask": [png] * 2}), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"no column of images|can be read"):
        open_images(tmp_path / "two.parquet", size=8)


@pytest.mark.parametrize("columns", [{"text": "caption"}, {"Label": "x"}])
def test_a_role_that_is_none_is_refused(tmp_path, columns):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="allowed: names for image, label, caption"):
        open_images(tmp_path, size=8, columns=columns)


def test_a_chosen_column_must_be_there_and_hold_classes():
    with pytest.raises(ValueError, match=r"columns\.label is 'lable', which is no column.*label"):
        table({"image": RED, "label": [0, 1, 0, 1]}, columns={"label": "lable"})
    with pytest.raises(ValueError, match=r"column 'label' of x holds 4 different.*label: ''"):
        table({"image": RED, "label": [0.1, 0.2, 0.3, 0.4]})
    with pytest.raises(ValueError, match=r"no column of images; columns: y.*image: NAME"):
        table({"y": [1, 2]})


@pytest.mark.parametrize(
    ("labels", "indices", "names"),
    [
        ([2**40, 5, 2**40, None], [1, 0, 1, -1], ("5", str(2**40))),
        ([b"b", b"a", b"b", b"a"], [1, 0, 1, 0], ("a", "b")),
        ([[0, 1], [1, 0], [0, 1], [1, 0]], [1, 0, 1, 0], ("0", "1")),
        ([[1], [0], [1], [0]], [1, 0, 1, 0], ("0", "1")),
        ([True, False, True, None], [1, 0, 1, -1], ("false", "true")),
        ([0.0, 1.0, float("nan"), 1.0], [0, 1, -1, 1], ("0", "1")),
        (["10", "2", "2", ""], [1, 0, 0, -1], ("2", "10")),
    ],
)
def test_label_columns_of_any_type(labels, indices, names):
    source = table({"image": RED, "label": labels})
    assert source.labels is not None
    assert (source.labels.tolist(), source.label_names) == (indices, names)


def test_every_split_of_a_table_has_the_same_classes(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"image": [cell("red")["bytes"]] * 20, "label": ["rare"] + ["b", "a"] * 9 + ["a"]}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    for split in ("train", "test"):
        assert open_table(str(tmp_path / "x.parquet"), split, "parquet").label_names == (
            "a",
            "b",
            "rare",
        )


def chunk_of(*cells: bytes | None) -> pa.StructArray:
    """Return images of a column; one without bytes names a file."""
    paths = pa.array(["a.png" if cell is None else None for cell in cells], pa.string())
    return pa.StructArray.from_arrays([pa.array(cells, pa.binary()), paths], ["bytes", "path"])


@pytest.mark.parametrize(
    ("chunks", "lengths"),
    [
        ([chunk_of(b"abc", None), chunk_of(), chunk_of(b"", b"defg")], [3, -1, 0, 4]),
        ([chunk_of(bytes(k)) for k in range(5000)], list(range(5000))),
        # 2 GiB and more are too many for one array; here they lie in the same MiB.
        ([chunk_of(bytes(1 << 20))] * 2100, [1 << 20] * 2100),
        ([chunk_of(None), *[chunk_of(bytes(1 << 20))] * 2048], [-1, *[1 << 20] * 2048]),
    ],
    ids=["few", "many", "large", "just too large"],
)
def test_the_bytes_of_cells_in_several_chunks(chunks, lengths):
    import datasets

    rows = datasets.table.InMemoryTable(pa.table({"image": pa.chunked_array(chunks)}))
    # Without a name of its own, `datasets` joins the chunks to hash them.
    images = datasets.Dataset(rows, fingerprint="x")
    source = TableSource(images, None, None, None, None, (), ())
    assert source.inventory()[1].tolist() == lengths
    if len(chunks) < 2048:
        whole = datasets.Dataset(rows.combine_chunks(), fingerprint="y")
        assert source.identity() == replace(source, images=whole).identity()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a cat", "a cat"),
        (7, "7"),
        (0.5, "0.5"),
        (None, None),
        (float("nan"), None),
        ("  ", None),
        (["", None, "first", "second"], "first"),
        ([], None),
        ([["nested"]], "nested"),
        ({"raw": "a dog", "id": 3}, "a dog"),
        ({"en": "only"}, "only"),
        ({"id": 3}, None),
        ("über".encode(), "über"),
        ("über".encode("cp1252"), "über"),
        (np.array(["x", "y"]), "x"),
        ("lone \ud800 surrogate", "lone ? surrogate"),
    ],
)
def test_captions_of_any_type(value, text):
    assert caption_text(value) == text


def test_a_deeply_nested_caption_ends():
    value: object = "inside"
    for _ in range(100_000):
        value = [value]
    assert caption_text(value) == "inside"


@pytest.mark.parametrize("column", ["image", "file_name"])
def test_cells_name_only_regular_files_inside(tmp_path, column, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    inside = tmp_path / "set"
    inside.mkdir()
    for path in (inside / "in.png", tmp_path / "out.png", tmp_path / "settings.png"):
        Image.new("RGB", (8, 8), "red").save(path)
    os.mkfifo(inside / "pipe.png")
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    (inside / "device.png").symlink_to("/dev/zero")
    good = ["in.png", "./in.png", "x\\..\\in.png", str(inside / "in.png")]
    bad = [
        *("../out.png", str(tmp_path / "out.png"), "../settings.png", "/dev/zero", "device.png"),
        *("link.png", "pipe.png", "https://a.b/c.png", "file:///etc/passwd", "a\0b", "x" * 5000),
        *(".", "", None, "missing.png"),
    ]
    pq.write_table(pa.table({column: good + bad}), inside / "x.parquet")
    source = open_table(str(inside / "x.parquet"), None, "parquet")
    assert [source.read(i).size for i in range(len(good))] == [(8, 8)] * len(good)
    for i in range(len(good), len(source)):
        with pytest.raises(UnreadableImage):
            source.read(i)
    monkeypatch.setattr("mezzotint.data.tables.MAX_FILE_BYTES", 10)
    with pytest.raises(UnreadableImage, match="at most 10"):
        source.read(0)
    with pytest.raises(ValueError, match="no column of images"):  # nowhere to look for files
        table({"file_name": good})


@pytest.mark.parametrize(
    ("labels", "indices", "names"),
    [
        (np.array([[1], [0]] * 4, np.uint8), [1, 0] * 4, ("0", "1")),
        (np.eye(8), list(range(8)), tuple("01234567")),
        (np.array([2**40, 7] * 4), [1, 0] * 4, ("7", str(2**40))),
        (np.array(["b", "a"] * 4), [1, 0] * 4, ("a", "b")),
        (np.full(8, -1), None, None),
    ],
)
def test_labels_of_an_npz(tmp_path, labels, indices, names):
    np.savez(tmp_path / "x.npz", np.zeros((8, 8, 8, 3), np.uint8), labels)
    images = open_images(tmp_path / "x.npz", size=8)
    assert images.label_names == names
    assert [images.label(i) for i in range(8)] == (indices or [None] * 8)


def test_labels_of_an_npz_that_do_not_fit_are_refused(tmp_path):
    for labels, words in [
        (np.zeros(5, np.int64), "5 labels for 8 images"),
        (np.linspace(0, 1, 8), "no classes"),
        (np.zeros((8, 2, 2)), "float64"),
        (np.full(8, -3), "negative label -3"),
    ]:
        np.savez(tmp_path / "x.npz", np.zeros((8, 8, 8, 3), np.uint8), labels)
        with pytest.raises(ValueError, match=words):
            open_images(tmp_path / "x.npz", size=8)


def test_columns_in_a_recipe_and_on_the_command_line(tmp_path):
    recipe = config.Recipe(preset="unet-tiny")
    changed = config.override(recipe, ["data.columns={image: photo, label: ''}"])
    assert changed.data.columns == config.Columns(image="photo", label="")
    assert config.override(recipe, ["data.columns.caption=alt"]).data.columns.caption == "alt"
    (tmp_path / "r.yaml").write_text(config.to_yaml(changed))
    assert config.from_yaml(tmp_path / "r.yaml") == changed
    with pytest.raises(ValueError, match="lable"):
        config.override(recipe, ["data.columns={lable: x}"])
    assert parse_columns(["image=photo", "label="]) == {"image": "photo", "label": ""}
    for wrong in ("photo", "lable=x"):
        with pytest.raises(ValueError, match="chooses no column"):
            parse_columns([wrong])
    np.savez(tmp_path / "x.npz", np.zeros((2, 8, 8, 3), np.uint8))
    for source in (str(tmp_path / "x.npz"), "shapes:count=5"):
        with pytest.raises(ValueError, match="is no table"):
            open_images(source, size=8, columns={"label": "y"})
