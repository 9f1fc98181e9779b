"""A payload in every kind of file of a data set: it is refused, or lies there and does not run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.image_files import png, write_folder, write_tar, write_zip
from helpers.payloads import PICKLED, SCRIPT, YAML, object_npy, objects, pickle_in_zip, ran
from mezzotint.data.caption_embeddings import EMBEDDINGS_CARD, CaptionEmbeddings
from mezzotint.data.image_dataset import open_images
from mezzotint.data.latent_dataset import open_dataset
from mezzotint.data.prepare import prepare_latents, prepare_source

IMAGES = {f"{i}.png": png(i) for i in range(4)}
SCRIPT_NAMES = ("data.py", "set.py", "setup.py", "__init__.py", "__main__.py", "conftest.py",
                "sitecustomize.py", "metadata.py", "data/data.py")  # fmt: skip
SCRIPTS = dict.fromkeys(SCRIPT_NAMES, SCRIPT)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not ran()


def table() -> pa.Table:
    """Rows with payloads as cells, as the type of a column and as facts about the table."""
    text = PICKLED.decode("latin1")
    schema = pa.schema(
        [
            pa.field("image", pa.binary()),
            pa.field("label", pa.int64()),
            pa.field("object", pa.binary(), metadata={
                "ARROW:extension:name": "arrow.py_extension_type",
                "ARROW:extension:metadata": PICKLED,
            }),
            pa.field("meta", pa.string(), metadata={"PARQUET:field_id": "7", "pickle": PICKLED}),
        ],
        metadata={
            "pandas": json.dumps({"columns": [{"name": "object", "pandas_type": "object",
                                               "numpy_type": "object", "metadata": text}]}),
            "pickle": PICKLED,
        },
    )  # fmt: skip
    rows = [list(IMAGES.values()), [0, 1, 0, 1], [PICKLED] * 4, [SCRIPT] * 4]
    return pa.table([pa.array(r, t) for r, t in zip(rows, schema.types, strict=True)], schema)


def write_arrow(path: Path, rows: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as out:
        out.write_table(rows)
    return path


def parquet(root: Path) -> str:
    pq.write_table(table(), root / "a.parquet")
    return f"{root}/a.parquet"


def arrow(root: Path) -> str:
    return str(write_arrow(root / "a.arrow", table()))


def clone(root: Path) -> str:
    folder = write_folder(root / "set", {**SCRIPTS, "README.md": b"---\n" + YAML + b"---\n"})
    parquet(folder / "data")
    return str(folder)


def saved(root: Path) -> str:
    """A folder of `datasets.Dataset.save_to_disk` with scripts and other facts beside it."""
    import datasets

    rows = table().select(["image", "label"])
    datasets.Dataset(rows.replace_schema_metadata(None)).save_to_disk(root / "set")
    write_folder(root / "set", {**SCRIPTS, "dataset.pkl": PICKLED})
    write_arrow(next((root / "set").glob("*.arrow")), rows)
    return str(root / "set")


def webdataset(fields):
    def write(root: Path) -> str:
        members = {}
        for i, image in enumerate(IMAGES.values()):
            members |= {f"{i}.png": image, f"{i}.cls": str(i % 2)}
            members |= {f"{i}.{field}": content for field, content in fields.items()}
        return str(write_tar(root / "w.tar", members if fields else members | SCRIPTS))

    return write


def folder(files):
    return lambda root: str(write_folder(root / "set", {**IMAGES, **SCRIPTS, **files}))


def npz(root: Path) -> str:
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    np.savez(root / "a.npz", arr_0=pixels, arr_1=np.repeat(objects(), 4), other=objects())
    return f"{root}/a.npz"


READ = {
    "parquet": parquet,
    "arrow": arrow,
    "a clone with scripts": clone,
    "a saved dataset": saved,
    "webdataset of pickles": webdataset({
        "pyd": PICKLED, "pickle": PICKLED, "pkl": PICKLED, "pt": PICKLED, "py": SCRIPT,
    }),
    "a zip with __main__.py": lambda root: str(write_zip(root / "a.zip", IMAGES | SCRIPTS)),
    "a tar with scripts": lambda root: str(write_tar(root / "a.tar.gz", IMAGES | SCRIPTS, "w:gz")),
    "a folder with pickles": folder({"labels.pkl": PICKLED, "labels.npy": object_npy(),
                                     "labels.pt": pickle_in_zip("a/data.pkl"), "0.txt": SCRIPT,
                                     "1.txt": PICKLED}),
}  # fmt: skip
REFUSED = {
    "webdataset of .pth": (webdataset({"pth": pickle_in_zip("a/data.pkl")}), r"w\.tar"),
    "webdataset of .npy": (webdataset({"npy": object_npy()}), r"w\.tar"),
    "webdataset of .json": (webdataset({"json": PICKLED}), r"w\.tar"),
    "npz of objects": (npz, r"a\.npz"),
    "a pickle for parquet": (lambda r: str(write_folder(r, {"a.parquet": PICKLED}) / "a.parquet"),
                             r"a\.parquet"),
    "a pickle for arrow": (lambda r: str(write_folder(r, {"a.arrow": PICKLED}) / "a.arrow"),
                           r"a\.arrow"),
    "a pickle for npz": (lambda r: str(write_folder(r, {"a.npz": PICKLED}) / "a.npz"), r"a\.npz"),
    "npy of objects": (lambda r: str(write_folder(r, {"a.npy": object_npy()}) / "a.npy"),
                       r"a\.npy"),
    "a script alone": (lambda r: str(write_folder(r, SCRIPTS) / "data.py"), r"data\.py"),
    "a folder of scripts": (lambda r: str(write_folder(r / "set", SCRIPTS)), "set"),
    "a class of an image": (folder({"0.cls": PICKLED}), r"0\.cls"),
    "metadata.jsonl": (folder({"metadata.jsonl": PICKLED}), r"metadata\.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_payloads_beside_images_do_not_run(kind, tmp_path):
    images = open_images(READ[kind](tmp_path), size=8)
    assert len(images.batch(range(4))[0]) == len(images) == 4


@pytest.mark.parametrize("kind", REFUSED)
def test_payloads_for_data_are_refused(kind, tmp_path):
    write, words = REFUSED[kind]
    with pytest.raises(ValueError, match=words):
        open_images(write(tmp_path), size=8).batch(range(4))


@pytest.mark.parametrize("content", ["pickle", "script", "objects"])
@pytest.mark.parametrize("file", ["mezzotint.json", "*.arrow"])
def test_a_prepared_folder_runs_nothing(file, content, tmp_path):
    prepare_source(write_folder(tmp_path / "set", IMAGES), tmp_path / "out", 8, progress=False)
    path = next((tmp_path / "out").glob(file))
    path.write_bytes(
        {"pickle": PICKLED, "script": SCRIPT.encode(), "objects": object_npy()}[content]
    )
    write_folder(tmp_path / "out", SCRIPTS)
    with pytest.raises(ValueError, match="out"):
        open_images(tmp_path / "out")


@pytest.mark.parametrize("content", [PICKLED, object_npy()], ids=["pickle", "objects"])
@pytest.mark.parametrize("file", ["latents.json", "labels.npy", "piece-000000.npy",
                                  "piece-000000.json"])  # fmt: skip
def test_a_folder_of_latents_runs_nothing(file, content, tmp_path):
    files = {f"{'ab'[i % 2]}/{name}": data for i, (name, data) in enumerate(IMAGES.items())}
    source, out = write_folder(tmp_path / "set", files), tmp_path / "out"
    prepare_latents(source, out, 8, "pixels", device="cpu", progress=False)
    assert (out / file).is_file(), sorted(out.iterdir())
    (out / file).write_bytes(content)
    with pytest.raises(ValueError, match="out"):
        open_dataset(str(out), size=8, channels=3, crop="adm", codec_name="pixels").batch([0])


@pytest.mark.parametrize("content", [PICKLED, object_npy()], ids=["pickle", "objects"])
@pytest.mark.parametrize("file", [EMBEDDINGS_CARD, "00000.npy", "starts.npy"])
def test_embedded_captions_run_nothing(file, content, tmp_path):
    facts = {"width": 2, "longest": 1, "dtype": "float16", "shard_captions": 1}
    card = {"key": str(tmp_path), **facts}
    (tmp_path / EMBEDDINGS_CARD).write_text(json.dumps(card))
    np.save(tmp_path / "00000.npy", np.zeros((1, 2), np.int16))
    np.save(tmp_path / "starts.npy", np.array([0, 1]))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        CaptionEmbeddings(tmp_path, np.zeros(1, np.int64)).batch([0])
