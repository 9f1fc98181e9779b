"""Training under torchrun agents of this machine, each as a node of its own, that tests kill.

Run as a module it is `mezzotint`, with two changes: training waits at the images of the file
`GATE`, and each rank writes which images it has trained on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

GATE, TRAINED = "MEZZOTINT_TEST_GATE", "MEZZOTINT_TEST_TRAINED"


class Agent:
    """One torchrun, as the node of a cluster starts it; it and its ranks end with the test."""

    def __init__(self, folder: Path, launch: list[str], arguments: list[str]):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            GATE: str(folder / "gate"),
            TRAINED: str(folder / "trained.jsonl"),
        }
        with (folder / "agents.log").open("ab") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", *launch,
                    "-m", "helpers.elastic", *arguments,
                ],
                stdout=output, stderr=output, env=environment,
            )  # fmt: skip

    def ranks(self) -> list[psutil.Process]:
        """The processes of this agent's ranks, by local rank."""
        try:
            return psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """End the whole node at once, as a loss of power does."""
        ranks = self.ranks()
        self.process.kill()  # first, so that it starts no others
        for rank in ranks:
            rank.kill()
        self.process.wait()


def open_gate(folder: Path, images: int) -> None:
    """Let training go on to so many images."""
    (folder / ".gate").write_text(str(images))
    (folder / ".gate").rename(folder / "gate")


def wait_until(condition: Callable[[], bool], folder: Path, seconds: float = 300) -> None:
    """Wait for a condition; AssertionError with what the agents printed."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, (folder / "agents.log").read_text()[-6000:]
        time.sleep(0.05)


def waiting_at(folder: Path, images: int, saved: int) -> Callable[[], bool]:
    """A condition: a rank waits at so many images, and the checkpoint at `saved` is whole."""
    manifest = folder / "run" / "checkpoints" / str(saved) / "manifest.json"
    return lambda: (folder / f"gate.{images}").exists() and manifest.exists()


def starts(run: Path) -> list[dict]:
    """The starts of a run; one that is being written may be missing."""
    try:
        return json.loads((run / "environment.json").read_text())
    except (OSError, ValueError):
        return []


def trained(folder: Path) -> dict[int, list[int]]:
    """The image numbers of each step, by the images seen before it, of those that last trained it.

    A step that is trained again after a restart counts with its last world alone.
    """
    steps: dict[int, tuple[str, list[int]]] = {}
    for line in (folder / "trained.jsonl").read_text().splitlines():
        record = json.loads(line)
        world, numbers = steps.get(record["images"], ("", []))
        if world != record["world"]:
            numbers = []
        steps[record["images"]] = record["world"], [*numbers, *record["numbers"]]
    return {images: sorted(numbers) for images, (_, numbers) in steps.items()}


def main() -> None:
    """Run `mezzotint` with a gate before every step."""
    from mezzotint import cli
    from mezzotint.train import loop

    gradient, stops = loop.gradient, []

    class Stop(loop.StopSignal):
        def __init__(self):
            super().__init__()
            stops.append(self)

    def gated(run, batch):
        images, gate = run.state.images, Path(os.environ[GATE])
        while images >= int(gate.read_text()) and not stops[0].requested:
            Path(f"{gate}.{images}").touch()
            time.sleep(0.02)
        if stops[0].requested:
            Path(f"{gate}.signalled").touch()
        losses = gradient(run, batch)
        world = f"{os.environ['MASTER_PORT']} {run.world.size}"
        record = {"images": images, "world": world, "numbers": batch.image_numbers}
        with open(os.environ[TRAINED], "a") as file:
            file.write(f"{json.dumps(record)}\n")
        return losses

    loop.StopSignal, loop.gradient = Stop, gated  # pyright: ignore[reportPrivateImportUsage]
    cli.main()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
