"""1024 pixels: prepare, train, sample and evaluate a tiny network; count the published one."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.backbones import dummy_condition, get_backbone
from mezzotint.models import meta_model, preset_info
from mezzotint.recipes import recipe_for
from mezzotint.tools.plan import plan

SIZE = 1024
NETWORK = ["model.size=1024", "model.patch=64", "model.noise_scale=4", "model.width=32",
           "model.depth=2", "model.context_start=1", "model.num_classes=0"]  # fmt: skip
LIMIT_GIB = 2.5  # of every command; 16 images are 0.2 GB as float32


def test_the_published_network_at_1024_pixels_on_the_meta_device():
    model = meta_model(preset_info("jit-b-1024"))
    network = get_backbone(model)
    z = torch.empty(2, 3, SIZE, SIZE, device="meta")
    out = network(z, torch.empty(2, device="meta"), dummy_condition(network.config, z))[0]
    assert out.shape == z.shape


@pytest.mark.slow
def test_the_published_network_at_1024_pixels_is_planned():
    result = plan(recipe_for("jit-b-1024"), gpus=8, device="h200")
    assert result["params"] / 1e6 == pytest.approx(141.654, abs=6e-4)


@pytest.fixture
def mezzotint(tmp_path):
    """Return a function that runs a command in its own process, below LIMIT_GIB."""
    script = (
        "import resource, sys\n"
        "from mezzotint.cli import run_command\n"
        "run_command(*sys.argv[1:])\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"assert peak < {LIMIT_GIB} * 2**20, peak\n"
    )

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_1024_pixels_end_to_end_in_bounded_memory(mezzotint, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(16):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
        coarse.resize((1536, 1024), Image.Resampling.BICUBIC).save(tmp_path / f"photos/{i}.jpg")
    mezzotint("prepare", "photos", "prepared", "--size", SIZE)
    mezzotint("train", "jit-tiny", "--data", "prepared", "--out", "run", *NETWORK, "images=32",
              "batch=4", "samples.every_images=0")  # fmt: skip
    mezzotint("sample", "run", "-n", 6, "--steps", 4, "--sampler", "flow_heun:noise_scale=4",
              "--out", "samples.npz")  # fmt: skip
    with np.load(tmp_path / "samples.npz") as file:
        assert file["arr_0"].shape == (6, SIZE, SIZE, 3)
        assert file["arr_0"].std() > 0
    features = ["--features", "efficientnet-lite0"]
    mezzotint("reference", "prepared", "reference.npz", *features)
    mezzotint(
        "evaluate", "samples.npz", "--reference", "reference.npz", *features, "--out", "e.json"
    )
    assert "efficientnet-lite0" in (tmp_path / "e.json").read_text()
