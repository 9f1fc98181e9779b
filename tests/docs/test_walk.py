"""The commands of the first pages run in their order, with few images and a narrow network.

Only lengths, counts and widths are reduced. Three kinds of commands are skipped: those that do not
return (serve), need Inception's weights (evaluate, reference) or publish (--push). `test_commands`
parses them.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
from PIL import Image

from docs.test_commands import ROOT, read_blocks, read_commands
from helpers.s3_server import running_server
from mezzotint import cli

SHORT = ["images=16", "batch=8", "samples.count=2", "samples.steps=2"]
NARROW = {
    "unet-tiny": [
        "model.width=8", "model.emb_dim=16", "model.multipliers=[1,1]", "model.blocks=[1,1]",
        "model.attention=[false,true]",
    ]
}  # fmt: skip
SKIPPED = {"--hours", "serve", "demo", "evaluate", "reference", "--push", "--tyro-print-completion"}


def write_images(folder: Path) -> None:
    """Write six images of different sizes in each of two classes."""
    rng = np.random.default_rng(0)
    for label in ("daisy", "rose"):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (70 + i, 90 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


def write_grey_images(folder: Path) -> None:
    """Write six images of 12 bits in each of two classes, as 16-bit PNGs."""
    rng = np.random.default_rng(0)
    for label in ("healthy", "ill"):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 4096, (80, 80), dtype=np.uint16)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


def shorten(args: list[str]) -> list[str]:
    """Return the same command with fewer images and steps, and a narrower network."""
    if args[1] == "train":
        fields = [i for i, arg in enumerate(args) if "=" in arg and not arg.startswith("--")]
        last = fields[-1] if fields else 2  # else after the preset
        return [*args[: last + 1], *SHORT, *NARROW.get(args[2], []), *args[last + 1 :]]
    if args[1] == "sample":
        i = args.index("--num-images") + 1
        steps = [] if "--steps" in args else ["--steps", "2"]
        return [*args[:i], "2", *args[i + 1 :], *steps]
    if "--shards" in args:
        i = args.index("--shards") + 1
        return [*args[:i], "2", *args[i + 1 :]]
    return args


def is_skipped(args: list[str]) -> bool:
    """Return whether the command, or a field of the recipe that it sets, is in `SKIPPED`."""
    return not SKIPPED.isdisjoint([*args, *(arg.partition(".")[0] for arg in args)])


def test_shorten_and_skip():
    train = ["mezzotint", "train", "unet-tiny", "--data", "a", "x=1", "--out", "b"]
    assert shorten(train) == [*train[:6], *SHORT, *NARROW["unet-tiny"], *train[6:]]
    assert shorten(["mezzotint", "train", "auto", "x=1"])[4:] == SHORT
    sample = ["mezzotint", "sample", "runs/a", "--num-images", "16"]
    assert shorten(sample) == [*sample[:4], "2", "--steps", "2"]
    assert is_skipped(["mezzotint", "train", "unet-tiny", "evaluate.num_images=2"])
    assert not is_skipped(["mezzotint", "train", "unet-tiny", "--out", "b"])


# page: (folder with images, files that its commands write)
WALKS = {
    "README.md": ("FOLDER", {"samples.png", "runs/mine/model/model.safetensors"}),
    "docs/train-on-your-images.md": (
        "flowers",
        {
            "samples.png",
            "many/000001.png",
            "served/bucket/flowers64/mezzotint-shards.json",
            "runs/tuned/model/model.safetensors",
        },
    ),
    "docs/export.md": (
        "FOLDER",
        {"my-pipeline/model_index.json", "denoiser.pt2", "denoiser.onnx"},
    ),
}


@pytest.fixture
def _no_shape_checks():
    """Tracing uses symbolic sizes, which the shape annotations checked in tests would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def s3(tmp_path):
    with running_server(tmp_path / "served") as server:
        yield server


@pytest.mark.usefixtures("_no_shape_checks")
@pytest.mark.parametrize("page", WALKS)
def test_the_commands_of_a_page_run_in_order(page, tmp_path, monkeypatch, capsys, request):
    monkeypatch.chdir(tmp_path)
    source, expected = WALKS[page]
    write_images(tmp_path / source)
    if page == "docs/train-on-your-images.md":
        write_grey_images(tmp_path / "xrays")
    commands = [args for block in read_blocks(ROOT / page) for args in read_commands(block)]
    commands = [args for args in commands if not is_skipped(args)]
    assert len(commands) > 2
    if page == "docs/export.md":  # it starts from a trained run
        train = f"mezzotint train unet-tiny --data {source} model.size=32 --out runs/mine"
        commands.insert(0, train.split())
    for args in map(shorten, commands):
        if any(arg.startswith("s3://") for arg in args):
            request.getfixturevalue("s3")
        if "runs/other" in args:
            shutil.copytree("runs/flowers", "runs/other")
        monkeypatch.setattr(sys, "argv", args)
        try:
            cli.main()
        except SystemExit:
            pytest.fail(f"{shlex.join(args)}: {capsys.readouterr().err}")
    missing = sorted(name for name in expected if not (tmp_path / name).is_file())
    assert missing == []
