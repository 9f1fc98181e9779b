"""Runs with checkpoints on a store that end in the middle, in this process or on ranks of gloo."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from helpers.runs import small
from mezzotint.core.distributed import World
from mezzotint.core.object_store import StoreUnavailable, upload_file
from mezzotint.train import checkpoint_store, loop, step

ALONE = World(0, 1, torch.device("cpu"))


@contextmanager
def _before_batch(images: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` once, when so many images have been seen and written."""
    update, done = loop.update_averages, []

    def watch(run):
        update(run)
        if run.state.images >= images and not done:
            done.append(True)
            if run.writer._pending is not None:
                run.writer._pending.result()
            act()

    with mock.patch.object(loop, "update_averages", watch):
        yield


def after_checkpoint(images: int, act: Callable[[], None]):
    """Call `act` just before the checkpoint at so many images."""
    return _before_batch(images, act)


def train_and_die(folder: str, store: str, images: int) -> None:
    """Train until the step at so many images, and get killed there."""
    torch.set_num_threads(1)
    with _before_batch(images, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        loop.train(small(f"save.store={store}"), folder, quiet=True)


@contextmanager
def nan_at(images: int) -> Iterator[None]:
    """Make the gradient of one step not finite."""
    norms, done = loop.gradient_norms, []

    def broken(run):
        value = norms(run)
        if run.state.images == images and not done:
            done.append(True)
            value = value * torch.nan
        return value

    with mock.patch.object(loop, "gradient_norms", broken):
        yield


def train_apart(
    world: World, environment: dict[str, str], folder: str, overrides: list[str], images: int
) -> None:
    """Train on ranks whose folders are their own, as on nodes without a common disk.

    environment: of the server; ranks are forked from one process and inherit its own.
    """
    os.environ.update(environment)
    train_shared(world, f"{folder}{world.rank}", overrides, images)


def fail_on_one_rank(
    world: World, environment: dict[str, str], folder: str, overrides: list[str], failing: int
) -> str:
    """Return the error of training on ranks of which one cannot upload its part."""

    def upload(path, address):
        if world.rank == failing and path.suffix == ".distcp":
            raise StoreUnavailable("it does not answer")
        upload_file(path, address)

    with mock.patch.object(checkpoint_store, "upload_file", upload):
        try:
            train_apart(world, environment, folder, overrides, 32)
        except OSError as error:
            return str(error)
    return "no error"


def train_shared(world: World, folder: str, overrides: list[str], images: int) -> None:
    """Train on ranks with one folder, until so many images."""
    loop.train(small(*overrides, f"images={images}"), Path(folder), quiet=True)


assert step  # the ranks import it before they are forked
