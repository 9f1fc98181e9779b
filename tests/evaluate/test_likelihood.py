"""Bits per dimension: closed forms with exact networks, and the same for any batch and ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers.closed_forms import gaussian, mixture
from helpers.launch import torchrun
from helpers.tiny_models import tiny
from mezzotint.cli import run_command
from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate import extract
from mezzotint.evaluate.likelihood import (
    BOUND,
    ODE,
    RULE,
    TERMS,
    LikelihoodSettings,
    bits_per_dim,
    print_bits_per_dim,
)
from mezzotint.evaluate.results import compare, load_evaluation
from mezzotint.models import preset_info, save_model
from mezzotint.process import prediction
from mezzotint.process.denoiser import Model, Parameterisation

WIDE = (-15.0, 15.0)


class Exact(nn.Module):
    """A backbone that predicts any row of a known denoiser's answer; it keeps what it is given."""

    def __init__(self, denoise, kind):
        super().__init__()
        self.denoise, self.kind = denoise, kind
        self.dtype_of_inputs = nn.Parameter(torch.zeros(()))
        self.levels, self.labels = [], []

    def forward(self, z, noise, cond):
        self.levels += noise.tolist()
        self.labels += [] if cond.label is None else cond.label.tolist()
        answer = self.denoise(z, noise, cond)
        return [prediction.target(self.kind, answer.x, answer.eps, noise)]


def exact_model(denoise, kind=prediction.eps, **config):
    info = preset_info("unet-tiny", **{"size": 4, "channels": 1, **config})
    return Model(Exact(denoise, kind), Parameterisation(kind=kind, noise=lambda level: level), info)


def write_images(path, codes, labels=None):
    """Write uint8 (n, h, w) as a grey ADM batch and open it."""
    arrays = {"arr_0": codes[..., None].astype(np.uint8)}
    if labels is not None:
        arrays |= {"arr_1": np.array(labels)}
    np.savez(path, **arrays)
    return open_images(path, size=codes.shape[1], channels=1)


def bits(evaluation):
    return {number.metric: number.value for number in evaluation.numbers}


def value_of(code):
    return code / 127.5 - 1


@pytest.mark.parametrize("row", ["eps", "x", "v", "flow", "edm"])
def test_a_constant_image_and_a_perfect_network_of_any_row_cost_nothing(row, tmp_path):
    images = write_images(tmp_path / "a.npz", np.full((6, 4, 4), 200))
    model = exact_model(gaussian(value_of(200), 0.0), prediction.named(row))
    found = bits_per_dim(model, images, LikelihoodSettings(logsnr=WIDE, draws=3))
    assert list(bits(found)) == [BOUND, *(f"{BOUND} of {name}" for name in TERMS)]
    assert all(abs(value) < 1e-6 for value in bits(found).values())


def test_the_values_are_those_that_the_network_is_trained_on(tmp_path):
    """With VDM's rule, half a code away, the same perfect network would miss every code."""
    images = write_images(tmp_path / "a.npz", np.full((6, 4, 4), 200))
    shifted = exact_model(gaussian(2 * 200.5 / 256 - 1, 0.0))
    found = bits(bits_per_dim(shifted, images, LikelihoodSettings(logsnr=WIDE, draws=8)))
    assert found[f"{BOUND} of reconstruction"] < 1e-6
    assert found[BOUND] > 1


def test_two_values_cost_their_entropy(tmp_path):
    """A quarter of the pixels has the first: H(1/4) = 0.8113 bits, whatever is predicted."""
    codes = np.full((8, 32, 32), 101)
    codes[:, :8] = 100
    images = write_images(tmp_path / "a.npz", codes)
    entropy = -0.25 * math.log2(0.25) - 0.75 * math.log2(0.75)
    assert entropy == pytest.approx(0.811278, abs=1e-6)
    denoise = mixture([value_of(100), value_of(101)], 0.0, [0.25, 0.75])
    settings = LikelihoodSettings(logsnr=WIDE, draws=24)
    by_row = [
        bits(bits_per_dim(exact_model(denoise, row, size=32), images, settings))[BOUND]
        for row in (prediction.x, prediction.v)
    ]
    assert by_row[0] == pytest.approx(by_row[1], rel=1e-3)
    assert by_row[0] == pytest.approx(entropy, rel=0.04)
    # A bound of few steps lies well above.
    few = dataclasses.replace(settings, steps=16)
    assert bits(bits_per_dim(exact_model(denoise, size=32), images, few))[BOUND] > 1.2 * entropy


def test_the_flow_gives_the_density_of_the_dequantised_images(tmp_path):
    """Codes at even quantiles of N(0.1, 0.25^2): its entropy plus log2(127.5) bits per dimension.

    One more spacing, 2 / 256, would add 0.0057.
    """
    mean, std = 0.1, 0.25
    quantiles = [NormalDist(mean, std).inv_cdf((i + 0.5) / 1024) for i in range(1024)]
    codes = np.round((np.array(quantiles) + 1) * 127.5).reshape(4, 16, 16)
    images = write_images(tmp_path / "a.npz", codes)
    settings = LikelihoodSettings(logsnr=(-8.0, 11.0), draws=1, ode_steps=100)
    found = bits_per_dim(exact_model(gaussian(mean, std), size=16), images, settings)
    expected = math.log2(2 * math.pi * math.e * std**2) / 2 + math.log2(127.5)
    assert found[ODE].value == pytest.approx(expected, abs=0.004)
    assert found[ODE].settings["ode_steps"] == 100


def test_levels_are_stratified_over_all_images_and_draws(tmp_path):
    images = write_images(tmp_path / "a.npz", np.full((10, 4, 4), 9))
    model = exact_model(gaussian(0.0, 0.5))
    bits_per_dim(model, images, LikelihoodSettings(logsnr=(-2.0, 8.0), draws=4, batch=4))
    drawn = sorted(set(model.backbone.levels))  # tiles are filled up with copies
    assert [int((level + 2) / 10 * 40) for level in drawn] == list(range(40))


@pytest.fixture(scope="module")
def digits():
    return open_images("digits:test", size=8, channels=1)


OPTIONS = ["--draws", "2", "--ode-steps", "1", "-n", "11"]
SHORT = LikelihoodSettings(num_images=11, draws=2, ode_steps=1)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(extract, "piece_images", lambda num_images: 4)


@pytest.fixture(scope="module")
def of_digits(digits):
    """The numbers of a random class-conditional network; read-only."""
    return bits_per_dim(tiny(channels=1, num_classes=10), digits, SHORT, name="digits:test")


@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_does_not_matter(batch, digits, of_digits, small_pieces):
    settings = dataclasses.replace(SHORT, batch=batch)
    found = bits_per_dim(tiny(channels=1, num_classes=10), digits, settings, name="digits:test")
    assert found == of_digits  # to the last bit
    assert found[BOUND].error > 0


def test_an_interrupted_evaluation_resumes(digits, of_digits, small_pieces, tmp_path):
    model, asked = tiny(channels=1, num_classes=10), []

    def third():
        asked.append(None)
        return len(asked) == 3

    with pytest.raises(RuntimeError, match="asked to stop"):
        bits_per_dim(model, digits, SHORT, folder=tmp_path, stopping=third)
    asked.append(None)
    found = bits_per_dim(model, digits, SHORT, name="digits:test", folder=tmp_path, stopping=third)
    assert len(asked) == 3 + 1 + 1  # of three pieces, one was left
    assert found == of_digits
    # Other settings and other weights have pieces of their own.
    for other, seed in ((SHORT, 1), (dataclasses.replace(SHORT, seed=5), 0)):
        changed = tiny(channels=1, num_classes=10, seed=seed)
        found = bits_per_dim(changed, digits, other, name="digits:test", folder=tmp_path)
        assert found[BOUND].value != of_digits[BOUND].value


def test_ranks_share_the_pieces_and_give_the_numbers_of_one(
    digits, of_digits, small_pieces, tmp_path, monkeypatch
):
    """One rank after the other, with the pieces of both in one folder."""
    model, found = tiny(channels=1, num_classes=10), None
    for rank in (1, 0):
        batches = []
        monkeypatch.setattr(extract, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(extract, "get_world_size", lambda: 2)
        count = lambda batches=batches: bool(batches.append(None))  # noqa: E731
        with contextlib.suppress(AssertionError):  # a rank other than 0 has no result
            found = bits_per_dim(
                model, digits, SHORT, name="digits:test", folder=tmp_path, stopping=count
            )
        assert len(batches) == {0: 2, 1: 1}[rank]
    assert found == of_digits  # to the last bit


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(saved, of_digits, tmp_path):
    """The command under torchrun, with gloo."""
    arguments = [saved, "--data", "digits:test", "--bits-per-dim", *OPTIONS]
    done = torchrun(2, "evaluate", *arguments, "--out", str(tmp_path / "bits.json"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_evaluation(tmp_path / "bits.json") == of_digits
    assert done.stdout.count("saved:") == 1


def test_the_card_names_the_data_and_the_rule(of_digits, digits, capsys):
    assert of_digits.protocol.uint8_rule == RULE == "x = k / 127.5 - 1 for k = 0...255"
    assert of_digits.protocol.num_images == 11
    number = of_digits[BOUND]
    assert number.reference == {
        "name": "digits:test", "hash": digits.fingerprint, "num_images": len(digits),
    }  # fmt: skip
    assert number.settings == {
        "logsnr": [-5.0, 13.3], "steps": "continuous", "draws": 2, "condition": "class labels",
        "seed": 0, "ode_steps": 1,
    }  # fmt: skip
    terms = [of_digits[f"{BOUND} of {name}"].value for name in TERMS]
    assert number.value == pytest.approx(sum(terms))
    print_bits_per_dim(of_digits)
    printed = capsys.readouterr().out
    assert f"data set: digits:test, {len(digits):,} images" in printed
    assert f"uint8_rule: {RULE}" in printed
    assert "given the model: class labels; log-SNR -5 to 13.3" in printed
    assert "unknown" not in printed


def test_numbers_of_other_steps_are_not_comparable(digits, of_digits):
    steps = dataclasses.replace(SHORT, steps=4)
    found = bits_per_dim(tiny(channels=1, num_classes=10), digits, steps, name="digits:test")
    assert found[BOUND].value > of_digits[BOUND].value
    assert f"{BOUND}: settings" in compare(found, of_digits).conflicts


def test_an_unreadable_image_is_not_replaced(tmp_path):
    for i in range(4):
        Image.fromarray(np.full((4, 4), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    images = open_images(str(tmp_path), size=4, channels=1)
    with pytest.raises(ValueError, match=r"2\.png cannot be read"):
        bits_per_dim(exact_model(gaussian(0.0, 1.0)), images)


def test_the_error_is_over_images(tmp_path):
    """Images of one value each, whose bounds are known apart."""
    images = write_images(
        tmp_path / "a.npz", np.repeat([[[0]], [[255]], [[128]]], 16, 1).repeat(16, 2)
    )
    model = exact_model(gaussian(0.0, 0.5), size=16)
    found = bits_per_dim(model, images, LikelihoodSettings(draws=2))
    prior = [(x**2 / (1 + math.exp(5)) + 1 / (1 + math.exp(-5)) - 1) / 2 for x in (-1, 1, 1 / 255)]
    prior = [(p + math.log1p(math.exp(-5)) / 2) / math.log(2) for p in prior]
    number = found[f"{BOUND} of prior"]
    assert number.value == pytest.approx(np.mean(prior), rel=1e-5)
    assert number.error == pytest.approx(np.std(prior, ddof=1) / math.sqrt(3), rel=1e-4)


def test_classes_are_matched_by_name(tmp_path):
    """The model numbers them the other way round, and one image has no label."""
    codes = np.arange(4).reshape(4, 1, 1).repeat(4, 1).repeat(4, 2)
    images = write_images(tmp_path / "a.npz", codes, [0, 1, 1, 0])
    assert images.label_names is not None
    images.labels[3] = -1
    model = exact_model(gaussian(0.0, 0.5), num_classes=2)
    model.info = dataclasses.replace(model.info, labels=images.label_names[::-1])
    bits_per_dim(model, images, LikelihoodSettings(draws=1))
    assert model.backbone.labels == [1, 0, 0, 2]


def latent_model():
    return tiny("diffit-latent-tiny")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (latent_model, r"works in latents of .*not that of images"),
        (lambda: tiny(channels=3, size=8), "1 channels and 8 pixels.*size=8, channels=3"),
        (lambda: tiny(channels=1, size=16), "size=16"),
        (lambda: tiny(channels=1, num_classes=3), "10 classes.*3 others"),
    ],
)
def test_models_and_images_that_do_not_fit_are_refused(make, named, digits):
    with pytest.raises(ValueError, match=named):
        bits_per_dim(make(), digits, SHORT, name="digits")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"logsnr": (3.0, -5.0)}, "noisy end must lie below"),
        ({"logsnr": (-50.0, 5.0)}, r"logsnr\[0\] -50"),
        ({"draws": 0}, "draws 0"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_bad_settings_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        LikelihoodSettings(**changes)


def test_a_damaged_network_is_named(digits):
    model = tiny(channels=1)
    next(model.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"diffusion term.*damaged"):
        bits_per_dim(model, digits, SHORT)


def test_the_model_stays_in_its_mode(digits):
    model = tiny(channels=1).train()
    bits_per_dim(model, digits, LikelihoodSettings(num_images=2, draws=1))
    assert model.training


@pytest.fixture
def saved(tmp_path):
    save_model(tiny(channels=1, num_classes=10), tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_writes_and_prints_the_card(saved, of_digits, tmp_path, capsys):
    out = tmp_path / "bits.json"
    arguments = [saved, "--data", "digits:test", "--bits-per-dim", *OPTIONS]
    run_command("evaluate", *arguments, "--out", str(out))
    assert load_evaluation(out) == of_digits
    printed = capsys.readouterr().out
    assert "data set: digits:test" in printed
    assert json.loads(out.read_text())["protocol"]["uint8_rule"] == RULE


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bits-per-dim"], "--bits-per-dim needs --data"),
        (["--data", "digits"], "--data is of --bits-per-dim"),
        (["--bits-per-dim", "--data", "digits", "--reference", "a.npz"], "--reference"),
        (["--bits-per-dim", "--data", "digits", "--guidance", "2"], "--guidance"),
        ([], "--reference"),
        (["--bits-per-dim", "--data", "digits", "--logsnr", "3", "1"], "noisy end"),
    ],
)
def test_options_that_do_not_go_together_are_refused(saved, options, named):
    with pytest.raises(ValueError, match=named):
        run_command("evaluate", saved, *options)
