"""Trackers: TensorBoard, Weights & Biases and trackio get every line of log.jsonl."""

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


def check_installed(names: Sequence[str]) -> None:
    """Raise ValueError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            command = "pip install wandb" if name == "wandb" else "pip install mezzotint[track]"
            raise ValueError(
                f"trackers={name} needs a package that is not installed; {command}, or leave it out"
            )


@contextmanager
def open_trackers(run: Run, print_line: Callable[[str], None] = print) -> Iterator[Trackers]:
    """Open the recipe's trackers, each a function of a log record, until the block ends.

    One that fails is closed to further records and never ends training.

    Args:
        print_line: gets a line for each tracker that fails.
    """
    known = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio}
    opened: list[tuple[str, ExitStack]] = []
    trackers: Trackers = []
    for name in run.recipe.trackers:
        try:
            stack = ExitStack()
            write = stack.enter_context(known[name](run))
        except Exception as error:
            print_line(f"the tracker {name} does not start and gets no records: {error}")
            continue
        opened.append((name, stack))
        trackers.append(_tolerant(name, write, print_line))
    try:
        yield trackers
    finally:
        for name, stack in reversed(opened):
            try:
                stack.close()
            except Exception as error:
                print_line(f"the tracker {name} does not close: {error}")


def _tolerant(
    name: str, write: Callable[[dict[str, Any]], None], print_line: Callable[[str], None]
) -> Callable[[dict[str, Any]], None]:
    """Return `write` without its errors: the first is printed, and nothing is written after it."""
    failed = False

    def try_to_write(record: dict[str, Any]) -> None:
        nonlocal failed
        if failed:
            return
        try:
            write(record)
        except Exception as error:
            failed = True
            print_line(f"the tracker {name} failed and gets no more records: {error}")

    return try_to_write


@contextmanager
def open_tensorboard(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write event files to RUN/tensorboard; a resumed run hides those beyond its checkpoint."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.state.images + 1)

    def write(record: dict[str, Any]) -> None:
        for name, value in flatten_record(record).items():
            writer.add_scalar(name, value, record["images"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def open_wandb(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Log to one W&B run per folder, resumed by id; offline without WANDB_MODE or an API key."""
    import wandb as package  # pyright: ignore[reportMissingImports]

    configured = "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ
    session = package.init(
        project=PROJECT,
        name=run.folder.name,
        id=folder_id(run.folder),
        resume="allow",
        dir=str(run.folder),
        config=config.to_dict(run.recipe),
        mode=None if configured else "offline",
    )
    try:
        yield lambda record: session.log(
            {**flatten_record(record), "images": record["images"]}, step=record["images"]
        )
    finally:
        session.finish()


@contextmanager
def open_trackio(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Log to trackio's store on this machine; `trackio show` draws it."""
    import trackio as package

    session = package.init(
        project=PROJECT,
        name=folder_id(run.folder),
        config=config.to_dict(run.recipe),
        resume="allow",
        embed=False,
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    try:
        yield lambda record: session.log(
            {**flatten_record(record), "images": record["images"]}, step=record["images"]
        )
    finally:
        session.finish()


def flatten_record(record: dict[str, Any]) -> dict[str, float]:
    """Flatten a log record: {"loss_by_logsnr": {"<-10": 1}} becomes {"loss_by_logsnr/<-10": 1}."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        elif key != "images":
            flat[key] = value
    return flat


def folder_id(folder: Path) -> str:
    """Return a name that is always the same for one folder and differs for two of the same name."""
    path = str(folder.absolute())
    return f"{folder.name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
