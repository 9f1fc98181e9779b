"""The commands of docs/shards.md, from a folder to samples, with a kill and a change of ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from PIL import Image

from helpers.image_files import png, write_folder

PAGE = Path(__file__).parents[2] / "docs" / "shards.md"
# Of the page's training commands: a small network and a short run with a checkpoint in its middle.
SMALL = [
    "model.width=16", "model.emb_dim=32", "batch=12", "log_every_images=48", "samples.count=0",
    "save.every_images=48", "engine.precision=float32", "optim.warmup_images=0",
]  # fmt: skip


def page_commands() -> list[list[str]]:
    text = PAGE.read_text().partition("## From a folder to samples")[2]
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    assert block
    return [line.split() for line in block[1].splitlines()]


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command of the page in `folder`."""
    programs = {
        "mezzotint": [sys.executable, "-m", "mezzotint"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    return subprocess.Popen(
        [*programs[words[0]], *words[1:]], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
             "MEZZOTINT_CACHE": str(folder / "cache"), "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )  # fmt: skip


def lose_machine(launcher: subprocess.Popen[str]) -> None:
    """Kill a launcher and its workers, which have sessions of their own."""
    family = psutil.Process(launcher.pid)
    for process in [family, *family.children(recursive=True)]:
        process.kill()
    launcher.communicate()


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-3000:]
    return printed


def test_the_commands_of_the_page(s3_server, tmp_path):
    prepare, two_ranks, three_ranks, sample = page_commands()
    write_folder(
        tmp_path / "photographs",
        {f"{'ab'[k % 2]}/{k:03d}.png": png(k, (16, 16)) for k in range(96)},
    )
    assert "96 images" in finish(start(prepare, tmp_path))

    process = start([*two_ranks, *SMALL, "images=100000"], tmp_path)
    saved = s3_server.folder / "bucket" / "runs" / "lake" / "checkpoints" / "48" / "manifest.json"
    deadline = time.monotonic() + 200
    while not saved.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    lose_machine(process)
    for name in ("runs", "cache"):
        shutil.rmtree(tmp_path / name)

    printed = finish(start([*three_ranks, *SMALL, "images=240"], tmp_path))
    assert re.search(r"resuming at (48|96|144|192) images", printed), printed[-3000:]
    newest = s3_server.folder / "bucket" / "runs" / "lake" / "checkpoints" / "240"
    assert json.loads((newest / "manifest.json").read_text())["ranks"] == 3
    lines = [json.loads(line)["images"] for line in
             (tmp_path / "runs" / "lake" / "log.jsonl").read_text().splitlines()]  # fmt: skip
    assert lines == [48, 96, 144, 192, 240]

    finish(start([*sample, "--steps", "2"], tmp_path))
    with Image.open(tmp_path / "samples.png") as grid:
        assert min(grid.size) >= 16
