"""TensorBoard, Weights & Biases and trackio: each line of log.jsonl goes there too when the recipe's `track` asks."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mezzotint import config
from mezzotint.train.setup import Run

Trackers = Sequence[Callable[[dict[str, Any]], None]]
PROJECT = "mezzotint"


def check(names: Sequence[str]) -> None:
    """ValueError for a tracker whose package is not installed, before anything is computed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            how = "pip install wandb" if name == "wandb" else "pip install mezzotint[track]"
            raise ValueError(
                f"trackers={name} needs a package that is not installed: {how}, or leave it out of track"
            )


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """A log line as flat names: {"loss_by_logsnr": {"<-10": 1}} becomes {"loss_by_logsnr/<-10": 1}."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        elif key != "images":
            flat[key] = value
    return flat


@contextmanager
def tensorboard(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Event files in RUN/tensorboard; what a killed process wrote beyond its checkpoint is hidden on resume."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.state.images + 1)

    def write(record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record["images"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def wandb(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """One W&B run per run folder, resumed under its name; without a key or WANDB_MODE it stays on this disk."""
    import wandb as package  # pyright: ignore[reportMissingImports]

    known = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
    session = package.init(
        project=PROJECT, name=run.folder.name, id=identity(run.folder), resume="allow", dir=str(run.folder),
        config=config.to_dict(run.recipe), mode=None if known else "offline",
    )  # fmt: skip
    try:
        yield lambda record: session.log(
            {**scalars(record), "images": record["images"]}, step=record["images"]
        )
    finally:
        session.finish()


@contextmanager
def trackio(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """trackio's own store on this machine; `trackio show` draws it."""
    import trackio as package

    session = package.init(
        project=PROJECT, name=identity(run.folder), config=config.to_dict(run.recipe), resume="allow", embed=False,
        auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    try:
        yield lambda record: session.log(
            {**scalars(record), "images": record["images"]}, step=record["images"]
        )
    finally:
        session.finish()


def identity(folder: Path) -> str:
    """A name that the same run folder always gets and two folders of one name do not share."""
    path = str(folder.absolute())
    return f"{folder.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


@contextmanager
def opened(run: Run) -> Iterator[Trackers]:
    """The recipe's trackers, each a function of a log line; closed when the block ends."""
    known = {"tensorboard": tensorboard, "wandb": wandb, "trackio": trackio}
    with ExitStack() as stack:
        yield [stack.enter_context(known[name](run)) for name in run.recipe.trackers]
