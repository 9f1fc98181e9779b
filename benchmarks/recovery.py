"""Seconds without a training step when a rank or a node is lost, leaves or joins.

python benchmarks/recovery.py --last-call 3

Each node is a torchrun with one rank on this machine, and trains a tiny U-Net on the digits. Prints
a row for each event: seconds until the ranks that start again have restored the checkpoint, until
their first step has ended, and the images trained twice.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

RECIPE = [
    "unet-tiny", "model.size=8", "model.channels=1", "model.width=8", "model.emb_dim=16",
    "model.multipliers=[1,1]", "model.blocks=[1,1]", "model.attention=[false,true]",
    "model.num_classes=10", "batch=24", "images=10000000", "log_every_images=24",
    "save.every_images=480", "samples.count=0",
]  # fmt: skip
BATCH = 24


def main() -> None:
    """Start two nodes, lose a rank, let a node leave, join and be lost; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--last-call", type=float, default=30.0, help="torchrun's default is 30")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def start_node(host: bool = False) -> psutil.Process:
            settings = f"is_host={int(host)},last_call_timeout={options.last_call:g}"
            node = start_agent(folder, port, settings)
            stack.callback(lose, node)
            return node

        nodes = [start_node(host=True), start_node()]
        while starts(folder)[-1:] != [2]:
            time.sleep(0.1)
        wait_for_step(folder, 20 * BATCH)
        print("| event | ranks | checkpoint restored | first step | images again |")
        print("|---|---|---|---|---|")
        measure(folder, "a rank is killed", lambda: nodes[1].children()[0].kill())
        measure(folder, "a node leaves with notice", lambda: nodes[1].send_signal(signal.SIGTERM))
        measure(folder, "a node joins", lambda: nodes.append(start_node()))
        measure(folder, "a node is lost", lambda: lose(nodes[-1]))


def start_agent(folder: Path, port: int, settings: str) -> psutil.Process:
    """Start a torchrun with one rank and these settings of its rendezvous."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:3", "--nproc-per-node", "1",
        "--max-restarts", "20", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}",
        "--rdzv-id", "recovery", "--rdzv-conf", settings,
        "-m", "mezzotint", "train", *RECIPE, "--data", "digits", "--out", str(folder / "run"),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (folder / "output.log").open("ab") as output:
        agent = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    return psutil.Process(agent.pid)


def lose(node: psutil.Process) -> None:
    """End a torchrun and its ranks at once."""
    try:
        processes = [node, *node.children()]
        for process in processes:
            process.kill()
    except psutil.NoSuchProcess:
        return


def measure(folder: Path, event: str, cause) -> None:
    """Cause an event and print its row, once the ranks train on for 40 steps."""
    before, images = len(starts(folder)), last_image(folder)
    begun = time.monotonic()
    cause()
    while len(starts(folder)) == before:
        images = max(images, last_image(folder))
        time.sleep(0.02)
    restored, at = time.monotonic() - begun, first_image(folder)
    while images > at and last_image(folder) >= images:
        time.sleep(0.02)  # until the start has cut the log back
    wait_for_step(folder, at + BATCH)
    stepped = time.monotonic() - begun
    ranks, again = starts(folder)[-1], max(0, images - at)
    print(f"| {event} | {ranks} | {restored:.0f} s | {stepped:.0f} s | {again} |", flush=True)
    wait_for_step(folder, at + 40 * BATCH)


def read_starts(folder: Path) -> list[dict]:
    """Return the starts that the run has recorded."""
    path = folder / "run" / "environment.json"
    return json.loads(path.read_text()) if path.exists() else []


def starts(folder: Path) -> list[int]:
    """Return the number of ranks of each start."""
    return [sum(start["devices"].values()) for start in read_starts(folder)]


def first_image(folder: Path) -> int:
    """Return the images seen at the newest start."""
    return read_starts(folder)[-1]["images"]


def last_image(folder: Path) -> int:
    """Return the images seen at the last line of the log."""
    path = folder / "run" / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["images"] if lines else 0


def wait_for_step(folder: Path, images: int) -> None:
    """Return once so many images have been seen."""
    while last_image(folder) < images:
        time.sleep(0.02)


if __name__ == "__main__":
    main()
