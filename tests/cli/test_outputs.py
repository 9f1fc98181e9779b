"""No command replaces or deletes what is not its own, nor what a run is writing."""

from __future__ import annotations

import os
import re
import threading
import zipfile

import pytest
import torch

import mezzotint as mz
from helpers.runs import small
from mezzotint import config
from mezzotint.cli import demo, evaluation, models, sampling, training
from mezzotint.cli.outputs import RUN_PARTS, check_outside_run, evaluation_base
from mezzotint.convert import export
from mezzotint.convert.official.load import convert_checkpoint
from mezzotint.evaluate import references
from mezzotint.evaluate.results import Evaluation, Protocol
from mezzotint.recipes import recipe_for
from mezzotint.train.report import write_report
from mezzotint.train.run_folder import run_lock


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_pipe(path):
    """Return a list that gets what is written to the pipe at `path`, and its reader."""
    os.mkfifo(path)
    received = []
    reader = threading.Thread(target=lambda: received.append(path.read_bytes()), daemon=True)
    reader.start()
    return received, reader


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "16").mkdir(parents=True)
    (folder / "checkpoints" / "16" / "manifest.json").write_text("{}")
    (folder / ".lock").touch()
    (folder / "recipe.yaml").write_text(config.to_yaml(small()))
    (folder / "notes.txt").write_text("precious")
    return folder


@pytest.fixture
def model():
    return mz.create_model(
        "unet-tiny", size=8, width=16, multipliers=(1,), blocks=(1,), attention=(False,)
    )


# --- the demo ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "live", "damaged", "other", "digits"])
def test_the_demo_deletes_no_other_run(run, kind):
    if kind == "damaged":
        (run / "recipe.yaml").write_text("preset: [")
    elif kind == "other":
        (run / "recipe.yaml").unlink()
    elif kind == "digits":  # a run of one's own on the demo's data
        own = config.override(demo.demo_recipe(100, 0), ["optim.lr=1e-3"])
        (run / "recipe.yaml").write_text(config.to_yaml(own))
    before = content(run)
    if kind == "live":
        with run_lock(run), pytest.raises(ValueError, match="another process is training"):
            demo.remove_demo(run)
    else:
        with pytest.raises(ValueError, match=str(run)):
            demo.remove_demo(run)
    assert content(run) == before


def test_the_demo_replaces_a_demo_and_keeps_other_files(run):
    recipe = config.override(demo.demo_recipe(6400, 3), ["engine.precision=float32"])
    (run / "recipe.yaml").write_text(config.to_yaml(recipe))
    (run / "digits.png").write_bytes(b"")
    (run / "model").symlink_to(run.parent)  # the link goes, not what it leads to
    demo.remove_demo(run)
    assert sorted(os.listdir(run)) == [".lock", "notes.txt", "recipe.yaml"]
    with run_lock(run), pytest.raises(ValueError, match="another process"):
        demo.remove_demo(run)


# --- parts of a run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [*RUN_PARTS, "checkpoints/16", "samples/a/b.png", "evaluations/8.json", "tensorboard/x"],
)
def test_a_part_of_a_run_is_no_output(run, part):
    with pytest.raises(ValueError, match="belongs to the run"):
        check_outside_run(run / part)


@pytest.mark.parametrize("part", ["report.html", "model-0.1", "evaluation.json", "../model", "."])
def test_beside_the_parts_is_room(run, part):
    check_outside_run(run / part)
    check_outside_run(None)


@pytest.mark.parametrize(
    "command",
    [
        lambda run: training.ema(run, width=0.1, out=run / "model"),
        lambda run: training.report(run, out=run / "log.jsonl"),
        lambda run: models.convert("x.pth", run / "model"),
        lambda run: models.export(str(run), run / "model" / "x.pt2", to="torch"),
        lambda run: sampling.sample(str(run), out=run / "samples"),
        lambda run: evaluation.evaluate(str(run), reference="x", out=run / "log.jsonl"),
        lambda run: evaluation.reference("x", run / "checkpoints"),
    ],
)
def test_commands_write_into_no_part_of_a_run(run, command):
    before = content(run)
    with pytest.raises(ValueError, match="belongs to the run"):
        command(run)
    assert content(run) == before


def test_links_in_a_run_folder_are_not_followed(run, tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(target)
    with pytest.raises(OSError, match="is a link"), run_lock(run):
        pass
    assert target.read_text() == "precious"


# --- files and folders of others -----------------------------------------------------------------


@pytest.mark.parametrize("names", [["README.md"], ["model.safetensors"], ["README.md", "main.py"]])
def test_a_model_is_saved_into_no_folder_of_others(tmp_path, model, names):
    folder = tmp_path / "project"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("precious")
    before = content(folder)
    for save in (
        lambda: mz.save_model(model, folder),
        lambda: convert_checkpoint(tmp_path / "x.pth", folder),
        lambda: export.save_diffusers(model, folder),
    ):
        with pytest.raises(ValueError, match=rf"project is no .* folder and holds \[{names[0]}"):
            save()
    assert content(folder) == before


def test_a_model_is_saved_into_new_and_empty_folders_and_its_own(tmp_path, model):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".git").mkdir()
    for name in ("new", "empty", "empty"):
        mz.save_model(model, tmp_path / name)
        assert mz.load_model(tmp_path / name).info == model.info


def test_an_official_file_is_never_replaced(tmp_path):
    out = tmp_path / "dimr.pth"
    out.write_bytes(b"3 GB of weights")
    with pytest.raises(ValueError, match=r"dimr.pth exists"):
        convert_checkpoint(tmp_path, out, to="official")
    assert out.read_bytes() == b"3 GB of weights"


def test_a_report_replaces_reports_alone(run, tmp_path):
    out = tmp_path / "page.html"
    out.write_text("<html>my page</html>")
    with pytest.raises(ValueError, match=r"page.html exists and is not a report"):
        write_report(run, out)
    assert out.read_text() == "<html>my page</html>"
    for _ in range(2):
        assert write_report(run, tmp_path / "new.html").stat().st_size > 1000
    received, reader = read_pipe(tmp_path / "fifo")
    write_report(run, tmp_path / "fifo")
    reader.join(10)
    assert received[0].endswith(b"</html>\n")


def test_exports_replace_exports_alone(tmp_path, model):
    for name, save in (("a.pt2", export.save_torch), ("a.onnx", export.save_onnx)):
        (tmp_path / name).write_bytes(b"precious")
        with pytest.raises(ValueError, match="exists and is not an export"):
            save(model, tmp_path / name)
    with zipfile.ZipFile(tmp_path / "ours.pt2", "w") as archive:
        archive.writestr("ours/extra/config.json", '{"mezzotint": 1}')
    with zipfile.ZipFile(tmp_path / "theirs.pt2", "w") as archive:
        archive.writestr("theirs/extra/config.json", '{"x": 1}')
    assert export._is_torch_export(tmp_path / "ours.pt2")
    assert not export._is_torch_export(tmp_path / "theirs.pt2")


def test_evaluations_replace_evaluations_alone(tmp_path):
    out = tmp_path / "evaluation.json"
    assert evaluation_base(out) == out
    Evaluation(protocol=Protocol(source="x", num_images=2, code_version="0"), numbers=()).save(out)
    assert evaluation_base(out) == out
    for text in ("{}", "not JSON", '["mezzotint_evaluation"]'):
        out.write_text(text)
        with pytest.raises(ValueError, match="exists and is not an evaluation"):
            evaluation_base(out)
    for name in ("fifo", "fifo.png"):
        os.mkfifo(tmp_path / name)
        assert str(evaluation_base(tmp_path / name)) == "evaluation.json"


@pytest.mark.parametrize(
    ("kind", "options"), [("evaluation", {}), ("sweep", {"sweep": "guidance=1,2"})]
)
@pytest.mark.parametrize("name", ["fid.svg", "a.png", "fid.copies.png", "v1.0.pieces"])
def test_an_evaluation_is_not_named_like_its_parts(kind, options, name, tmp_path):
    message = rf"{re.escape(name)} ends like a part of {kind}s; .* ends in \.json"
    with pytest.raises(ValueError, match=message):
        evaluation.evaluate("x", reference="y", out=tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_references_replace_references_alone(tmp_path):
    own, theirs = tmp_path / "own.npz", tmp_path / "theirs.npz"
    references.write_reference(own, {}, {}, {"mezzotint_reference": 1})
    with theirs.open("wb") as file:
        torch.save({}, file)
    assert references.is_reference(own)
    assert not references.is_reference(theirs)
    with pytest.raises(ValueError, match="exists and is not a reference"):
        evaluation.reference("digits", theirs)


def test_a_demo_is_recognised_after_training_has_resolved_it():
    assert demo.is_demo(demo.demo_recipe(None, 0))
    assert not demo.is_demo(recipe_for("unet-tiny"))
