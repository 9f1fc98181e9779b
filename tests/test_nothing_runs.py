"""A payload in every kind of file that the library opens: none of them runs."""

from __future__ import annotations

import io
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

import mezzotint as mz
from helpers.data import open_recipe_data
from helpers.payloads import PICKLED, SCRIPT, YAML, object_npy, objects, pickle_in_zip, ran
from helpers.runs import small, weights
from helpers.tiny_models import tiny
from mezzotint.cli import run_command
from mezzotint.config import from_yaml
from mezzotint.convert.model_card import write_card
from mezzotint.evaluate.references import read_reference
from mezzotint.evaluate.results import load_evaluation
from mezzotint.evaluate.safe_pickle import load_arrays
from mezzotint.train import report
from mezzotint.train.checkpoint import write_manifest
from mezzotint.train.loop import train
from mezzotint.train.nonfinite import write_bundle
from mezzotint.train.posthoc_ema import save_reconstruction
from mezzotint.train.replay import replay


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not ran()


def in_npz():
    """Return a .npz whose array is an object."""
    file = io.BytesIO()
    np.savez(file, mu=objects(), sigma=np.eye(1))
    return file.getvalue()


FILES = {
    "a.pth": (PICKLED, mz.load_official),
    "zip.pt": (pickle_in_zip("archive/data.pkl"), mz.load_official),
    "a.ckpt": (PICKLED, mz.load_official),
    "a.bin": (pickle_in_zip("archive/data.pkl"), mz.load_official),
    "a.safetensors": (PICKLED, mz.load_official),
    "a.pkl": (PICKLED, load_arrays),
    "ref.pkl": (PICKLED, read_reference),
    "ref.npz": (in_npz(), lambda path: read_reference(path, "adm")),
    "recipe.yaml": (YAML, from_yaml),
    "objects.npy": (object_npy(), read_reference),
    "main.zip": (pickle_in_zip("__main__.py"), mz.load_official),
    "results.json": (PICKLED, load_evaluation),
}


@pytest.mark.parametrize("name", FILES)
def test_no_payload_runs(name, tmp_path):
    content, read = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_payload_of_a_model_folder_runs(name, tmp_path):
    mz.save_model(tiny(), tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(PICKLED)
    (tmp_path / "model" / "model.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        mz.load_model(tmp_path / "model")


@pytest.mark.parametrize("key", ["mezzotint", "format", "__reduce__"])
def test_metadata_of_weights_is_text(key, tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors", {key: PICKLED.decode("latin1")})
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        mz.load_official(tmp_path / "a.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 16 images with a snapshot, an evaluation and the bundle of a step."""
    recipe = small("images=16", "ema.power_stds=[0.1]", "samples.every_images=16")
    run = train(recipe, tmp_path_factory.mktemp("trained") / "run", quiet=True)
    data = open_recipe_data(recipe).fingerprint
    facts = {"data": data, "ranks": 1, "images": 0, "image_numbers": [0], "loss": [0.0]}
    write_bundle(run / "bundles" / "0", (run / "recipe.yaml").read_text(), facts, weights(run))
    return run


def repeat_step(run):
    bundle = run / "bundles" / "0"
    names = [path.name for path in bundle.iterdir() if path.name != "manifest.json"]
    write_manifest(bundle, names)  # as anyone who changes a bundle can
    replay(bundle, device=torch.device("cpu"))


def train_again(run):
    run_command("train", "unet-tiny", "--recipe", str(run / "recipe.yaml"), "--dry-run")


IN_RUNS = [
    ("bundles/0/recipe.yaml", YAML, repeat_step),
    ("bundles/0/bundle.json", PICKLED, repeat_step),
    ("bundles/0/weights.safetensors", PICKLED, repeat_step),
    ("bundles/0/manifest.json", PICKLED, lambda run: replay(run / "bundles" / "0")),
    ("ema/000000000016-0.1.safetensors", PICKLED, lambda run: save_reconstruction(run, 0.1)),
    ("model/model.safetensors", PICKLED, lambda run: save_reconstruction(run, 0.1)),
    ("model/config.json", PICKLED, lambda run: write_card(run)),
    ("evaluation.json", PICKLED, lambda run: write_card(run, [run / "evaluation.json"])),
    ("recipe.yaml", YAML, lambda run: write_card(run)),
    ("recipe.yaml", YAML, lambda run: report.write_report(run, run / "report.html")),
    ("recipe.yaml", YAML, train_again),
]


@pytest.mark.parametrize(("name", "content", "read"), IN_RUNS)
def test_no_payload_of_a_run_runs(name, content, read, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name.rpartition("/")[2])):
        read(tmp_path / "run")


@pytest.mark.parametrize("content", [
    PICKLED, b'{"images": 8}', b'{"images": 8, "loss": "x", "grad_norm": {}}',
    b'{"images": "8", "py/object": "os.mkdir"}', b"[" * 10**5, b'{"images": 8, "evaluation": 3}',
])  # fmt: skip
@pytest.mark.parametrize("name", ["log.jsonl", "events.jsonl", "environment.json"])
def test_a_report_runs_nothing(name, content, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "zero_output_loss", lambda recipe: {})  # slow, and not at issue
    if name != "log.jsonl":
        monkeypatch.setattr(report, "render_curves", lambda recipe, records: "")
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content + b"\n")
    try:
        report.write_report(tmp_path / "run", tmp_path / "report.html")
    except ValueError as error:
        assert str(tmp_path / "run") in str(error)  # noqa: PT017
    else:
        assert "of 16 images" in (tmp_path / "report.html").read_text()


def test_the_payload_runs_where_it_is_unpickled():
    """Otherwise the tests above could not fail."""
    for load in (
        lambda: pickle.loads(PICKLED),
        lambda: np.load(io.BytesIO(object_npy()), allow_pickle=True),
        lambda: yaml.unsafe_load(YAML),
        lambda: exec(SCRIPT, {}),
    ):
        load()
        assert ran()
