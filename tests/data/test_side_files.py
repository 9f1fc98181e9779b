"""Labels and captions beside images: any usual form and encoding; what is not read is named."""

from __future__ import annotations

import csv
import io
import json
import shutil
import unicodedata
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mezzotint.data.image_dataset import open_images
from mezzotint.data.side_tables import decode_text

NUM_IMAGES = 4


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sources(tmp_path: Path, files: dict[str, str | bytes], folder: str = ""):
    """Yield the same files as a folder and as a zip, beside four images."""
    tmp_path.mkdir(exist_ok=True)
    files = {f"{folder}{i}.png": png(i) for i in range(NUM_IMAGES)} | files
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as bundle:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            path = tmp_path / "set" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            bundle.writestr(name, data)
    for source in (tmp_path / "set", tmp_path / "set.zip"):
        yield open_images(source, size=8)


def texts(images) -> list[str | None]:
    return [images.text(i) for i in range(NUM_IMAGES)]


def classes(images) -> list[str | None]:
    labels = [images.label(i) for i in range(NUM_IMAGES)]
    return [None if label is None else images.label_names[label] for label in labels]


def as_csv(rows, delimiter: str = ",") -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    return buffer.getvalue()


def as_parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


NAMES = [f"{i}.png" for i in range(NUM_IMAGES)]
CAPTIONS = ["red; one", 'a "b",\nc', "ü 猫", "four"]
LABELS = ["b", "a", "b", "a"]
ROWS = list(zip(NAMES, CAPTIONS, LABELS, strict=True))
HEADER = ("file_name", "text", "label")
LINES = "\n".join(json.dumps(dict(zip(HEADER, row, strict=True))) for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", as_csv([HEADER, *ROWS])),
        ("metadata.csv", as_csv([HEADER, *ROWS], ";")),
        ("metadata.tsv", as_csv([HEADER, *ROWS], "\t")),
        ("train.csv", as_csv([("image", "caption", "species"), *ROWS])),
        ("METADATA.CSV", as_csv([HEADER, *ROWS])),
        ("metadata.csv", "sep=;\r\n" + as_csv([HEADER, *ROWS], ";")),  # Excel's
        ("metadata.csv", ("sep=\t\r\n" + as_csv([HEADER, *ROWS], "\t")).encode("utf-16-le")),
        ("results.csv", as_csv([("image_name", " comment", " label"), *ROWS], "|")),
        ("metadata.jsonl", LINES),
        ("metadata.jsonl", LINES.replace("\n", "\r\n").encode("utf-8-sig")),
        ("metadata.jsonl", LINES.encode("utf-16")),
        ("metadata.json", f"[{LINES}]".replace("}\n", "},\n")),
        ("metadata.parquet", as_parquet(file_name=NAMES, text=CAPTIONS, label=LABELS)),
        (
            "info.json",
            json.dumps({n: {"caption": c, "label": la} for n, c, la in ROWS}),
        ),
    ],
)
def test_tables_of_captions_and_labels(tmp_path, name, content):
    for images in sources(tmp_path, {name: content}):
        assert texts(images) == CAPTIONS
        assert classes(images) == LABELS
        assert images.label_names == ("a", "b")
        assert not any("not understood" in note for note in images.report.notes)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62] * 4, pa.timestamp("us")),  # beyond the year 9999
        pa.array([0, 0, 0, -(2**50)], pa.timestamp("s")),
        pa.array([None, None, None, 10**8], pa.date32()),
        pa.array([2**62] * 4, pa.date64()),
        pa.array([0] * 4, pa.timestamp("us", "Nowhere/Land")),
        pa.array([2**62] * 4, pa.duration("s")),
    ],
    ids=lambda values: str(values.type),
)
@pytest.mark.parametrize("name", ["taken", "a\nb"])
def test_a_column_that_python_cannot_hold_is_left_out(tmp_path, values, name):
    content = as_parquet(file_name=NAMES, text=CAPTIONS, label=LABELS, **{name: values})
    for images in sources(tmp_path, {"metadata.parquet": content}):
        assert texts(images) == CAPTIONS
        assert classes(images) == LABELS
        shown = repr(name.replace("\n", r"\n"))
        notes = [note for note in images.report.notes if f"column {shown} of " in note]
        assert len(notes) == 1
        assert "metadata.parquet was left out" in notes[0]
        assert "\n" not in notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.csv", "0.png,b\n1.png,a\n2.png,b\n3.png,a\n"),
        ("labels.csv", "filename;label\n0.png;b\n1.png;a\n2.png;b\n3.png;a\n"),
        ("train.csv", "id,breed\n0,b\n1,a\n2,b\n3,a\n"),
        ("labels.txt", "0.png b\n1.png a\n2.png b\n3.png a\n"),
        ("list.txt", "0.png\tb\r\n1.png\ta\r\n2.png\tb\r\n3.png\ta\r\n"),
        ("_classes.csv", "filename, a, b\n0.png, 0, 1\n1.png, 1, 0\n2.png, 0, 1\n3.png, 1, 0\n"),
        ("onehot.csv", "id,b,a\n0,1.0,0.0\n1,0.0,1.0\n2,1.0,0.0\n3,0.0,1.0\n"),
        ("labels.json", '{"0.png": "b", "1.png": "a", "2.png": "b", "3.png": "a"}'),
    ],
)
def test_lists_of_labels(tmp_path, name, content):
    for images in sources(tmp_path, {name: content}):
        assert classes(images) == LABELS


@pytest.mark.parametrize(
    "spelling",
    ["{}.png", "./{}.png", ".\\{}.png", "in\\{}.png", "in/{}.png", "{}.PNG", "x/../{}.png", "{}"],
)
def test_names_of_images_as_other_systems_write_them(tmp_path, spelling):
    rows = [{"file_name": spelling.format(i), "text": f"no. {i}"} for i in range(NUM_IMAGES)]
    content = "\n".join(map(json.dumps, rows))
    for images in sources(tmp_path, {"in/metadata.jsonl": content}, folder="in/"):
        assert texts(images) == [f"no. {i}" for i in range(NUM_IMAGES)]


@pytest.mark.parametrize(
    "spelling",
    ["/home/me/set/in/{}.png", "C:\\My data\\set\\{}.png", "set/in/{}.png", "../images/{}.png"],
)
@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "captions.csv"])
def test_folders_that_all_rows_share_are_left_out(tmp_path, spelling, table):
    rows = [("image_path", "text"), *((spelling.format(i), f"no. {i}") for i in range(NUM_IMAGES))]
    content = "\n".join(json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:])
    content = as_csv(rows) if table.endswith(".csv") else content
    other = {"out/0.png": png(5), "out/1.png": png(5)}
    for images in sources(tmp_path, {table: content}, folder="in/"):
        assert texts(images) == [f"no. {i}" for i in range(NUM_IMAGES)]
    if "in/" in spelling:  # names that two folders have
        for images in sources(tmp_path / "two", {table: content} | other, folder="in/"):
            assert texts(images) == [f"no. {i}" for i in range(NUM_IMAGES)]


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("name", ["caf\u00e9", "\u30ac\u30e9\u30b9", "\u00c5NGSTR\u00d6M"])
def test_both_forms_of_an_accent_are_one_name(tmp_path, forms, name):
    image, written = (unicodedata.normalize(form, name) for form in forms)
    table = json.dumps({"file_name": f"{written}.png", "text": "in a table"})
    for side in ({"metadata.jsonl": table}, {f"{written}.txt": "in a file"}):
        for images in sources(tmp_path, {f"{image}.png": png(1)} | side):
            assert any("in a" in (images.text(i) or "") for i in range(len(images)))
        shutil.rmtree(tmp_path / "set")


def test_text_with_an_unquoted_separator_stays_whole(tmp_path):
    lines = "file_name,text\n0.png,a red, big cat\n1.png,dog\n2.png,x,\n3.png,a;b\n"
    for images in sources(tmp_path, {"metadata.csv": lines}):
        assert texts(images) == ["a red, big cat", "dog", "x", "a;b"]
        assert "1 of 4 rows have more cells than the header" in " ".join(images.report.notes)


@pytest.mark.parametrize(("encoding", "is_guess"), [("shift-jis", True), ("cp1251", True),
    ("cp1252", True), ("utf-8", False), ("utf-16", False)])  # fmt: skip
def test_a_guessed_encoding_is_said(tmp_path, encoding, is_guess):
    word = {"shift-jis": "\u65e5\u672c", "cp1251": "\u043a\u043e\u0442"}.get(encoding, "caf\u00e9")
    content = f"file_name,text\n0.png,{word}\n1.png,b\n".encode(encoding)
    for images in sources(tmp_path, {"metadata.csv": content}):
        notes = " ".join(images.report.notes)
        assert ("'metadata.csv': it is not UTF-8 and was read as Windows-1252" in notes) is is_guess


def test_columns_of_zeros_and_ones_that_are_not_one_hot_are_no_classes(tmp_path):
    for rows in ("0.png,1,1\n1.png,0,1\n", "0.png,0,0\n1.png,0,1\n", "0.png,2,0\n1.png,0,1\n"):
        for images in sources(tmp_path, {"attributes.csv": "image_id,a,b\n" + rows}):
            assert images.labels is None


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../0.png", "C:\\0.png", "file:///0.png", "https://a.b/0.png", "z"]
)
def test_rows_that_name_no_image_and_images_without_a_row_are_counted(tmp_path, name):
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": name, "text": "lost"}]
    content = "\n".join(map(json.dumps, rows))
    for images in sources(tmp_path, {"metadata.jsonl": content}):
        assert texts(images) == [None, "one", None, None]
        notes = " ".join(images.report.notes)
        assert "1 of 2 rows of 'metadata.jsonl' name no image of this dataset, first" in notes
        assert "3 of 4 images have no caption, first '0.png'" in notes


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_lines_of_json_end_at_a_newline_alone(tmp_path, separator):
    rows = [{"file_name": n, "text": f"a{separator}b"} for n in NAMES]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    if separator < " ":
        content = content.replace(separator, f"\\u{ord(separator):04x}")
    for images in sources(tmp_path, {"metadata.jsonl": content}):
        assert texts(images) == [f"a{separator}b"] * NUM_IMAGES


def test_the_first_of_several_captions_counts_in_every_form(tmp_path):
    lists = [["one", "other"], ["two"], [], None]
    lines = [{"file_name": n, "text": t} for n, t in zip(NAMES, lists, strict=True)]
    for i, (name, content) in enumerate(
        [
            ("metadata.jsonl", "\n".join(map(json.dumps, lines))),
            ("metadata.parquet", as_parquet(file_name=NAMES, text=lists)),
            ("captions.csv", "image,caption\n0.png,one\n0.png,other\n1.png,two\n"),
        ]
    ):
        for images in sources(tmp_path / str(i), {name: content}):
            assert texts(images) == ["one", "two", None, None]


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".png.txt", ".caption", ".png.caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_file_of_each_image(tmp_path, suffix, encoding):
    (tmp_path / "set").mkdir()
    files = {f"{i}{suffix}": f"é {i}\r\n".encode(encoding) for i in range(NUM_IMAGES)}
    for images in sources(tmp_path, files):  # type: ignore[arg-type]
        assert texts(images) == [f"é {i}" for i in range(NUM_IMAGES)]


def test_webdataset_fields_beside_images(tmp_path):
    files = {f"{i}.cls": LABELS[i] for i in range(NUM_IMAGES)}
    files |= {f"{i}.json": json.dumps({"caption": f"no. {i}"}) for i in range(NUM_IMAGES)}
    for images in sources(tmp_path, files):  # type: ignore[arg-type]
        assert classes(images) == LABELS
        assert texts(images) == [f"no. {i}" for i in range(NUM_IMAGES)]


def test_text_that_is_no_text():
    big, little = "a ü".encode("utf-16-be"), "a ü".encode("utf-32-le")
    assert decode_text(b"\xfe\xff" + big) == decode_text(b"\xff\xfe\0\0" + little) == "a ü"
    for data in (b"\x81\x8d", b"a\0\0b", b"a\0b", b"\xff\xfea"):
        with pytest.raises(ValueError, match="no text"):
            decode_text(data)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", b"\xff\x81\x8d", "metadata.jsonl is no text in UTF-8"),
        ("metadata.jsonl", b"[" * 100_000, "metadata.jsonl line 1 is not of the form"),
        ("metadata.jsonl", b'{"file_name": "0.png"}\n[1]', "metadata.jsonl line 2 is not"),
        ("metadata.json", b"{", "metadata.json is no JSON"),
        ("metadata.parquet", b"PAR1", "metadata.parquet is no readable parquet file"),
        ("labels.csv", b"0.png,0.1\n1.png,0.2\n2.png,0.3\n", "labels.csv holds 3 different"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, name, content, words):
    with pytest.raises(ValueError, match=words):
        next(sources(tmp_path, {name: content}))


def test_what_is_not_understood_is_named_and_stops_nothing(tmp_path):
    files = {"classes.txt": "daisy\nrose\n", "notes.json": "{", "README.md": "x", "README.txt": "y"}
    for images in sources(tmp_path, files):  # type: ignore[arg-type]
        notes = " ".join(images.report.notes)
        assert "2 files were not understood as labels or captions, first 'classes.txt'" in notes
        assert images.label_names is None


def test_columns_are_chosen_in_side_files_too(tmp_path):
    rows = [
        ("file_name", "colour", "weight", "alt"),
        *[(n, "r", i, n) for i, n in enumerate(NAMES)],
    ]
    (tmp_path / "set").mkdir()
    next(sources(tmp_path, {"metadata.csv": as_csv(rows)}))
    chosen = {"label": "weight", "caption": "colour"}
    images = open_images(tmp_path / "set", size=8, columns=chosen)
    assert (texts(images), images.label_names) == (["r"] * 4, ("0", "1", "2", "3"))
    images = open_images(tmp_path / "set", size=8, columns={"label": "", "caption": ""})
    assert (texts(images), images.label_names) == ([None] * 4, None)
    with pytest.raises(ValueError, match=r"columns\.label is 'wieght', but no table"):
        open_images(tmp_path / "set", size=8, columns={"label": "wieght"})


def test_metadata_comes_before_class_folders_and_other_tables_after(tmp_path):
    files = {f"{c}/{c}{i}.png": png(i) for c in ("ant", "bee") for i in range(2)}
    lines = [{"file_name": name, "label": f"new {name[0]}"} for name in files]
    for i, (name, first) in enumerate([("metadata.jsonl", "new a"), ("other.jsonl", "ant")]):
        root = tmp_path / str(i)
        for path, data in {**files, name: "\n".join(map(json.dumps, lines)).encode()}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        images = open_images(root, size=8)
        assert images.label_names is not None
        assert images.label_names[0] == first
        assert "labels are" in " ".join(images.report.notes)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [(("label", "category"), "'label'"), (("species", "breed"), "none"), (("cls", "y"), "'cls'")],
)
def test_other_columns_of_classes_are_named(tmp_path, columns, chosen):
    for k in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
    rows = [f"file_name,{','.join(columns)}", *(f"{k}.png,{k % 2},{k // 2}" for k in range(4))]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    notes = open_images(tmp_path, size=8).report.notes
    others = ", ".join(repr(name) for name in columns if repr(name) != chosen)
    assert any(
        note == f"'metadata.csv': label {chosen}; not used: {others}; choose with "
        "data.columns={label: ...}"
        for note in notes
    )
