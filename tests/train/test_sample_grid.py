"""Sample grids: which labels, seeds and captions they show, on any number of ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from mezzotint.config import SampleGrid
from mezzotint.core.distributed import World
from mezzotint.core.image_grid import make_grid, save_png
from mezzotint.data.transforms import to_uint8
from mezzotint.models import create_model
from mezzotint.process.denoiser import Cond
from mezzotint.sampling.sample import generate
from mezzotint.train import sample_grid
from mezzotint.train.sample_grid import (
    grid_labels,
    grid_path,
    grid_settings,
    save_sample_grid,
    spread_indices,
)

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, device=CPU)
GRID = SampleGrid(count=5, steps=2)
SEED = 40


@pytest.mark.parametrize(
    ("num_classes", "count", "labels"),
    [
        (3, 3, [0, 1, 2]),
        (3, 6, [0, 0, 1, 1, 2, 2]),
        (3, 5, [0, 0, 1, 1, 2]),
        (3, 7, [0, 0, 0, 1, 1, 2, 2]),
        (10, 4, [0, 1, 2, 3]),
        (10, 0, []),
    ],
)
def test_labels_are_in_class_order_and_as_even_as_the_count_allows(num_classes, count, labels):
    found = grid_labels(num_classes, count)
    assert found is not None
    assert found.tolist() == labels


def test_a_grid_is_in_the_dtype_of_its_settings():
    assert grid_settings(GRID).dtype == "auto"
    assert grid_settings(dataclasses.replace(GRID, dtype="float32")).dtype == "float32"


def test_without_classes_there_are_no_labels():
    assert grid_labels(0, 5) is None


def test_captions_are_spread_over_the_dataset():
    assert spread_indices(4, 100) == [0, 25, 50, 75]
    assert spread_indices(3, 2) == [0, 0, 1]


@pytest.fixture(scope="module")
def model():
    """A network whose output depends on its label: a new one predicts zero for every label."""
    torch.manual_seed(0)
    model = create_model("unet-tiny", size=8, channels=1, width=8, emb_dim=16, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval().requires_grad_(False)


def expected_png(model, labels, seed, path):
    """The bytes of a grid whose images are sampled one at a time."""
    images = [
        generate(model, [seed + i], Cond(label=torch.tensor([label])), grid_settings(GRID))
        for i, label in enumerate(labels)
    ]
    # One row per class where each is shown as often.
    columns = len(labels) // 3 if len(labels) % 3 == 0 else None
    save_png(make_grid(to_uint8(torch.cat(images)), columns=columns), path)
    return path.read_bytes()


def test_a_saved_grid_shows_its_labels_with_its_seeds(model, tmp_path):
    path = save_sample_grid(model, tmp_path, GRID, SEED, ALONE)
    assert path == grid_path(tmp_path, model.info.images)
    saved = path.read_bytes()
    assert saved == expected_png(model, [0, 0, 1, 1, 2], SEED, tmp_path / "same.png")
    assert saved != expected_png(model, [0, 1, 1, 1, 2], SEED, tmp_path / "labels.png")
    assert saved != expected_png(model, [0, 0, 1, 1, 2], SEED + 1, tmp_path / "seeds.png")


def test_a_saved_grid_has_one_row_per_class(model, tmp_path):
    path = save_sample_grid(model, tmp_path, replace(GRID, count=6), SEED, ALONE)
    assert path.read_bytes() == expected_png(model, [0, 0, 1, 1, 2, 2], SEED, tmp_path / "rows.png")


def test_two_ranks_draw_the_grid_of_one(model, tmp_path, monkeypatch):
    """Rank 1 draws its share first; rank 0 then gathers both, as the process group would."""
    alone = save_sample_grid(model, tmp_path / "one", GRID, SEED, ALONE).read_bytes()
    shares = []

    def gather(share):
        shares.append(share)
        return shares if len(shares) == 2 else None

    monkeypatch.setattr(sample_grid, "gather_to_rank0", gather)
    monkeypatch.setattr(sample_grid, "raise_on_all_ranks", lambda error, world: None)
    for rank in (1, 0):
        world = World(rank=rank, size=2, device=CPU)
        path = save_sample_grid(model, tmp_path / "two", GRID, SEED, world)
        assert path.exists() == (rank == 0)
    assert [positions for positions, _ in shares] == [[1, 3], [0, 2, 4]]
    assert path.read_bytes() == alone


def test_pixels_are_shown_as_they_are():
    images = torch.linspace(-1.2, 1.2, 16).reshape(1, 1, 4, 4)
    assert torch.equal(sample_grid.to_visible(images, "pixels"), images.clamp(-1, 1))


def test_without_a_decoder_three_latent_channels_are_shown():
    latents = torch.linspace(-3, 3, 4 * 16).reshape(1, 4, 4, 4)
    shown = sample_grid.to_visible(latents, "no-such-autoencoder")
    assert torch.equal(shown, latents[:, :3] / 3)
