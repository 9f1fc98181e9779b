"""The models in the box: what ships, how a name is resolved, the commands that take a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hatchling.builders.wheel import WheelBuilder
from PIL import Image

import mezzotint as mz
from mezzotint.cli import demo
from mezzotint.cli.measure import Source
from mezzotint.convert.adapt import initialise_from
from mezzotint.convert.box import MOST_BYTES
from mezzotint.convert.export import export_model
from mezzotint.convert.model_card import write_card
from mezzotint.core.boxed import BOX, boxed_folder, boxed_models, read_boxed, suggest_boxed
from mezzotint.models import build_model, open_model, preset_info, save_model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.job import make_job
from mezzotint.web import app

ROOT = Path(__file__).parents[2]
NAMES = boxed_models()
HOME = "eurosat-64"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mezzotint(*arguments: str, cwd: Path) -> str:
    """Run a command offline in its own process; return what it prints."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(cwd / "empty"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mezzotint", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_box_has_the_photographs():
    assert HOME in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_small_in_bfloat16_and_says_where_it_comes_from(name):
    folder = BOX / name
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md", "samples.png"}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES == 8_000_000
    values = json.loads((folder / "config.json").read_text())
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["license"] == values["licence"]
    assert values["extra"]["box"]["data"] in card
    assert f'mz.load_model("{name}")' in card
    with open(folder / "model.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {t["dtype"] for k, t in header.items() if k != "__metadata__"} == {"BF16"}


def test_the_photographs_are_those_of_eurosat():
    row = read_boxed(HOME)
    assert row["licence"] == "mit"
    assert "EuroSAT" in row["data"]
    assert "Helber" in row["data"]
    assert row["input"] == "64x64x3"
    model = mz.load_model(HOME)
    assert len(model.info.labels or ()) == 10
    assert model.info.config == preset_info("unet-mini").config


def test_the_wheel_contains_it():
    packed = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    for name in NAMES:
        for file in ("config.json", "model.safetensors", "README.md", "samples.png"):
            assert f"mezzotint/box/{name}/{file}" in packed


@pytest.mark.parametrize("name", NAMES)
def test_it_samples_deterministically(name):
    model = mz.load_model(name).eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    label = [1, 2] if model.info.config.num_classes else None
    first = mz.sample(model, seeds=[3, 4], label=label, steps=2)
    assert torch.equal(first, mz.sample(open_model(name), seeds=[3, 4], label=label, steps=2))
    assert first.isfinite().all()
    assert not torch.equal(first[0], first[1])


def test_a_command_samples_it_offline_from_any_folder(tmp_path):
    mezzotint("sample", HOME, "-n", "2", "--steps", "2", "--out", "x.npz", cwd=tmp_path)
    drawn = np.load(tmp_path / "x.npz")["arr_0"]
    assert drawn.shape == (2, 64, 64, 3)
    job = make_job(HOME, {"steps": 2})
    assert np.array_equal(drawn, job.draw([0, 1]).permute(0, 2, 3, 1).numpy())


def test_a_path_that_exists_is_never_taken_for_the_name(tmp_path):
    assert boxed_folder(HOME) == BOX / HOME
    save_model(mz.create_model("unet-tiny", size=16, width=8, emb_dim=16), tmp_path / HOME)
    assert boxed_folder(HOME) is None
    assert mz.load_model(HOME).info.config.size == 16
    assert mz.load_model(tmp_path / HOME).info.config.size == 16


@pytest.mark.parametrize("kind", ["file", "empty folder", "broken link"])
def test_what_is_no_model_is_not_replaced_by_the_box(tmp_path, kind):
    if kind == "file":
        (tmp_path / HOME).write_text("x")
    elif kind == "empty folder":
        (tmp_path / HOME).mkdir()
    else:
        (tmp_path / HOME).symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=HOME):
        mz.load_model(HOME)


@pytest.mark.parametrize("name", ["eurosat64", "eurosat", "EuroSAT-64"])
def test_a_name_that_is_nearly_it_is_told(name):
    for use in (mz.load_model, preset_info):  # preset_info: of `mezzotint info`
        with pytest.raises(ValueError, match=f"did you mean {HOME}"):
            use(name)


def test_any_other_unknown_name_is_told_what_is_there():
    assert suggest_boxed("zzz") == f"; in the box: {', '.join(NAMES)}"
    with pytest.raises(ValueError, match=rf"there is no file or folder zzz.*in the box: .*{HOME}"):
        mz.load_model("zzz")


@pytest.mark.parametrize("use", [preset_info, recipe_for, mz.create_model])
def test_it_is_no_preset(use):
    assert not set(NAMES) & set(mz.presets())
    with pytest.raises(ValueError, match=f"{HOME} is a trained model, not a preset"):
        use(HOME)


def test_a_card_is_written_for_runs_and_folders_alone():
    with pytest.raises(ValueError, match="is in the box and has its card"):
        write_card(HOME)


def test_it_exports(tmp_path):
    pytest.importorskip("diffusers")
    export_model(HOME, tmp_path / "pipeline", "diffusers")
    assert mz.load_model(tmp_path / "pipeline" / "network").info == mz.load_model(HOME).info


def test_it_is_evaluated_as_a_model():
    source = Source(name=HOME, num_images=3, steps=2).open()
    (images,) = source.batches(0, 3)
    assert images.shape == (3, 3, 64, 64)
    assert source.metadata["steps"] == 2
    with pytest.raises(ValueError, match=f"or a model; did you mean {HOME}"):
        Source(name="eurosat64", num_images=3, steps=2).open()


def test_training_starts_from_it():
    trained = mz.load_model(HOME)
    fresh = build_model(trained.info)
    initialise_from(HOME, lambda line: None)(fresh)
    for name, weight in trained.backbone.state_dict().items():
        assert torch.equal(fresh.backbone.state_dict()[name], weight)


@pytest.mark.parametrize(("given", "opened"), [((), NAMES), ((HOME,), [HOME])])
def test_the_studio_opens_with_it(monkeypatch, given, opened):
    pytest.importorskip("gradio")
    shown = []

    def make_app(studio, credentials):
        shown.append(studio)
        raise SystemExit

    monkeypatch.setattr(app, "make_app", make_app)
    with pytest.raises(SystemExit):
        app.serve(given)
    assert list(shown[0].models) == opened
    assert shown[0].model(HOME).info.config.size == 64
    assert not shown[0].runs


def test_the_demo_draws_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BOXED_STEPS", 2)
    demo.save_boxed_grid(HOME, tmp_path / f"{HOME}.png")
    with Image.open(tmp_path / f"{HOME}.png") as image:
        assert min(image.size) >= 4 * 64
        assert len(image.getcolors(1 << 20) or []) > 1000


def test_info_lists_it_apart_from_the_presets(tmp_path):
    printed = mezzotint("info", cwd=tmp_path)
    presets, _, boxed = printed.partition("trained models in the box")
    assert HOME not in presets
    for part in (HOME, "EuroSAT", "licence mit", " MB"):
        assert part in boxed
    row = json.loads(mezzotint("info", HOME, "--json", cwd=tmp_path))
    assert row == read_boxed(HOME)
    rows = [json.loads(line) for line in mezzotint("info", "--json", cwd=tmp_path).splitlines()]
    assert [r["name"] for r in rows] == mz.presets()
