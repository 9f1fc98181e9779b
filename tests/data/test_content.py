"""The content of a dataset is the same wherever it lies, and any change of it shows."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.data import content as module
from mezzotint.data.content import Changes, Content, compare, read_content
from mezzotint.data.image_dataset import open_images
from mezzotint.data.latent_dataset import LatentDataset
from mezzotint.data.prepare import prepare_latents, prepare_source

CLASSES = ("ant", "bee", "cow")


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)  # of equal sizes
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes of four images."""
    for k, name in enumerate(CLASSES):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "set" / name / f"{i}.png").write_bytes(png(10 * k + i))
    return tmp_path / "set"


def content(source: Path | str, size: int = 8, captions: bool = False) -> Content:
    return read_content(open_images(source, size=size), captions=captions)


def zip_of(folder: Path, prefix: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for image in sorted(folder.rglob("*.png")):
            file.write(image, prefix + image.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("where", ["slash", "copy", "zip", "zip of a folder", "later"])
def test_a_set_is_the_same_under_another_name_and_in_another_place(folder, tmp_path, where):
    known, source = content(folder), f"{folder}/"
    if where == "copy":
        source = str(
            shutil.copytree(folder, tmp_path / "other" / "place", copy_function=shutil.copy)
        )
    elif where.startswith("zip"):
        source = str(zip_of(folder, "set/images/" if "folder" in where else ""))
    elif where == "later":
        for image in folder.rglob("*.png"):
            image.touch()
    again = content(source)
    assert again.fingerprint == known.fingerprint
    assert compare(known, again) == Changes()


def test_other_file_names_and_another_order_change_nothing_but_the_fingerprint(folder):
    known = content(folder)
    for image in folder.rglob("*.png"):
        image.rename(image.with_stem(f"{9 - int(image.stem)}"))
    again = content(folder)
    assert again.fingerprint != known.fingerprint
    assert not compare(known, again)


def rename_class(folder: Path):
    (folder / "ant").rename(folder / "zebra")
    for i in range(2):
        (folder / "zebra" / f"{i}.png").unlink()


def exchange(folder: Path):
    """Of as many bytes, under the same name."""
    (folder / "bee" / "2.png").write_bytes(png(99))


def move(folder: Path):
    (folder / "ant" / "0.png").rename(folder / "bee" / "9.png")


def other_class(folder: Path):
    shutil.rmtree(folder / "cow")
    (folder / "dog").mkdir()
    (folder / "dog" / "0.png").write_bytes(png(77))


@pytest.mark.parametrize(
    ("change", "changes", "told"),
    [
        (lambda f: (f / "ant" / "9.png").write_bytes(png(50)), Changes(added=1), "1 image added"),
        (lambda f: (f / "cow" / "0.png").unlink(), Changes(removed=1), "1 image removed"),
        (exchange, Changes(replaced=1), "1 image replaced"),
        (move, Changes(relabelled=1), "1 image relabelled"),
        (
            rename_class,
            Changes(removed=2, renamed_classes={"ant": "zebra"}),
            "2 images removed, class ant renamed zebra",
        ),
        (
            other_class,
            Changes(added=1, removed=4, new_classes=("dog",), gone_classes=("cow",)),
            "1 image added, 4 images removed, new class dog, gone class cow",
        ),
    ],
)
def test_a_change_is_counted_and_named(folder, change, changes, told):
    known = content(folder)
    change(folder)
    again = content(folder)
    assert compare(known, again) == changes
    assert str(changes) == told
    assert again.fingerprint != known.fingerprint


def test_captions_count_for_networks_that_read_them(folder):
    def caption(text: str) -> tuple[Content, Content]:
        (folder / "ant" / "0.txt").write_text(text)
        return content(folder), content(folder, captions=True)

    (without, known), (without_2, again) = caption("an ant"), caption("a big ant")
    assert without.fingerprint == without_2.fingerprint
    assert compare(known, again) == Changes(recaptioned=1)


def test_a_large_set_is_read_in_part_and_the_part_is_the_same_everywhere(folder, monkeypatch):
    size = (folder / "ant" / "0.png").stat().st_size
    monkeypatch.setattr(module, "READ_BYTES", 5 * size)
    known, bundle = content(folder), content(zip_of(folder))
    assert 0 < (known.rows["checksum"] > 0).sum() < len(known.rows)
    assert known.fingerprint == bundle.fingerprint
    for k, image in enumerate(sorted(folder.rglob("*.png"))):
        image.write_bytes(png(500 + k))
    seen = (known.rows["checksum"] > 0).sum()
    assert compare(known, content(folder)) == Changes(replaced=int(seen))
    monkeypatch.undo()  # a checksum that only one of the two has does not count
    assert compare(content(zip_of(folder)), content(folder)) == Changes()


def parquet(tmp_path: Path, images: list[bytes], name: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([{"bytes": data, "path": None} for data in images])
    labels = pa.array([CLASSES[i % 3] for i in range(len(images))])
    pq.write_table(pa.table({"image": column, "label": labels}), tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("kind", ["parquet", "npz", "prepared", "latents"])
def test_every_kind_of_set_sees_a_replaced_image_and_knows_its_copy(tmp_path, folder, kind):
    def make(name: str, changed: bool) -> Content:
        place = tmp_path / name
        place.mkdir()
        if kind == "parquet":
            images = [png(i) for i in range(6)]
            images[4] = png(70) if changed else images[4]
            return content(parquet(place, images, "x.parquet"))
        if kind == "npz":
            pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
            pixels[4, 0, 0, 0] ^= changed
            np.savez(place / "x.npz", arr_0=pixels, arr_1=np.arange(6) % 3)
            return content(place / "x.npz")
        if changed:
            exchange(folder)
        if kind == "prepared":
            prepare_source(folder, place / "p", 8, progress=False)
            return content(place / "p")
        prepare_latents(folder, place / "p", 8, "pixels", device="cpu", progress=False)
        return read_content(LatentDataset(place / "p"), captions=False)

    a, b, c = make("a", False), make("b", False), make("c", True)
    assert a.fingerprint == b.fingerprint
    changes = compare(a, c)
    assert changes == Changes(replaced=1)


def test_rows_that_shift_are_not_replaced(tmp_path):
    images = [png(i) for i in range(9)]
    known = content(parquet(tmp_path, images, "a.parquet"))
    assert compare(known, content(parquet(tmp_path, images[3:], "b.parquet"))) == Changes(removed=3)


@pytest.mark.parametrize("option", ["count=60", "count=50,seed=1", "test,count=50"])
def test_drawn_sets_differ_by_what_they_draw(option):
    known = content("shapes:count=50")
    assert known.fingerprint == content("shapes:count=50", size=16).fingerprint
    changes = compare(known, content(f"shapes:{option}"))
    assert changes == (Changes(added=10) if option == "count=60" else Changes(replaced=50))


def test_digits_have_a_content_too():
    assert content("digits:16", size=16).fingerprint == content("digits").fingerprint
    assert compare(content("digits"), content("digits:all")) == Changes(added=297)


def test_the_order_of_the_classes_does_not_count_and_labels_follow_the_names(folder):
    known, dataset = content(folder), open_images(folder, size=8)
    before = [CLASSES[dataset.label(i)] for i in range(len(dataset))]
    order = ("cow", "none", "ant", "bee")
    dataset.relabel(order)
    assert [order[dataset.label(i)] for i in range(len(dataset))] == before
    assert [order[k] for k in dataset.batch(range(len(dataset)))[1].tolist()] == before
    assert (dataset.num_classes, dataset.label_names) == (4, order)
    again = read_content(dataset, captions=False)
    assert again.fingerprint == known.fingerprint
