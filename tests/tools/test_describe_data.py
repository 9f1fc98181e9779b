"""How folders, archives and tables were understood, as `mezzotint doctor` shows it."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from mezzotint.cli import tools as commands
from mezzotint.data.image_dataset import open_images
from mezzotint.data.splits import SplitError
from mezzotint.tools import doctor
from mezzotint.tools.describe_data import (
    SOFTWARE,
    check_samples,
    default_samples,
    describe_data,
    render_data,
    save_samples,
    stated_notes,
)

COLOURS = {"ant": "red", "bee": "lime", "cat": "blue"}


def draw(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), colour).save(path)
    return path


def class_folders(root, count=2):
    for name, colour in COLOURS.items():
        for k in range(count):
            draw(root / name / f"{k}.png", colour)
    return root


def make_folder(tmp_path):
    root = class_folders(tmp_path / "set")
    for name in ("README.md", "ant/IMG_1.HEIC", "ant/IMG_2.HEIC"):
        (root / name).write_bytes(b"?")
    (root / "out").symlink_to("/etc/passwd")
    return root


def make_zip(tmp_path):
    class_folders(tmp_path / "set" / "Training", 4)
    class_folders(tmp_path / "set" / "seg_test", 1)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        for path in sorted((tmp_path / "set").rglob("*.png")):
            bundle.write(path, path.relative_to(tmp_path).as_posix())
    return f"{tmp_path / 'a.zip'}:train"


def make_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "image": {"bytes": draw(tmp_path / "x.png", colour).read_bytes(), "path": None},
            "label": name,
            "breed": k % 2,
            "text": f"{name} {k}",
            "title": f"the {name}",
        }
        for name, colour in COLOURS.items()
        for k in range(2)
    ]
    (tmp_path / "set").mkdir()
    for split, part in (("train", rows), ("test", rows[:1])):
        name = f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "set" / name)
    return tmp_path / "set"


def make_captions(tmp_path):
    for k in range(3):
        image = draw(tmp_path / "set" / f"{k}.png", "red")
        image.with_suffix(".txt").write_text("a \x1b[2Jred one")
    (tmp_path / "set" / "b.heic").write_bytes(b"?")
    return tmp_path / "set"


def make_grey(tmp_path):
    for k in range(6):
        path = draw(tmp_path / "set" / f"{k}.png", "red")
        Image.fromarray(np.full((40, 40), 600 * (k + 1), np.uint16)).save(path)
    rows = ["file,species,place", *(f"{k}.png,{'ab'[k % 2]},here" for k in range(5)), "5.png,,"]
    (tmp_path / "set" / "labels.csv").write_text("\n".join(rows))
    return tmp_path / "set"


EQUAL = [["ant", 2], ["bee", 2], ["cat", 2]]
CASES = {
    "class folders": (
        make_folder,
        {"kind": "folder", "split": None, "splits": {}, "labels_from": "class folders",
         "classes": EQUAL, "caption": None, "columns": None,
         "ignored": {".heic": {"count": 2, "first": ["ant/IMG_1.HEIC", "ant/IMG_2.HEIC"]},
                     ".md": {"count": 1, "first": ["README.md"]},
                     "links that lead out of the data set": {"count": 1, "first": ["out"]}}},
        ["source       folder", "split        all images",
         "classes      3 by class folders: 0 ant (2), 1 bee (2), 2 cat (2)",
         "ignored      2 .heic (ant/IMG_1.HEIC, ant/IMG_2.HEIC), 1 .md (README.md), "
         "1 links that lead out of the data set (out)"],
    ),
    "zip with splits": (
        make_zip,
        {"kind": "zip", "split": "Training", "splits": {"Training": 12, "seg_test": 3},
         "classes": [["ant", 4], ["bee", 4], ["cat", 4]], "ignored": {}},
        ["split        Training; there are Training 12, seg_test 3", "ignored      no files"],
    ),
    "parquet with candidates": (
        make_parquet,
        {"kind": "parquet files", "split": "train", "splits": {"test": 1, "train": 6},
         "columns": {"image": "image", "label": "label", "caption": "text",
                     "others": {"label": ["breed"], "caption": ["title"]}},
         "classes": EQUAL, "caption": "ant 0"},
        ["columns      image 'image', label 'label', caption 'text'; other candidates: "
         "label 'breed'; caption 'title'"],
    ),
    "captions and no labels": (
        make_captions,
        {"kind": "folder", "classes": None, "labels_from": None, "caption": "a \x1b[2Jred one",
         "side_files": {"3 .txt or .caption": "caption"},
         "ignored": {".heic": {"count": 1, "first": ["b.heic"]}}},
        ["source       folder; 3 .txt or .caption: caption",
         "classes      none, there are no labels",
         r"captions     3 of 3 images read have one, e.g. 'a \x1b[2Jred one'"],
    ),
    "grey, a table, one without label": (
        make_grey,
        {"classes": [["a", 3], ["b", 2]], "unlabelled": 1, "full_scale": {"16 bits": 4095.0},
         "labels_from": "column 'species' of labels.csv",
         "side_files": {"labels.csv": "label 'species', caption none"}, "ignored": {}},
        ["source       folder; labels.csv: label 'species', caption none",
         "classes      2 by column 'species' of labels.csv: 0 a (3), 1 b (2), no label (1)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_data_is_described(tmp_path, case):
    make, expected, lines = CASES[case]
    images = open_images(str(make(tmp_path)), size=32)
    facts = describe_data(images)
    json.dumps(facts)
    assert {key: facts[key] for key in expected} == expected
    read = len(images)
    assert set(lines) <= set(render_data(facts, read if facts["caption"] else 0, read))
    # What is shown here is no concern; what has to be installed is.
    left = set(images.report.notes) - stated_notes(images)
    assert not any("columns:" in note or "README" in note or "scale" in note for note in left)
    assert any("pillow-heif" in note for note in left) == (".heic" in facts["ignored"])


@pytest.mark.parametrize(("size", "side"), [(32, 128), (64, 128), (512, 256)])
def test_samples_are_shown_by_class(tmp_path, size, side):
    root = class_folders(tmp_path / "set", 6)
    draw(root / "ant" / "more.png", "red")
    (root / "bee" / "broken.png").write_bytes(b"\x89PNG")
    path = tmp_path / "sheet.png"
    assert save_samples(open_images(str(root), size=size), path) == 12
    with Image.open(path) as sheet:
        assert sheet.info["Software"] == SOFTWARE
        width, height = side + 2, side + 2 + 14
        assert sheet.size == (4 * width + 2, 3 * height + 2)
        centres = [sheet.getpixel((2 + side // 2 + x * width, 2 + side // 2 + y * height))
                   for y in range(3) for x in range(4)]  # fmt: skip
    assert centres == [(255, 0, 0)] * 4 + [(0, 255, 0)] * 4 + [(0, 0, 255)] * 4


def test_samples_without_labels_and_of_grey(tmp_path):
    source = make_captions(tmp_path)
    for channels in (1, 3):
        assert save_samples(open_images(str(source), size=32, channels=channels),
                            tmp_path / "sheet.png") == 3  # fmt: skip


def test_samples_replace_only_samples_and_stay_out_of_the_data(tmp_path, monkeypatch):
    root = class_folders(tmp_path / "set")
    sheet = tmp_path / "sheet.png"
    check_samples(sheet, str(root))
    save_samples(open_images(str(root), size=32), sheet)
    check_samples(sheet, str(root))
    photo = draw(tmp_path / "photo.png", "red")
    for path, reason in (
        (photo, "not a sheet of samples"),
        (root / "new.png", "among the images"),
        (root / "ant" / ".." / "new.png", "among the images"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_samples(path, f"{root}:all")
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(ValueError, match="among the images"):
        check_samples(tmp_path / "link" / "new.png", str(root))
    monkeypatch.chdir(tmp_path)
    assert str(default_samples("set")) == "doctor-samples.png"
    monkeypatch.chdir(root / "ant")
    assert not default_samples("..").resolve().is_relative_to(root)


@pytest.mark.parametrize("name", ["train", "test", "val"])
@pytest.mark.parametrize("has_splits", [True, False])
def test_a_missing_folder_is_the_data_above_it_where_that_has_splits(tmp_path, name, has_splits):
    root = tmp_path / "set"
    for folder in ("Training", "Testing", "Validation") if has_splits else [""]:
        class_folders(root / folder)
    if has_splits:
        with pytest.raises(ValueError, match="among the images"):
            check_samples(root / "new.png", f"{root}/{name}")
    else:
        check_samples(root / "new.png", f"{root}/{name}")


@pytest.mark.parametrize("wanted", ["", ":holdout", ":nonsense"])
def test_splits_are_listed_where_one_has_to_be_chosen(tmp_path, capsys, monkeypatch, wanted):
    monkeypatch.setattr(doctor, "measure_matmul", pytest.fail)  # nothing is measured before
    data = make_zip(tmp_path).removesuffix(":train") + wanted
    if wanted == ":holdout":  # of measured splits there are two
        with zipfile.ZipFile(tmp_path / "a.zip", "a") as bundle:
            for name in ("val", "dev"):
                bundle.write(tmp_path / "set/seg_test/ant/0.png", f"set/{name}/ant/0.png")
    with pytest.raises(SplitError, match="Training"):
        commands.doctor(data, samples=tmp_path / "sheet.png")
    printed = capsys.readouterr().out.splitlines()
    second = "  dev: 1" if wanted == ":holdout" else "  seg_test: 3"
    assert printed[:3] == ["splits", "  Training: 12", second]
    with pytest.raises(SplitError):
        commands.doctor(data, samples=tmp_path / "sheet.png", json=True)
    assert json.loads(capsys.readouterr().out)["splits"]["Training"] == 12
    assert not (tmp_path / "sheet.png").exists()


def test_the_report_names_the_sheet(tmp_path):
    root, sheet = make_folder(tmp_path), tmp_path / "new" / "sheet.png"
    found = doctor.examine_data(str(root), None, 3, 10, sheet)
    json.dumps(found)
    text = "\n".join(doctor._render_data(found))
    assert sheet.is_file()
    assert f"samples      {sheet}: 6 of them" in text
    assert text.count("ant (2)") == text.count("classes ") == 1
    assert any("pillow-heif" in concern for concern in found["concerns"])
    assert not any("README" in concern for concern in found["concerns"])
