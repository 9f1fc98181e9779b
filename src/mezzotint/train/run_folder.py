"""The run folder: checks, lock file, saved recipe."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.core.distributed import restarts_ranks
from mezzotint.core.files import atomic_write, expand_user, is_special, no_follow
from mezzotint.data.image_dataset import split_source

RECIPE = "recipe.yaml"
# The former rank 0 of a run that torchrun restarts may still save, or its machine is lost and a
# network file system keeps its lock for a while.
RESTART_SECONDS = 120.0
# Fields that may differ when a run is resumed: how long, how fast, how often, what to do on
# failure.
CHANGEABLE = (
    "images", "engine", "save", "samples", "evaluate", "log_every_images", "nonfinite", "trackers",
    "data.workers", "data.text_cache", "ema.snapshot_every_images",
    "data.shards.cache", "data.shards.cache_gb", "data.shards.missing", "data.shards.patience_s",
    "data.source",  # the data is known by its content, see `train.data_record`
)  # fmt: skip


def data_folder(source: str) -> str:
    """Return the path or hub name of a data source, without its :split."""
    return split_source(source)[0]


def check_run_folder(folder: Path, source: str) -> None:
    """Check that a run may start in `folder`, and change nothing.

    Errors: ValueError for a folder inside the data folder, one that holds other files, devices or
        pipes, and one where another process trains; OSError where it cannot be written.
    """
    base = data_folder(source)
    data = expand_user(base)
    # The sample grids of the run would become training images.
    if base and data.is_dir() and folder.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"{folder} is inside the data folder {base}, so that sample grids would become "
            "training images; use an --out elsewhere, e.g. --out runs/NAME"
        )
    if folder.is_dir() and not (folder / RECIPE).exists():
        listed = [p for p in folder.iterdir() if not _is_of_another_rank(p)]
        others = sorted(p.name for p in listed if not p.name.startswith("."))
        if others:
            listing = f"{', '.join(others[:3])}{' ...' if others[3:] else ''}"
            raise ValueError(
                f"{folder} is no run folder and holds {listing}; use an --out that is new or empty"
            )
    # To open a pipe blocks until its other end is open.
    if special := [p for p in (folder.iterdir() if folder.is_dir() else ()) if is_special(p)]:
        raise ValueError(f"{special[0]} is a device, pipe or socket; remove it from the run folder")
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir():
        raise _unwritable(folder, NotADirectoryError(f"{existing} is no folder"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(folder, PermissionError(f"no permission to write in {existing}"))
    lock = folder / ".lock"
    if lock.is_file() and not lock.is_symlink():
        with lock.open("rb") as file:
            _lock(folder, file)


def _is_of_another_rank(path: Path) -> bool:
    """Return whether `path` is what ranks other than 0 leave in a run folder of their own machine.

    With `save.store` a machine may be given rank 0 later.
    """
    is_checkpoints = path.name == "checkpoints" and path.is_dir()
    return is_checkpoints and all(p.name[0] == "." or p.name.isdecimal() for p in path.iterdir())


def _lock(folder: Path, file: IO[Any]) -> None:
    """Lock an open file; ValueError where another process holds it."""
    until = time.monotonic() + (RESTART_SECONDS if restarts_ranks() else 0.0)
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= until:
                raise ValueError(
                    f"another process is training in {folder}; wait for it or use another --out"
                ) from None
        except OSError:
            return  # some network file systems have no locks
        time.sleep(0.2)


@contextmanager
def run_lock(folder: Path, source: str = "") -> Iterator[Callable[[], None]]:
    """Make the run folder and keep other processes out of it; the lock ends with the process.

    A folder that is still empty after an error is removed, and so are those made for it.

    Args:
        source: of the data, see `check_run_folder`.

    Yields: a function that raises OSError once another folder, or none, is at this path.

    Errors: ValueError for a folder that cannot become a run's or that another process holds;
        OSError where the folder cannot be written.
    """
    check_run_folder(folder, source)
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w+b", buffering=0, opener=no_follow)  # noqa: SIM115
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        _lock(folder, file)
        held = os.fstat(file.fileno())

        def check() -> None:
            try:
                there = os.stat(folder / ".lock")
            except OSError:
                there = None
            if there is None or (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
                raise OSError(
                    f"{folder} was moved, deleted or replaced while this process trains in it, and "
                    "nothing more was written there; move it back, or give its new place as --out, "
                    "and run the command again"
                )

        try:
            yield check
        except BaseException:
            with suppress(OSError):  # it was moved, or others use it by now
                if os.listdir(folder) == [".lock"]:
                    (folder / ".lock").unlink()
                    for path in made:
                        path.rmdir()
            raise


def has_started(folder: Path) -> bool:
    """Return whether training wrote anything but the recipe, which a failed start leaves too."""
    log = folder / "log.jsonl"
    folders = ("checkpoints", "model", "samples", "ema", "evaluations", "bundles")
    return (log.exists() and log.stat().st_size > 0) or any(
        any((folder / name).glob("[!.]*")) for name in folders
    )


def check_same_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise ValueError, listing the differences, where the run has another recipe."""
    started = started_recipe(folder)
    if started is None:
        return
    if differences := recipe_differences(started, recipe):
        raise ValueError(
            "\n".join([f"{folder} belongs to another recipe:", *differences])
            + "\nUse another --out, or the same recipe."
        )
    # A checkpoint without a manifest is damaged, and passed over.
    whole = (path.parent for path in (folder / "checkpoints").glob("*/manifest.json"))
    seen = max((int(path.name) for path in whole if path.name.isdecimal()), default=0)
    # The last batch may go beyond the length.
    if seen >= recipe.images + recipe.batch:
        raise ValueError(
            f"{folder} has seen {seen:,} images, more than images={recipe.images}; give at least "
            "as many, or another --out"
        )


def recipe_differences(there: Recipe, asked: Recipe) -> list[str]:
    """Return a line for each field in which two recipes of one run must not differ."""
    old, new = flatten_recipe(there), flatten_recipe(asked)
    return [
        f"  {k}: {old.get(k)} there, {new.get(k)} asked"
        for k in {**old, **new}
        if old.get(k) != new.get(k) and not _is_changeable(k)
    ]


def started_recipe(folder: Path) -> Recipe | None:
    """Return the recipe of the run in `folder`, None where none has started."""
    path = folder / RECIPE
    return config.from_yaml(path) if path.exists() and has_started(folder) else None


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write recipe.yaml and remove half-written files of a killed process.

    Errors: OSError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        atomic_write(folder / RECIPE, config.to_yaml(recipe))
    except OSError as error:
        raise _unwritable(folder, error) from error


def remove_partial(folder: Path) -> None:
    """Remove half-written files and folders of a killed process from a run folder."""
    # The second pattern is looked up after the first one's folders are gone: they hold such files.
    for pattern in (".*.partial", "*/.*.partial"):
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def flatten_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe by their full names, e.g. "optim.lr"."""

    def flatten(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(flatten(config.to_dict(recipe), ""))


def _is_changeable(field: str) -> bool:
    """Return whether a field may differ on resume."""
    return any(f"{field}.".startswith(f"{name}.") for name in CHANGEABLE)


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"the run folder {folder} cannot be written: {error}; check its permissions or use another "
        "--out"
    )
