"""Several ranks train like one, with either strategy, and resume on another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.launch import train

PRESETS = {
    "unet-tiny": ["model.size=16", "model.width=16", "model.emb_dim=32"],
    "dimr-tiny": ["model.size=16"],
    "diffit-tiny": ["model.size=16"],
    "jit-tiny": ["model.size=16"],
}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(a: Path, b: Path):
    torch.testing.assert_close(losses(a), losses(b), rtol=2e-5, atol=1e-6)
    wa, wb = (load_file(f / "model" / "model.safetensors") for f in (a, b))
    assert wa.keys() == wb.keys()
    for name in wa:
        # Adam turns the rounding of a gradient near zero into a step of up to the learning rate, so
        # that single entries may differ more on some processors: one in a thousand here.
        apart = (wa[name] - wb[name]).abs() > 2e-5 + 1e-3 * wb[name].abs()
        assert apart.float().mean() <= 1e-3, name
        # The bias of the keys' norm adds one number to every logit of a softmax: its gradient is
        # zero, and all that it holds is rounding.
        rounding = 1e-6 * wb[name].numel() ** 0.5
        assert (wa[name] - wb[name]).norm() <= 1e-4 * wb[name].norm() + rounding, name


def train_unet(ranks: int, folder: Path, *overrides: str) -> Path:
    return train(ranks, "unet-tiny", folder, *PRESETS["unet-tiny"], *overrides)


# Both strategies and both streams of random numbers.
STREAMS = {"ddp": "philox4x64", "fsdp": "philox4x32"}


@pytest.fixture(scope="module", params=STREAMS)
def strategy(request):
    return request.param


@pytest.fixture(scope="module")
def stream(strategy):
    return f"stream={STREAMS[strategy]}"


@pytest.fixture(scope="module")
def alone(stream, tmp_path_factory):
    return train_unet(1, tmp_path_factory.mktemp("ranks") / "one", stream)


@pytest.fixture(scope="module")
def of_two(strategy, stream, tmp_path_factory):
    """A run of two ranks, with a checkpoint at 48 of its 96 images."""
    folder = tmp_path_factory.mktemp("ranks") / strategy
    return train_unet(2, folder, f"engine.strategy={strategy}", stream)


def test_two_ranks_agree_with_one_process(alone, of_two):
    assert_same(alone, of_two)


@pytest.mark.slow
def test_four_ranks_agree_with_one_process(alone, stream, tmp_path):
    assert_same(alone, train_unet(4, tmp_path, "engine.strategy=ddp", stream))


def test_saved_on_two_ranks_resumed_on_one(alone, of_two, tmp_path):
    """As if both were killed after the checkpoint at 48 images."""
    folder = shutil.copytree(of_two, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "96")
    train_unet(1, folder)
    started = json.loads((folder / "environment.json").read_text())
    assert [start["images"] for start in started] == [0, 48]
    assert_same(alone, folder)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["dimr-tiny", "diffit-tiny", "jit-tiny"])
def test_every_family_shards(tmp_path, preset):
    one = train(1, preset, tmp_path / "one", *PRESETS[preset])
    assert_same(one, train(2, preset, tmp_path / "two", *PRESETS[preset], "engine.strategy=fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "strategy"), [("eps_mse", "ddp"), ("eps_mse", "fsdp"), ("consistency", "ddp")]
)
def test_losses_of_the_finest_branch_train_on_two_ranks_and_resume(tmp_path, objective, strategy):
    overrides = [*PRESETS["dimr-tiny"], f"objective.name={objective}", "save.every_images=48"]
    one = train(1, "dimr-tiny", tmp_path / "one", *overrides)
    overrides.append(f"engine.strategy={strategy}")
    two = train(2, "dimr-tiny", tmp_path / "two", *overrides, "images=48")
    assert_same(one, train(2, "dimr-tiny", two, *overrides))


@pytest.mark.slow
def test_saved_on_two_resumed_on_three(tmp_path):
    overrides = [*PRESETS["unet-tiny"], "batch=12", "save.every_images=48"]
    one = train(1, "unet-tiny", tmp_path / "one", *overrides)
    two = train(2, "unet-tiny", tmp_path / "two", *overrides, "images=48", "engine.strategy=fsdp")
    assert_same(one, train(3, "unet-tiny", two, *overrides, "engine.strategy=fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_with_an_image_less_than_others_agree_with_one_process(strategy, tmp_path):
    """16 images on 3 ranks are 5, 5 and 6, in microbatches of 2."""
    overrides = [*PRESETS["unet-tiny"], "engine.microbatch=2"]
    one = train(1, "unet-tiny", tmp_path / "one", *overrides)
    three = train(3, "unet-tiny", tmp_path / "three", *overrides, f"engine.strategy={strategy}")
    assert_same(one, three)
