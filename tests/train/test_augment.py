"""Training with EDM's augmentations: bitwise resume, what the model says, and bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers import launch
from helpers.runs import assert_same_run, assert_same_tensors, small, weights
from mezzotint import config
from mezzotint.convert.adapt import initialise_from
from mezzotint.models import create_model, load_model
from mezzotint.recipes import recipe_for
from mezzotint.sampling.sample import sample
from mezzotint.train import checkpoint
from mezzotint.train.loop import check, train

SHORT = ("images=64", "samples.count=4", "samples.every_images=32", "save.every_images=32")
AUGMENTED = (*SHORT, "data.augment=0.5")


@pytest.fixture(scope="module")
def augmented(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return train(small(*AUGMENTED), tmp_path_factory.mktemp("augmented") / "run", quiet=True)


def test_a_resumed_run_is_the_same_bit_for_bit(augmented, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(augmented, folder)
    shutil.rmtree(checkpoint.list_checkpoints(folder)[-1])
    (folder / "samples" / "000000000064.png").unlink()
    for name in ("model", "model-raw"):
        shutil.rmtree(folder / name)
    train(small(*AUGMENTED, "engine.microbatch=null"), folder, quiet=True)
    assert_same_run(augmented, folder)


@pytest.mark.slow
def test_data_workers_do_not_change_it(augmented, tmp_path):
    other = train(small(*AUGMENTED, "data.workers=1"), tmp_path / "run", quiet=True)
    assert_same_tensors(weights(augmented), weights(other))


def test_it_changes_what_is_learned_and_the_model_reads_the_label(augmented, tmp_path):
    plain = train(small(*SHORT), tmp_path / "run", quiet=True)
    ours, theirs = weights(augmented), weights(plain)
    assert ours.keys() - theirs.keys() == {"conditioning.augment.weight"}
    assert ours["conditioning.augment.weight"].any()
    assert any(not torch.equal(ours[k], theirs[k]) for k in theirs)
    assert config.from_yaml(augmented / "recipe.yaml").model["augment_label"] is True
    model = load_model(augmented / "model").eval()
    assert model.info.config.augment_label
    assert sample(model, seeds=[0], label=3, steps=2).isfinite().all()


def test_a_run_can_start_from_a_network_without_the_label_and_the_reverse(augmented, tmp_path):
    plain = train(small(*SHORT), tmp_path / "run", quiet=True)
    fresh = {
        folder: create_model("unet-tiny", **config.from_yaml(folder / "recipe.yaml").model)
        for folder in (augmented, plain)
    }
    said: list[str] = []
    initialise_from(str(plain), said.append)(fresh[augmented])
    assert not fresh[augmented].backbone.state_dict()["conditioning.augment.weight"].any()
    assert any("new" in line and "conditioning.augment.weight" in line for line in said)
    said.clear()
    initialise_from(str(augmented), said.append)(fresh[plain])
    assert_same_tensors(
        dict(fresh[plain].backbone.state_dict()),
        {k: v for k, v in weights(augmented).items() if k != "conditioning.augment.weight"},
    )
    assert any("dropped" in line and "conditioning.augment.weight" in line for line in said)


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("diffit-latent-tiny", [], "data.augment 0.12 needs a network on pixels .* works on"),
        ("dimr-latent-tiny", [], "data.augment 0.12 needs a network on pixels"),
        ("unet-tiny", ["data.codec=taesd"], "unet-tiny works on .*taesd"),
        ("unet-tiny", ["model.augment_label=false"], "leave model.augment_label out"),
    ],
)  # fmt: skip
def test_a_network_that_cannot_be_told_is_refused(preset, overrides, message, tmp_path):
    recipe = config.override(
        recipe_for(preset), ["data.source=digits", "data.augment=0.12", *overrides]
    )
    with pytest.raises(ValueError, match=message) as error:
        check(recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "often", "true"])
def test_no_other_number_than_a_probability(value):
    with pytest.raises(ValueError, match=r"data\.augment"):
        small(f"data.augment={value}")


@pytest.mark.parametrize(
    ("preset", "probability"), [("diffit-cifar10", 0.12), ("diffit-ffhq64", 0.15)]
)
def test_the_image_space_recipes_augment_as_edm_does(preset, probability):
    recipe = recipe_for(preset)
    assert recipe.data.augment == probability
    assert not recipe.data.flip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_like_one(tmp_path, strategy):
    options = ["model.size=8", "model.width=16", "model.emb_dim=32", "data.augment=0.5"]
    alone, two = (
        launch.train(n, "unet-tiny", tmp_path / str(n), *options, f"engine.strategy={strategy}")
        for n in (1, 2)
    )
    for name, weight in weights(alone).items():
        assert (weight - weights(two)[name]).norm() <= 1e-3 * weight.norm() + 1e-5, name
