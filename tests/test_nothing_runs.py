"""A payload in every kind of file that the library opens: none of them runs."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

import mezzotint as mz
from helpers.tiny_models import tiny
from mezzotint.config import from_yaml
from mezzotint.core.json_values import parse_json
from mezzotint.evaluate.references import read_reference
from mezzotint.evaluate.results import load_evaluation
from mezzotint.evaluate.safe_pickle import load_arrays

RAN: list[str] = []


def run(text):
    """Leave a trace."""
    RAN.append(text)


class Payload:
    """Calls `run` where it is unpickled."""

    def __reduce__(self):
        return run, ("it ran",)


def in_zip(name):
    """Return a zip with the payload as one member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, pickle.dumps(Payload(), 2))
    return file.getvalue()


def in_npz():
    """Return a .npz whose array is an object."""
    file = io.BytesIO()
    np.savez(file, mu=np.array([Payload()], dtype=object), sigma=np.eye(1))
    return file.getvalue()


PICKLED = pickle.dumps({"fid": Payload()}, 2)
YAML = f"preset: !!python/object/apply:{__name__}.run ['it ran']\n".encode()
FILES = {
    "a.pth": (PICKLED, mz.load_official),
    "zip.pt": (in_zip("archive/data.pkl"), mz.load_official),
    "a.ckpt": (PICKLED, mz.load_official),
    "a.bin": (in_zip("archive/data.pkl"), mz.load_official),
    "a.safetensors": (PICKLED, mz.load_official),
    "a.pkl": (PICKLED, load_arrays),
    "ref.pkl": (PICKLED, read_reference),
    "ref.npz": (in_npz(), lambda path: read_reference(path, "adm")),
    "recipe.yaml": (YAML, from_yaml),
    "results.json": (PICKLED, load_evaluation),
}


@pytest.mark.parametrize("name", FILES)
def test_no_payload_runs(name, tmp_path):
    content, read = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read(tmp_path / name)
    assert not RAN


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_no_payload_of_a_model_folder_runs(name, tmp_path):
    mz.save_model(tiny(), tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(PICKLED)
    (tmp_path / "model" / "model.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        mz.load_model(tmp_path / "model")
    assert not RAN


@pytest.mark.parametrize("key", ["mezzotint", "format", "__reduce__"])
def test_metadata_of_weights_is_text(key, tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors", {key: PICKLED.decode("latin1")})
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        mz.load_official(tmp_path / "a.safetensors")
    assert not RAN


def test_the_payload_runs_where_it_is_unpickled():
    """Otherwise the tests above could not fail."""
    pickle.loads(PICKLED)
    assert RAN == ["it ran"]
    RAN.clear()
    assert parse_json(json.dumps({"py/object": "os.system"})) == {"py/object": "os.system"}
