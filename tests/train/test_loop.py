"""A run is the same run whatever interrupts it, and nothing that goes wrong costs what was reached."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.runs import assert_same_run, last_state, records, small
from mezzotint import config
from mezzotint.core import distributed
from mezzotint.recipes import recipe_for
from mezzotint.train import checkpoint, loop
from mezzotint.train.loop import train
from mezzotint.train.nonfinite import NonFiniteError
from mezzotint.train.progress import ProgressDisplay
from mezzotint.train.setup import setup


def test_a_run_leaves_what_the_design_promises(whole):
    assert config.from_yaml(whole / "recipe.yaml").images == 160
    assert [r["images"] for r in records(whole)] == [32, 64, 96, 128, 160]
    assert [p.name for p in checkpoint.list_checkpoints(whole)] == ["48", "96", "144", "160"]
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [
        "000000000080.png",
        "000000000160.png",
    ]
    for name in ("model", "model-raw"):
        assert {p.name for p in (whole / name).iterdir()} == {
            "config.json",
            "model.safetensors",
            "README.md",
        }


def test_the_weights_without_average_are_saved_beside(whole):
    raw, averaged = (
        load_file(whole / name / "model.safetensors") for name in ("model-raw", "model")
    )
    run = setup(small(), whole, distributed.init_distributed())
    trained = run.state.backbone.state_dict()
    assert all(torch.equal(raw[name], t) for name, t in trained.items())
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


def test_stopped_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch):
    """Stops after every second step, between the sums of a log line too."""
    stops = 0
    while stops < 20:
        asked = loop.StopSignal()
        steps = iter(range(2))
        real = loop.update_averages

        def update(run, asked=asked, steps=steps, real=real):
            real(run)
            asked.requested = next(steps, None) == 0  # the next step sees it

        monkeypatch.setattr(loop, "StopSignal", lambda asked=asked: asked)
        monkeypatch.setattr(loop, "update_averages", update)
        try:
            train(small(), tmp_path / "run", quiet=True)
            break
        except SystemExit:
            stops += 1
        finally:
            monkeypatch.undo()
    assert stops == 5
    assert_same_run(whole, tmp_path / "run")


SCRIPT = """
import sys
import torch; torch.set_num_threads(1)
from helpers.runs import small
from mezzotint.train.loop import train
train(small(), {folder!r})
"""


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM]
)
def test_a_killed_process_loses_nothing(whole, tmp_path, number):
    folder = tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "64/160 images" in line:
            process.send_signal(number)
            break
    _, last_words = process.communicate()
    assert process.returncode == (0 if number == signal.SIGTERM else -number)
    assert ("run the same command again to go on: python" in last_words) == (
        number == signal.SIGTERM
    )
    train(small(), folder, quiet=True)
    assert_same_run(whole, folder)


@pytest.mark.parametrize("harm", ["truncated", "flipped", "unlisted", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(whole, stopped, harm):
    folder = stopped(96)
    newest = folder / "checkpoints" / "96"
    data = next(newest.glob("*.distcp"))
    content = data.read_bytes()
    if harm == "truncated":
        data.write_bytes(content[:-10])
    elif harm == "flipped":
        data.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif harm == "unlisted":
        data.unlink()
    else:
        (newest / "manifest.json").unlink()
    intact, passed = checkpoint.find_newest_intact(folder)
    assert intact is not None
    assert intact.name == "48"
    assert len(passed) == 1
    assert "checkpoint 96 is damaged" in passed[0]
    if harm == "flipped":
        train(small(), folder, quiet=True)
        assert_same_run(whole, folder)


def test_a_full_disk_keeps_the_previous_checkpoint(stopped, monkeypatch):
    folder = stopped(48)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(
        OSError, match=r"checkpoint at 96 images could not be written.*No space left.*intact"
    ):
        train(small(), folder, quiet=True)
    monkeypatch.undo()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["48"]
    assert checkpoint.find_damage(folder / "checkpoints" / "48") is None


def test_a_non_finite_loss_stops_before_the_update(tmp_path, monkeypatch):
    run = setup(small(), tmp_path, distributed.init_distributed())
    before = {k: v.clone() for k, v in run.state.backbone.state_dict().items()}
    bad = dataclasses.replace(
        run, objective=lambda m, x, eps, l, c: run.objective(m, x, eps, l, c) * (l * 0 / (l < 0))
    )
    with pytest.raises(
        NonFiniteError, match=r"at 0 images; nothing was updated.*image \d+ at log-SNR -?\d"
    ) as caught:
        loop.loop(bad, ProgressDisplay(show=False), loop.StopSignal())
    assert len(caught.value.facts["image_numbers"]) == 16
    assert all(torch.equal(v, before[k]) for k, v in run.state.backbone.state_dict().items())


def test_a_folder_of_another_recipe_is_refused(whole):
    with pytest.raises(ValueError, match=r"belongs to another recipe(.|\n)*seed: 0 there, 7 asked"):
        train(small("seed=7"), whole, quiet=True)


def test_data_that_do_not_fit_the_network(tmp_path):
    with pytest.raises(ValueError, match=r"10 classes.*model\.num_classes=10"):
        train(small("model.num_classes=4"), tmp_path, quiet=True)
    assert not (tmp_path / "recipe.yaml").exists()


def test_microbatches_change_only_rounding(tmp_path):
    one = setup(small("model.dropout=0"), tmp_path / "a", distributed.init_distributed())
    two = setup(
        small("model.dropout=0", "engine.microbatch=5"),
        tmp_path / "b",
        distributed.init_distributed(),
    )
    for run in (one, two):
        loop.loop(
            dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, images=48)),
            ProgressDisplay(show=False),
            loop.StopSignal(),
        )
    for a, b in zip(one.state.backbone.parameters(), two.state.backbone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_lower_precision_is_of_the_arithmetic_alone(whole, tmp_path):
    """bf16 changes the losses a little; weights, moments and averages are float32 all the same."""
    train(small("engine.precision=bf16"), tmp_path, quiet=True)
    exact, low = ([r["loss"] for r in records(folder)] for folder in (whole, tmp_path))
    assert low != exact
    assert low == pytest.approx(exact, rel=2e-2)
    held = last_state(tmp_path)
    assert held.keys() == last_state(whole).keys()
    assert {t.dtype for t in held.values()} <= {torch.float32, torch.float64}


def test_checkpoints_are_kept_as_asked(tmp_path):
    train(
        small("save.every_images=16", "save.keep=2", "save.keep_every_images=64"),
        tmp_path,
        quiet=True,
    )
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["64", "128", "144", "160"]


def test_a_network_without_null_label_trains(tmp_path):
    own = [
        "model.null_label=false",
        "model.size=16",
        "model.num_classes=10",
        "model.channels=1",
        "data.source='digits'",
    ]
    recipe = config.override(
        recipe_for("dimr-tiny"),
        [*own, "images=32", "batch=16", "samples.count=4", "samples.steps=2"],
    )
    with pytest.raises(ValueError, match=r"no null label to drop to; set label_drop=0"):
        train(recipe, tmp_path / "a", quiet=True)
    folder = train(dataclasses.replace(recipe, label_drop=0.0), tmp_path / "b", quiet=True)
    assert (folder / "model" / "model.safetensors").exists()
