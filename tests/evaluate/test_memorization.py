"""Memorization: copies of training images are found, and shown next to their originals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.launch import run_here, torchrun
from mezzotint.cli.measure import Copies
from mezzotint.evaluate import features
from mezzotint.evaluate.evaluate import evaluate_memorization
from mezzotint.evaluate.features import NETWORK_BATCH, from_module
from mezzotint.evaluate.image_source import from_samples
from mezzotint.evaluate.memorization import measure_memorization, save_neighbour_sheet


def random_images(n):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 200, (n, 3, 12, 12), generator=generator, dtype=torch.uint8)


def source_of(images):
    return from_samples(lambda indices: images[list(indices)], len(images), "images", {})


class Net(torch.nn.Module):
    """Mean of 2 x 2 blocks."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 6).flatten(1)


def test_copies_of_training_images_raise_the_copy_rate():
    train, heldout, new = np.random.default_rng(0).normal(size=(3, 300, 8))
    without = measure_memorization(new, train, heldout, quantile=0.1)
    assert 0.03 < without.copy_rate < 0.2
    assert 0.4 < without.closer < 0.6
    half_copies = np.concatenate([new[:150], train[:150] + 1e-3])
    result = measure_memorization(half_copies, train, heldout, quantile=0.1)
    assert 0.5 < result.copy_rate < 0.6
    assert result.closer > 0.7
    assert result.index[150:, 0].tolist() == list(range(150))
    assert (result.distance.diff(dim=1) >= 0).all()


def test_held_out_images_are_as_close_as_held_out_images():
    train, heldout = np.random.default_rng(0).normal(size=(2, 300, 8))
    result = measure_memorization(heldout, train, heldout, quantile=0.1)
    assert result.closer == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("copies", "noise", "wanted"),
    [
        (0, 0, "no sign of copying: "),
        (150, 1e-3, "the model copies training images: "),
        (40, 1e-3, "the model copies training images: "),
        (300, 0.6, "the model does not copy outright "),
    ],
)
def test_a_sentence_says_whether_the_model_copies(copies, noise, wanted):
    train, heldout, new, other = np.random.default_rng(1).normal(size=(4, 300, 8))
    samples = np.concatenate([train[:copies] + noise * other[:copies], new[copies:]])
    if wanted.startswith("the model does not"):  # halfway between the two sets, none very near
        samples = 0.8 * new
    result = measure_memorization(samples, train, heldout, quantile=0.01)
    assert result.verdict.startswith(wanted)
    assert f"{result.copy_rate:.1%} of 300 samples" in result.verdict
    assert "than 99% of the held-out images are (1% without copying)" in result.verdict


@pytest.mark.parametrize(("quantile", "named"), [(0.001, "1000"), (0, "quantile 0 ")])
def test_bad_quantiles_are_refused(quantile, named):
    samples, train, heldout = np.random.default_rng(0).normal(size=(3, 300, 8))
    with pytest.raises(ValueError, match=named):
        measure_memorization(samples, train, heldout, quantile=quantile)


def test_the_sheet_shows_a_copy_next_to_its_original(tmp_path):
    x = random_images(60)
    copy = (x[7:8].int() + 1).clamp(0, 255).to(torch.uint8)
    samples = torch.cat([x[50:], copy])
    result = evaluate_memorization(
        source_of(samples),
        source_of(x[:30]),
        source_of(x[30:50]),
        [from_module(Net(), name="own", dims=12, size=12)],
        tmp_path / "s.png",
        rows=3,
        quantile=0.05,
    )
    assert result.index[10, 0] == 7
    assert result.distance[10, 0] == result.distance[:, 0].min()
    with Image.open(tmp_path / "s.png") as opened:
        sheet = np.asarray(opened)
    assert sheet.shape == (3 * 14 + 2, 5 * 14 + 8, 3)
    np.testing.assert_array_equal(sheet[2:14, 2:14], copy[0].permute(1, 2, 0))
    np.testing.assert_array_equal(sheet[2:14, 22:34], x[7].permute(1, 2, 0))


def test_sheets_of_grey_images_and_without_samples(tmp_path):
    x = random_images(6)[:, :1]
    save_neighbour_sheet(x[:2], [x[2:4], x[4:6]], tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as opened:
        assert opened.mode == "L"
    with pytest.raises(ValueError, match="1 samples and 0 rows"):
        save_neighbour_sheet(x[:1], [], tmp_path / "none.png")


class CountingNet(Net):
    """Counts the images that pass through."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


@pytest.fixture
def sets_of_images(tmp_path, monkeypatch):
    """The current folder, with 20 samples, 30 training and 100 held-out images, and a reference."""
    monkeypatch.chdir(tmp_path)
    net = CountingNet()
    own = from_module(net, name="own", dims=12, size=12)
    monkeypatch.setattr(features, "open_features", lambda names, path=None: [own])
    x = random_images(150).permute(0, 2, 3, 1).numpy()
    for name, images in {"train": x[:30], "unseen": x[30:130], "samples": x[130:]}.items():
        np.savez(f"{name}.npz", images)
    np.savez("larger.npz", x[:30].repeat(2, axis=1).repeat(2, axis=2))
    run_here("reference", "train.npz", "reference.npz")
    net.seen = 0
    return net


OPTIONS = ("--reference", "reference.npz", "--heldout-images", "unseen.npz", "--out", "found.json")


def test_the_command_draws_every_image_once(sets_of_images, capsys, tmp_path):
    options = (*OPTIONS, "--train-images", "train.npz")
    run_here("evaluate", "samples.npz", *options)
    # Batches of the network are filled up.
    once = sum(-(-n // NETWORK_BATCH) * NETWORK_BATCH for n in (20, 30, 100))
    assert sets_of_images.seen == once
    first = capsys.readouterr().out
    assert "copy rate: " in first
    assert "nearest training images: found.copies.png" in first
    assert (tmp_path / "found.copies.png").is_file()
    # What is done is not computed again.
    run_here("evaluate", "samples.npz", *options)
    assert sets_of_images.seen == once
    assert capsys.readouterr().out.endswith(first[first.index("copy rate") :])


def test_grey_samples_are_shown_beside_grey_images(sets_of_images, tmp_path):
    for name in ("train", "unseen", "samples"):
        np.savez(f"{name}.npz", np.load(f"{name}.npz")["arr_0"][..., :1])
    run_here("evaluate", "samples.npz", *OPTIONS, "--train-images", "train.npz")
    with Image.open(tmp_path / "found.copies.png") as sheet:
        assert sheet.mode == "L"


@pytest.mark.parametrize(
    ("train", "options", "words"),
    [
        ("larger.npz", (), r"larger\.npz holds images of 24x24 .* 12x12; give --size 12"),
        ("train.npz", ("--size", "16"), "of 16x16 .* give --size 12"),
        ("nothing.npz", (), r"nothing\.npz"),
        ("train.npz", ("--heldout-images", "samples.npz"), "20 held-out images .* give 100"),
        ("train.npz", ("--heldout-images", "train.npz"), "have images in common"),
    ],
)  # fmt: skip
def test_real_images_that_do_not_fit_are_refused_before_any_work(
    sets_of_images, tmp_path, train, options, words
):
    with pytest.raises(ValueError, match=words):
        run_here("evaluate", "samples.npz", *OPTIONS, "--train-images", train, *options)
    assert not sets_of_images.seen
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("train", "heldout"),
    [("f:all", "f:test"), ("f:train", "f:all"), ("f:val", "f:val"), ("o/n", "o/n"), ("f", "f:all")],
)
def test_no_image_is_both_trained_on_and_held_out(train, heldout):
    """By name; a source without a split may be all its images, or those of training."""
    with pytest.raises(ValueError, match="in common"):
        Copies(train=train, heldout=heldout, size=None).open(source_of(random_images(2)))


def test_training_images_of_another_name_are_found_before_samples_are_drawn(
    sets_of_images, tmp_path
):
    x = np.concatenate([np.load("unseen.npz")["arr_0"][:90], np.load("train.npz")["arr_0"][:10]])
    np.savez("mixed.npz", x)
    options = ("--train-images", "train.npz", "--heldout-images", "mixed.npz")
    with pytest.raises(ValueError, match="10 of 100 held-out images are among the training"):
        run_here("evaluate", "samples.npz", *OPTIONS[:2], *options, "--out", "found.json")
    assert sets_of_images.seen == sum(-(-n // NETWORK_BATCH) * NETWORK_BATCH for n in (30, 100))
    assert not (tmp_path / "found.json").exists()


def test_held_out_images_among_the_training_images_are_refused():
    """Also under another name, and up to the rounding of their features."""
    train, heldout = np.random.default_rng(0).normal(size=(2, 300, 8))
    heldout[0] = train[5]  # a duplicate in 300 does not matter
    measure_memorization(train, train, heldout)
    heldout[:3] = train[:3] * (1 + 1e-6)
    with pytest.raises(ValueError, match="3 of 300 held-out images are among the training"):
        measure_memorization(train, train, heldout)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path, monkeypatch):
    """The command under torchrun, with gloo."""
    monkeypatch.chdir(tmp_path)
    x = random_images(130).permute(0, 2, 3, 1).numpy()
    for name, images in {"train": x[:10], "unseen": x[10:110], "samples": x[110:]}.items():
        np.savez(f"{name}.npz", images)
    lite = ("--features", "efficientnet-lite0")
    done = torchrun(1, "reference", "train.npz", "reference.npz", *lite)
    assert done.returncode == 0, done.stderr[-3000:]
    found = []
    for ranks in (1, 2):
        options = (*OPTIONS[:-1], f"{ranks}.json", *lite, "--train-images", "train.npz")
        done = torchrun(ranks, "evaluate", "samples.npz", *options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("copy rate: ") == 1
        found.append(done.stdout[done.stdout.index("copy rate") :].replace(f"{ranks}.", ""))
    assert found[0] == found[1]
