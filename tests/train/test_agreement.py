"""Two ranks that differ end together, within seconds, with a sentence that names the difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.ports import find_port, find_ports

# Both ranks run it: each scenario has overrides of rank 1, and perhaps another folder or world.
SCRIPT = """
import json, os, sys, time
import torch; torch.set_num_threads(1)
from helpers.runs import small
from mezzotint.core import distributed
from mezzotint.train import agreement, loop
rank, scenarios = int(os.environ["RANK"]), json.loads({scenarios!r})
agreement.SHARED_FOLDER_SECONDS = 1.0
for name, scenario in scenarios.items():
    os.environ["MASTER_PORT"] = str(scenario["port"])
    os.environ["WORLD_SIZE"] = scenario.get("world", "2") if rank else "2"
    overrides = ["images=32", "samples.count=0"] + rank * scenario.get("overrides", [])
    folder = scenario["folder"] + rank * scenario.get("suffix", "")
    if rank and "code" in scenario:
        agreement.hash_code = lambda: scenario["code"]
    start, told = time.monotonic(), "trained"
    try:
        loop.train(small(*overrides), folder, quiet=True)
    except (ValueError, OSError) as error:
        told = str(error)
    print(json.dumps([name, told, time.monotonic() - start]), flush=True)
    agreement.hash_code = lambda: "the same"
"""


def launch(rank: int, arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **variables,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


SCENARIOS: dict[str, tuple[dict, str]] = {
    "lr": ({"overrides": ["optim.lr=1"]}, r"rank 1 has optim.lr 1.0, rank 0 0.002"),
    "batch": ({"overrides": ["batch=8"]}, "rank 1 has batch 8, rank 0 16"),
    "network": ({"overrides": ["model.width=16"]}, "rank 1 has model.width 16, rank 0 8"),
    "data": (
        {"overrides": ["data.source='digits:test'"]},
        "rank 1 has data 297 images of 10 classes",
    ),
    "no data": ({"overrides": ["data.source=nowhere"]}, "no data at 'nowhere'"),
    "folder": ({"suffix": "-of-rank-1"}, "is not the run folder of rank 0"),
    "code": ({"code": "other"}, "rank 1 has code of mezzotint other, rank 0 the same"),
    "world": ({"world": "3"}, "has world size"),
    "same": ({"overrides": ["data.source='digits:train'"]}, "trained"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, list[tuple[str, float]]]:
    """What each rank was told in every scenario, and after how many seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = find_ports(len(SCENARIOS))
    scenarios = {
        name: {**scenario, "port": port, "folder": str(folder / name)}
        for (name, (scenario, _)), port in zip(SCENARIOS.items(), ports, strict=True)
    }
    script = folder / "script.py"
    script.write_text(SCRIPT.format(scenarios=json.dumps(scenarios)))
    processes = [launch(rank, [str(script)]) for rank in (0, 1)]
    told: dict[str, list[tuple[str, float]]] = {name: [] for name in SCENARIOS}
    for process in processes:
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        for line in printed.splitlines():
            name, words, seconds = json.loads(line)
            told[name].append((words, seconds))
    return told


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_that_differ_end_together(told, name):
    assert len(told[name]) == 2
    for words, seconds in told[name]:
        assert SCENARIOS[name][1] in words
        assert seconds < 60


def test_an_error_of_one_rank_is_named_by_the_other(told):
    (rank0, _), (rank1, _) = told["no data"]
    assert rank0.startswith("rank 1 failed: ValueError: no data at 'nowhere'")
    assert rank1.startswith("no data at 'nowhere'")


def commands(tmp_path: Path, *of_rank_1: str) -> list[subprocess.Popen[str]]:
    """Start the same command on two ranks, with more overrides on rank 1."""
    port = str(find_port())
    head = ["-m", "mezzotint", "train", "unet-tiny", "images=64", "model.channels=1"]
    tail = ["--data", "digits", "--out", str(tmp_path / "run")]
    own = [[], list(of_rank_1)]
    return [launch(rank, [*head, *own[rank], *tail], MASTER_PORT=port) for rank in (0, 1)]


def test_a_rank_whose_command_is_wrong_ends_all_with_exit_1_and_no_traceback(tmp_path):
    for process in commands(tmp_path, "optim.lrr=1"):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 1
        assert "lrr" in errors
        assert "Traceback" not in errors


def test_a_rank_that_is_killed_ends_the_other_within_seconds(tmp_path):
    processes = commands(tmp_path)
    while not (tmp_path / "run").exists():
        time.sleep(0.1)
        assert processes[0].poll() is None
    processes[1].kill()
    _, errors = processes[0].communicate(timeout=100)
    processes[1].communicate()
    assert processes[0].returncode == 1
    assert "lost the others" in errors
    assert "Traceback" not in errors
