"""The way of a newcomer: the commands of the first pages are run in their order, on few pictures and for few images.

Lengths and counts are cut, nothing else is changed. Left out are commands that do not return (serve), that need
Inception's weights (evaluate) or that publish (--push); `test_commands` still parses those.
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

from docs.test_commands import ROOT, blocks, commands
from mezzotint import cli

SHORT = ["images=32", "batch=16", "samples.count=4", "samples.steps=2"]


def pictures(folder: Path) -> None:
    """Six pictures in each of two classes, of different sizes."""
    rng = np.random.default_rng(0)
    for label in ("daisy", "rose"):
        (folder / label).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, (70 + i, 90 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


def shortened(words: list[str]) -> list[str]:
    """The same command with fewer images."""
    if words[1] == "train" and "--dry-run" not in words:
        fields = [i for i, word in enumerate(words) if "=" in word and not word.startswith("--")]
        last = fields[-1] if fields else 2  # the preset; fields stand next to each other
        return [*words[: last + 1], *SHORT, *words[last + 1 :]]
    if words[1] == "sample":
        at = words.index("-n")
        return [
            *words[: at + 1],
            "2",
            *words[at + 2 :],
            *([] if "--steps" in words else ["--steps", "2"]),
        ]
    return words


def left_out(words: list[str]) -> bool:
    asks = [*words, *(word.partition(".")[0] for word in words)]
    return bool({"serve", "demo", "evaluate", "--push", "--tyro-print-completion"} & set(asks))


def test_what_is_shortened_and_left_out():
    assert shortened(["mezzotint", "train", "unet-tiny", "--data", "a", "x=1", "--out", "b"])[
        4:
    ] == [
        "a",
        "x=1",
        *SHORT,
        "--out",
        "b",
    ]
    assert shortened(["mezzotint", "sample", "runs/a", "-n", "16"])[3:] == [
        "-n",
        "2",
        "--steps",
        "2",
    ]
    assert left_out(["mezzotint", "train", "unet-tiny", "evaluate.num_images=2"])
    assert not left_out(["mezzotint", "train", "unet-tiny", "--out", "b"])


WALKS = {
    "README.md": ("FOLDER", {"samples.png", "runs/mine/model/model.safetensors"}),
    "docs/own-images.md": (
        "flowers",
        {"samples.png", "many/000001.png", "runs/tuned/model/model.safetensors"},
    ),
    "docs/elsewhere.md": (
        "FOLDER",
        {"my-pipeline/model_index.json", "denoiser.pt2", "denoiser.onnx"},
    ),
}


@pytest.fixture
def _numbers_may_be_symbols():
    """Tracing gives sizes that stand for any number, which annotations executed in tests would refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_numbers_may_be_symbols")
@pytest.mark.parametrize("page", WALKS)
def test_the_commands_of_a_page_run_in_their_order(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, expected = WALKS[page]
    pictures(tmp_path / source)
    given = [
        words for block in blocks(ROOT / page) for words in commands(block) if not left_out(words)
    ]
    if page == "docs/elsewhere.md":  # it begins with a run
        first = f"mezzotint train unet-tiny --data {source} model.size=32 --out runs/mine"
        given.insert(0, first.split())
    assert len(given) > 2
    for words in map(shortened, given):
        if "runs/other" in words:
            shutil.copytree("runs/flowers", "runs/other")
        monkeypatch.setattr(sys, "argv", words)
        try:
            cli.main()
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
    assert all((tmp_path / name).is_file() for name in expected), sorted(
        p.name for p in tmp_path.iterdir()
    )
