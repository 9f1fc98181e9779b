"""An uninterrupted tiny run that the tests compare with; no test may write into its folder."""

from __future__ import annotations

import shutil

import pytest
import torch

from helpers.runs import small
from mezzotint.train import checkpoint
from mezzotint.train.loop import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An uninterrupted run of 160 images, with checkpoints at 48, 96, 144 and 160."""
    torch.set_num_threads(1)
    return train(small(), tmp_path_factory.mktemp("whole") / "run", quiet=True)


@pytest.fixture
def stopped(whole, tmp_path):
    """A function: a copy of that run as if killed after the checkpoint at so many images."""

    def until(images):
        folder = tmp_path / "run"
        shutil.copytree(whole, folder)
        for saved in checkpoint.list_checkpoints(folder):
            if int(saved.name) > images:
                shutil.rmtree(saved)
        for grid in (folder / "samples").iterdir():
            if int(grid.stem) > images:
                grid.unlink()
        return folder

    return until
