"""Memorization: copies of training images are found, and shown next to their originals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.evaluate.evaluate import evaluate_memorization
from mezzotint.evaluate.features import from_module
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
        from_module(Net(), name="own", dims=12, size=12),
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
