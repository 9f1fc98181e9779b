"""Non-finite steps: stop, skip and rollback, the bundle and its replay; spikes; other events."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch

from helpers.runs import assert_same_tensors, events, records, small, weights
from mezzotint.core import distributed
from mezzotint.data.prepare_shards import prepare_shards
from mezzotint.train import log, loop, nonfinite
from mezzotint.train.nonfinite import NonFiniteError, find_spike
from mezzotint.train.progress import ProgressDisplay
from mezzotint.train.replay import replay
from mezzotint.train.setup import setup


def run_loop(run):
    loop.loop(run, ProgressDisplay(show=False), loop.StopSignal())
    run.writer.close()


def poison_weights(run, name):
    dict(run.state.backbone.named_parameters())[name].data.view(-1)[0] = torch.nan


def names(run):
    return [n for n, _ in run.state.backbone.named_parameters()]


@pytest.fixture(scope="module")
def first_half(tmp_path_factory):
    """64 images of a run."""
    return loop.train(small("images=64"), tmp_path_factory.mktemp("half") / "run", quiet=True)


@pytest.fixture
def resumed(first_half, tmp_path):
    """A function from overrides to that run set up again, ready to continue to 160 images."""

    def start(*overrides):
        shutil.copytree(first_half, tmp_path / "run")
        return setup(small(*overrides), tmp_path / "run", distributed.init_distributed())

    return start


def test_stop_writes_a_bundle_that_fails_again_at_the_same_layer(resumed):
    run = resumed()
    inner = [n for n, m in run.state.backbone.named_modules() if isinstance(m, torch.nn.Conv2d)]
    broken = inner[len(inner) // 2]
    poison_weights(run, f"{broken}.weight")
    before = {k: v.clone() for k, v in run.state.backbone.state_dict().items()}
    with pytest.raises(
        NonFiniteError,
        match=r"at 64 images(.|\n)*mezzotint replay .*bundles/64",
    ):
        run_loop(run)
    assert_same_tensors(before, run.state.backbone.state_dict())
    bundle = run.folder / "bundles" / "64"
    assert {p.name for p in bundle.iterdir()} == {
        "recipe.yaml",
        "bundle.json",
        "weights.safetensors",
        "manifest.json",
    }
    facts = json.loads((bundle / "bundle.json").read_text())
    assert facts["image_numbers"] == list(range(64, 80))
    assert all(math.isfinite(v) for v in facts["logsnr"])
    assert list(facts["layers"]) == names(run)
    assert facts["layers"][f"{broken}.weight"]["weight_norm"] == "nan"
    again = replay(bundle)
    assert again.fails
    assert again.weights == [f"{broken}.weight"]
    assert again.forward == f"{broken} (Conv2d)"
    assert all(math.isnan(v) for v in again.loss)


def test_replay_of_a_finite_step_reproduces_its_losses(resumed):
    """Four losses were set to nan from outside; replay finds them finite, the others equal."""
    run = resumed("engine.microbatch=5")
    real = run.objective

    def objective(model, x, eps, logsnr, cond):
        loss = real(model, x, eps, logsnr, cond)
        return torch.where(logsnr == logsnr.min(), torch.nan, loss)

    with pytest.raises(NonFiniteError, match=r"4 of 16 .*image \d+ at log-SNR -?\d") as caught:
        run_loop(dataclasses.replace(run, objective=objective))
    again = replay(run.folder / "bundles" / "64")
    assert not again.fails
    assert (again.forward, again.backward, again.weights) == (None, None, [])
    recorded = [float(v) for v in caught.value.facts["loss"]]
    assert sum(math.isnan(v) for v in recorded) == 4
    assert [a for a, b in zip(again.loss, recorded, strict=True) if math.isfinite(b)] == [
        b for b in recorded if math.isfinite(b)
    ]
    assert "fails again: no" in str(again)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The digits in four shards."""
    folder = tmp_path_factory.mktemp("digits") / "shards"
    prepare_shards("digits:8", str(folder), 8, 4, progress=False)
    return folder


@pytest.mark.parametrize(("lanes", "images"), [("null", 48), ("2", 64), ("4", 16)])
def test_a_step_on_shards_replays_in_the_order_of_its_lanes(
    shards, tmp_path, monkeypatch, lanes, images
):
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    recipe = small(
        f"data.source={shards}", f"data.shards.lanes={lanes}", "data.shards.shuffle_images=16",
        "data.shards.cache_gb=0.1",
    )  # fmt: skip
    run = setup(recipe, tmp_path / "run", distributed.init_distributed())
    recorded = []

    def objective(*arguments):
        loss = run.objective(*arguments)
        if run.state.images < images:
            return loss
        recorded.extend(loss.tolist())
        return loss * torch.nan

    with pytest.raises(NonFiniteError):
        run_loop(dataclasses.replace(run, objective=objective))
    bundle = run.folder / "bundles" / str(images)
    again = replay(bundle)
    assert not again.fails
    assert again.image_numbers == list(range(images, images + 16))
    assert again.loss == recorded
    # A copy elsewhere is the same data.
    copy = shutil.copytree(shards, tmp_path / "copy")
    assert replay(bundle, source=str(copy)).loss == recorded


def test_an_overflowing_gradient_is_detected_though_every_loss_is_finite(resumed):
    run = resumed()

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.inf

    broken = next(
        m for n, m in run.state.backbone.named_modules() if isinstance(m, torch.nn.Conv2d)
    )
    broken.register_forward_hook(lambda m, given, out: Overflow.apply(out))
    with pytest.raises(NonFiniteError, match="all losses are finite"):
        run_loop(run)


def test_skip_leaves_the_weights_and_counts_the_step(resumed, monkeypatch):
    run = resumed("nonfinite.on_nonfinite=skip")
    real, seen = run.objective, []

    def objective(model, x, eps, logsnr, cond):
        seen.append(run.state.images)
        loss = real(model, x, eps, logsnr, cond)
        return loss * torch.nan if run.state.images in (80, 112) else loss

    handle, handled = nonfinite.handle_nonfinite, []

    def handle_and_compare(*arguments):
        before = {k: v.clone() for k, v in run.state.backbone.state_dict().items()}
        event = handle(*arguments)
        assert_same_tensors(before, run.state.backbone.state_dict())
        handled.append(run.state.images)
        return event

    monkeypatch.setattr(nonfinite, "handle_nonfinite", handle_and_compare)
    run_loop(dataclasses.replace(run, objective=objective))
    assert seen == list(range(64, 160, 16))
    assert handled == [80, 112]
    assert [(r["images"], r["skipped_steps"]) for r in records(run.folder)] == [
        (32, 0), (64, 0), (96, 1), (128, 2), (160, 2)
    ]  # fmt: skip
    assert all(math.isfinite(r["loss"]) for r in records(run.folder))
    assert [(e["images"], e["event"]) for e in events(run.folder)] == [(96, "skip"), (128, "skip")]
    assert sorted(p.name for p in (run.folder / "bundles").iterdir()) == ["112", "80"]
    assert all(torch.isfinite(w).all() for w in weights(run.folder).values())


def test_skips_are_limited(resumed):
    run = resumed("nonfinite.on_nonfinite=skip", "nonfinite.limit=2")
    with pytest.raises(NonFiniteError, match=r"nonfinite\.limit=2"):
        run_loop(
            dataclasses.replace(
                run, objective=lambda m, x, e, l, c: run.objective(m, x, e, l, c) * torch.nan
            )
        )
    assert run.state.images == 96


def test_rollback_restores_the_newest_checkpoint_and_takes_the_next_images(resumed):
    """Weights that turned bad after the checkpoint are replaced; images seen are kept."""
    run = resumed("nonfinite.on_nonfinite=rollback", "save.every_images=64")
    at_checkpoint = {k: v.clone() for k, v in run.state.backbone.state_dict().items()}
    real, seen = run.objective, []

    def objective(model, x, eps, logsnr, cond):
        if run.state.images == 96:
            poison_weights(run, names(run)[0])
        if run.state.images == 112:
            assert_same_tensors(at_checkpoint, run.state.backbone.state_dict())
        seen.append(run.state.images)
        return real(model, x, eps, logsnr, cond)

    run_loop(dataclasses.replace(run, objective=objective))
    assert seen == list(range(64, 160, 16))
    (event,) = events(run.folder)
    assert (event["event"], event["images"], event["to_images"]) == ("rollback", 112, 64)
    assert records(run.folder)[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(w).all() for w in weights(run.folder).values())
    averages = run.state.averages["ema"]
    assert all(torch.isfinite(w).all() for w in averages.values())


def test_rollback_without_a_checkpoint_stops(tmp_path):
    run = setup(small("nonfinite.on_nonfinite=rollback"), tmp_path, distributed.init_distributed())
    with pytest.raises(NonFiniteError, match="no checkpoint to roll back to"):
        run_loop(
            dataclasses.replace(
                run, objective=lambda m, x, e, l, c: run.objective(m, x, e, l, c) * torch.nan
            )
        )


def test_a_damaged_bundle_and_other_data_are_refused(resumed, tmp_path):
    run = resumed()
    with pytest.raises(NonFiniteError):
        run_loop(
            dataclasses.replace(
                run, objective=lambda m, x, e, l, c: run.objective(m, x, e, l, c) * torch.nan
            )
        )
    bundle = run.folder / "bundles" / "64"
    with pytest.raises(ValueError, match="digits:test"):
        replay(bundle, source="digits:test")
    path = bundle / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"weights\.safetensors has \d+ bytes"):
        replay(bundle)


def test_a_spike_is_measured_against_the_median_of_recent_losses():
    usual = [1 + 0.1 * math.sin(7 * i) for i in range(128)]
    assert find_spike(usual[:31], 100.0, 10) is None  # too few to know
    assert find_spike(usual, 1.3, 10) is None
    assert find_spike(usual, 2.5, 10) == pytest.approx(1, abs=0.02)
    assert (
        find_spike([*usual[:100], *[50.0] * 28], 5.0, 10) is not None
    )  # earlier spikes hide no later one
    assert (
        find_spike([1.0] * 128, 1.05, 10) is None
    )  # a flat curve: 1 % of the median is the least unit
    assert find_spike([1.0] * 128, 1.2, 10) is not None
    assert find_spike(usual, 0.0, 10) is None  # falling is no spike


def test_spikes_are_reported_and_counted_across_a_resume(tmp_path):
    recipe = small(
        "batch=2", "log_every_images=16", "nonfinite.spike=20", "images=128", "save.every_images=80"
    )

    def trained(folder, images):
        run = setup(
            dataclasses.replace(recipe, images=images), folder, distributed.init_distributed()
        )
        real = run.objective

        def objective(model, x, eps, logsnr, cond):
            return real(model, x, eps, logsnr, cond) * (1e4 if run.state.images in (90, 100) else 1)

        run_loop(dataclasses.replace(run, objective=objective))
        return folder

    whole = trained(tmp_path / "whole", 128)
    assert [(e["event"], e["images"]) for e in events(whole)] == [("spike", 92), ("spike", 102)]
    assert [r["spikes"] for r in records(whole)][-3:] == [1, 2, 2]
    parts = tmp_path / "parts"
    for images in (94, 128):
        trained(parts, images)
    assert events(parts) == events(whole)
    assert records(parts)[-1]["spikes"] == 2


def test_unreadable_images_are_listed(tmp_path):
    from PIL import Image

    data = tmp_path / "data"
    data.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(data / f"{i:02d}.png")
    (data / "05.png").write_bytes((data / "05.png").read_bytes()[:40])
    recipe = small(f"data.source={data}", "images=32", "model.num_classes=0")
    loop.train(recipe, tmp_path / "run", quiet=True)
    path = tmp_path / "run" / "unreadable.txt"
    (line,) = path.read_text().splitlines()
    assert line.startswith("05.png\t")
    assert log.append_unreadable(path, {"05.png": "another reason", "00.png": "cut"}) == 1
    names = [line.partition("\t")[0] for line in path.read_text().splitlines()]
    assert names == ["00.png", "05.png"]


def test_an_average_longer_than_the_run_is_reported(tmp_path):
    recipe = small("images=80", "ema.half_life_images=160", "ema.rampup=null")
    loop.train(recipe, tmp_path / "run", quiet=True)
    (event,) = events(tmp_path / "run")
    assert (event["event"], event["images"]) == ("ema", 80)
    assert "71%" in event["why"]  # 0.5^(80 / 160) of the average is still the initial weights
    loop.train(small("images=80", "ema.half_life_images=160"), tmp_path / "ramp", quiet=True)
    assert not (tmp_path / "ramp" / "events.jsonl").exists()
