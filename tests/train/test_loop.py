"""An interrupted run resumes bitwise; checkpoints, sample grids and model folders of a run."""

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


def test_a_run_writes_recipe_log_checkpoints_grids_and_models(whole):
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


def test_model_raw_holds_the_weights_without_averaging(whole):
    raw, averaged = (
        load_file(whole / name / "model.safetensors") for name in ("model-raw", "model")
    )
    run = setup(small(), whole, distributed.init_distributed())
    trained = run.state.backbone.state_dict()
    assert all(torch.equal(raw[name], t) for name, t in trained.items())
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


def test_stopped_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch):
    """Stop after every second step, also in the middle of a log window."""
    stops = 0
    while stops < 20:
        stop = loop.StopSignal()
        steps = iter(range(2))
        real = loop.update_averages

        def update(run, stop=stop, steps=steps, real=real):
            real(run)
            stop.requested = next(steps, None) == 0  # the next step sees it

        monkeypatch.setattr(loop, "StopSignal", lambda stop=stop: stop)
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
def test_a_killed_process_resumes_bitwise(whole, tmp_path, number):
    folder = tmp_path / "run"
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "64/160 images" in line:
            process.send_signal(number)
            break
    _, printed = process.communicate()
    assert process.returncode == (0 if number == signal.SIGTERM else -number)
    assert ("same command" in printed) == (number == signal.SIGTERM)
    train(small(), folder, quiet=True)
    assert_same_run(whole, folder)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_resumed(whole, stopped, damage):
    folder = stopped(96)
    newest = folder / "checkpoints" / "96"
    data = next(newest.glob("*.distcp"))
    content = data.read_bytes()
    if damage == "truncated":
        data.write_bytes(content[:-10])
    elif damage == "flipped":
        data.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "missing":
        data.unlink()
    else:
        (newest / "manifest.json").unlink()
    intact, messages = checkpoint.find_newest_intact(folder)
    assert intact == folder / "checkpoints" / "48"
    assert len(messages) == 1
    assert "checkpoint 96" in messages[0]
    if damage == "flipped":
        train(small(), folder, quiet=True)
        assert_same_run(whole, folder)


def test_a_full_disk_keeps_the_previous_checkpoint(stopped, monkeypatch):
    folder = stopped(48)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(OSError, match=r"96 images.*No space left"):
        train(small(), folder, quiet=True)
    monkeypatch.undo()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["48"]
    assert checkpoint.find_damage(folder / "checkpoints" / "48") is None


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    run = setup(small(), tmp_path, distributed.init_distributed())
    before = {k: v.clone() for k, v in run.state.backbone.state_dict().items()}
    bad = dataclasses.replace(
        run, objective=lambda m, x, eps, l, c: run.objective(m, x, eps, l, c) * (l * 0 / (l < 0))
    )
    with pytest.raises(NonFiniteError, match=r"at 0 images.*image \d+ at log-SNR -?\d") as caught:
        loop.loop(bad, ProgressDisplay(show=False), loop.StopSignal())
    assert len(caught.value.facts["image_numbers"]) == 16
    assert all(torch.equal(v, before[k]) for k, v in run.state.backbone.state_dict().items())


def test_a_folder_of_another_recipe_is_refused(whole):
    with pytest.raises(ValueError, match=r"seed: 0 .*7"):
        train(small("seed=7"), whole, quiet=True)


def test_data_with_too_many_classes_are_refused(tmp_path):
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


def test_bf16_changes_the_arithmetic_and_not_the_stored_state(whole, tmp_path):
    """The losses change a little; weights, moments and averages stay float32."""
    train(small("engine.precision=bf16"), tmp_path, quiet=True)
    exact, low = ([r["loss"] for r in records(folder)] for folder in (whole, tmp_path))
    assert low != exact
    assert low == pytest.approx(exact, rel=2e-2)
    state = last_state(tmp_path)
    assert state.keys() == last_state(whole).keys()
    assert {t.dtype for t in state.values()} <= {torch.float32, torch.float64}


@pytest.mark.parametrize(
    ("every", "keep", "keep_every", "kept"),
    [(16, 2, 64, ["64", "128", "144", "160"]), (40, 1, 40, ["48", "80", "128", "160"])],
)
def test_old_checkpoints_are_deleted_as_the_recipe_says(tmp_path, every, keep, keep_every, kept):
    overrides = (f"save.every_images={every}", f"save.keep={keep}")
    train(small(*overrides, f"save.keep_every_images={keep_every}"), tmp_path, quiet=True)
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == kept


@pytest.mark.parametrize("images", [1, 100, 144])
def test_a_run_is_not_cut_to_a_length_below_what_it_has_seen(images, tmp_path):
    train(small("images=160"), tmp_path, quiet=True)
    before = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match=rf"has seen 160 images, more than images={images}"):
        train(small(f"images={images}"), tmp_path, quiet=True)
    assert (tmp_path / "recipe.yaml").read_bytes() == before
    # The last batch of a run may go beyond its length.
    train(small("images=150"), tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("batch", "every", "keep_every", "kept"),
    [
        (256, 10**6, 10**6, [1_000_192, 2_000_128, 3_000_064, 4_000_000, 5_000_192, 6_000_128]),
        (256, 10**6, 2 * 10**6, [2_000_128, 4_000_000, 6_000_128]),
        (256, 10**6, 3 * 10**6, [3_000_064, 6_000_128]),
        (250, 10**6, 3 * 10**6, [3_000_000, 6_000_000]),
        (6000, 10**6, 2_500_000, [3_000_000, 5_004_000]),
        (256, 10**6, None, []),
    ],
)
def test_the_first_checkpoint_past_each_multiple_stays(batch, every, keep_every, kept):
    """Through every deletion of a run, whether or not the batch divides the multiple."""
    there: list[int] = []
    for images in range(batch, 7_500_000, batch):
        if images // every > (images - batch) // every:
            there.append(images)
            gone = checkpoint.checkpoints_to_delete(there, images, 1, keep_every)
            there = [i for i in there if i not in gone]
            assert checkpoint.checkpoints_to_delete(there, images, 1, keep_every) == []
    assert there[:-1] == kept


def test_a_network_without_null_label_trains(tmp_path):
    overrides = [
        "model.null_label=false", "model.size=16", "model.num_classes=10", "model.channels=1",
        "data.source='digits'", "images=32", "batch=16", "samples.count=4", "samples.steps=2",
    ]  # fmt: skip
    recipe = config.override(recipe_for("dimr-tiny"), overrides)
    with pytest.raises(ValueError, match="label_drop=0"):
        train(recipe, tmp_path / "a", quiet=True)
    folder = train(dataclasses.replace(recipe, label_drop=0.0), tmp_path / "b", quiet=True)
    assert (folder / "model" / "model.safetensors").exists()
