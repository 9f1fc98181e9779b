"""Checkpoints and the files of a run on an object store, so that a fresh machine can go on.

With `save.store` a checkpoint lies only at STORE/checkpoints/IMAGES/. A second copy on the node's
disk would cost time and space, and would be lost with the node. manifest.json is written last; a
folder without it is left over from a killed save, and the next save deletes it.

A rank writes its share to its own disk, uploads it, and deletes it. torch's FsspecWriter streams to
the store instead. When a real server was killed during a save, FsspecWriter survived an outage of 3
seconds and gave up 9 seconds into one of 30, because it cannot send again what it has streamed. A
file can be sent until the store is back, and its SHA-256 is that of the disk. The ranks need no
common disk. To resume, every node downloads a checkpoint, checks its SHA-256, restores it and
deletes it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

from mezzotint import config
from mezzotint.config import Recipe
from mezzotint.core.distributed import (
    World,
    all_ranks,
    gather_from_ranks,
    on_rank0,
    wait_for_ranks,
)
from mezzotint.core.files import sha256_of_file
from mezzotint.core.object_store import (
    StoredFile,
    delete_files,
    download_file,
    join_address,
    list_files,
    read_bytes,
    upload_file,
    write_bytes,
)
from mezzotint.train.checkpoint import (
    MANIFEST,
    CheckpointWriter,
    checkpoints_to_delete,
    find_checkpoint_damage,
    list_checkpoints,
    one_line,
)
from mezzotint.train.checkpoint_reader import METADATA, file_sizes
from mezzotint.train.run_folder import RECIPE, recipe_differences, started_recipe

FETCHED = ".fetched"  # in a checkpoint of the disk that is a copy of the store's
# Files of a run that never change once they are written, by their folder.
WRITTEN_ONCE = ("samples", "evaluations", "ema", "bundles")
MODELS = ("model", "model-raw")
# A resume reads these and the checkpoint. It writes new models and reads no EMA snapshot.
NEEDED = ("samples", "evaluations")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][\w .,+=-]*")


# --- writing -------------------------------------------------------------------------------------


def publish_to_store(
    store: str,
    run: Path,
    facts: dict[str, Any],
    folder: Path,
    metadata: Metadata,
    writer: CheckpointWriter,
) -> None:
    """Upload a checkpoint that all ranks have written, each its own files; all ranks call this.

    Args:
        facts: of the manifest, with "images".
        folder: of this rank's files.
        writer: whose thread this is.

    Errors: an error on every rank where one of them fails; then there is no manifest.
    """
    world, group = writer.world, writer.group
    target = join_address(store, "checkpoints", str(facts["images"]))

    def prepare() -> None:
        # The manifest goes first: a half-replaced checkpoint must not look whole.
        delete_files(join_address(target, MANIFEST))
        delete_files(target)
        upload_records(run, store)  # the log of a checkpoint is there before it

    _together(lambda: prepare() if world.is_rank0 else None, world, group)

    def upload_own() -> dict[str, Any]:
        names = [name for name in file_sizes(metadata) if name.startswith(f"__{world.rank}_")]
        if world.is_rank0:
            names.append(METADATA)
        listing = {}
        for name in sorted(names):
            path = folder / name
            listing[name] = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            upload_file(path, join_address(target, name))
        return listing

    files = {k: v for part in _together(upload_own, world, group) for k, v in part.items()}

    def write_manifest() -> None:
        if missing := {METADATA, *file_sizes(metadata)} - set(files):
            raise FileNotFoundError(f"no rank has written {sorted(missing)[0]}")
        manifest = {**facts, "files": files}
        write_bytes(join_address(target, MANIFEST), json.dumps(manifest, indent=1).encode())

    if world.is_rank0:
        write_manifest()


@dataclass(frozen=True)
class StoreTarget:
    """The store as the target of the checkpoints of a run folder."""

    address: str
    run: Path

    def publish(
        self, facts: dict[str, Any], folder: Path, metadata: Metadata, writer: CheckpointWriter
    ) -> None:
        """Upload it, see `publish_to_store`."""
        publish_to_store(self.address, self.run, facts, folder, metadata, writer)


def _together(work: Callable[[], Any], world: World, group: dist.ProcessGroup | None) -> list[Any]:
    """Return `work()` of every rank, through the writing thread's group; OSError if one fails."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if world.size == 1:
        answers: list[Any] = [(result, error and one_line(error))]
    else:
        answers = [None] * world.size
        dist.all_gather_object(answers, (result, error and one_line(error)), group=group)
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(answers):
        if failure is not None:
            raise OSError(f"rank {rank}: {failure}")
    return [result for result, _ in answers]


def prune_store(store: str, images: int, keep: int, keep_every: int | None) -> None:
    """Delete checkpoints as `prune_checkpoints` does on a disk, and leftovers of killed saves."""
    stored = _stored_checkpoints(store)
    whole = [i for i, files in stored.items() if _has_manifest(files)]
    leftovers = [i for i in stored if i not in whole]
    for old in [*leftovers, *checkpoints_to_delete(whole, images, keep, keep_every)]:
        folder = join_address(store, "checkpoints", str(old))
        delete_files(join_address(folder, MANIFEST))  # a half-deleted one must not look whole
        delete_files(folder)


def upload_records(run: Path, store: str) -> None:
    """Upload recipe, logs, the record of the data, and other files of the run folder itself."""
    for path in sorted(run.iterdir()):
        if path.is_file() and PLAIN_NAME.fullmatch(path.name):
            upload_file(path, join_address(store, path.name))


def upload_run(run: Path, store: str) -> None:
    """Upload what a run folder holds, without its checkpoints."""
    upload_records(run, store)
    there = {file.address: file.num_bytes for file in list_files(store, allow_empty=True)}
    for name in (*MODELS, *WRITTEN_ONCE):
        files = [p for p in (run / name).rglob("*") if p.is_file()]
        # The config.json of a model last: it says what the other files are.
        for path in sorted(files, key=lambda p: (p.name == "config.json", p)):
            parts = path.relative_to(run).parts
            address = join_address(store, *parts)
            same = name in WRITTEN_ONCE and there.get(address) == path.stat().st_size
            if not same and not any(part.startswith(".") for part in parts):
                upload_file(path, address)


# --- reading -------------------------------------------------------------------------------------


def fetch_run(store: str, run: Path, world: World, print_line: Callable[[str], None]) -> None:
    """Bring the run folder to the newest intact checkpoint of the store; all ranks call this.

    The checkpoint becomes `run`/checkpoints/IMAGES/ on every node, until `drop_fetched`. Nothing
    happens where the store has none, or the folder has a newer one of its own.

    Errors: ValueError where store and folder hold different runs, and where the store has
        checkpoints and none is intact; StoreUnavailable.
    """

    def find() -> list[int]:
        stored = sorted(
            i for i, files in _stored_checkpoints(store).items() if _has_manifest(files)
        )
        own = [int(p.name) for p in list_checkpoints(run) if not (p / FETCHED).exists()]
        return [] if not stored or (own and own[-1] > stored[-1]) else stored

    stored = on_rank0(find, world)
    if not stored:
        return
    on_rank0(lambda: _check_same_run(store, run), world)
    on_rank0(lambda: _fetch_records(store, run), world)
    fetch_newest(store, run, world, print_line)


def fetch_newest(
    store: str, run: Path, world: World, print_line: Callable[[str], None] = print
) -> None:
    """Download the newest intact checkpoint of the store to every node; all ranks call this."""

    def find() -> int | None:
        stored = {i: f for i, f in _stored_checkpoints(store).items() if _has_manifest(f)}
        for images in sorted(stored, reverse=True):
            damage = _fetch_checkpoint(store, run, images, stored[images])
            if damage is None:
                return images
            print_line(f"checkpoint {images} of {store} is damaged and passed over: {damage}")
        if stored:
            raise ValueError(
                f"{store} holds checkpoints at {', '.join(map(str, sorted(stored)))} images and "
                "none is intact; nothing was changed. Bring one back, or use another save.store"
            )
        return None

    images = on_rank0(find, world)
    if images is None or world.size == 1:
        return

    def fetch() -> None:
        damage = _fetch_checkpoint(store, run, images)
        if damage is not None:
            raise ValueError(f"checkpoint {images} of {store} cannot be read here: {damage}")

    first = _is_first_of_node(run, world)
    all_ranks(lambda: fetch() if first and not world.is_rank0 else None, world)


def drop_fetched(run: Path, world: World) -> None:
    """Delete the copies of the store's checkpoints once all ranks have restored theirs."""
    wait_for_ranks(world)
    for folder in list_checkpoints(run):
        if (folder / FETCHED).exists():
            shutil.rmtree(folder, ignore_errors=True)  # another rank of the node may be faster


def _is_first_of_node(run: Path, world: World) -> bool:
    """Return whether no rank before this one has the same disk; the run folder is made."""

    def identify() -> tuple[Any, ...]:
        run.mkdir(parents=True, exist_ok=True)
        status = os.stat(run)
        return socket.gethostname(), status.st_dev, status.st_ino

    disks = gather_from_ranks(all_ranks(identify, world), world)
    return disks.index(disks[world.rank]) == world.rank


def _fetch_checkpoint(
    store: str, run: Path, images: int, files: list[StoredFile] | None = None
) -> str | None:
    """Download one checkpoint, unless it is here; return what is wrong with it, or None."""
    final, source = (
        run / "checkpoints" / str(images),
        join_address(store, "checkpoints", str(images)),
    )
    manifest = read_bytes(join_address(source, MANIFEST))
    is_copy = (final / MANIFEST).is_file() and (final / MANIFEST).read_bytes() == manifest
    if is_copy and find_checkpoint_damage(final) is None:
        return None
    shutil.rmtree(final, ignore_errors=True)
    files = list_files(source) if files is None else files
    folder = _made(run / "checkpoints")
    with tempfile.TemporaryDirectory(".partial", ".", folder) as temporary:
        partial = Path(temporary) / str(images)
        partial.mkdir()
        for file in files:
            name = file.address.rpartition("/")[2]
            if name in (MANIFEST, METADATA) or name.endswith(".distcp"):
                download_file(file.address, partial / name)
        if damage := find_checkpoint_damage(partial):
            return damage
        (partial / FETCHED).touch()
        try:
            partial.rename(final)
        except OSError:  # another node of a shared disk was faster
            if not (final / MANIFEST).is_file():
                raise
    return None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_same_run(store: str, run: Path) -> None:
    """Raise ValueError where the folder's run is another one than the store's."""
    own = started_recipe(run)
    if own is None:
        return
    differences = recipe_differences(_read_recipe(store), own)
    if differences:
        raise ValueError(
            "\n".join([f"{store} holds another run than {run}:", *differences])
            + "\nUse another save.store, or another --out."
        )


def _read_recipe(store: str) -> Recipe:
    """Return the recipe of a store's run."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / RECIPE
        download_file(join_address(store, RECIPE), path)
        return config.from_yaml(path)


def stored_recipe(store: str) -> Recipe | None:
    """Return the recipe of the run that a store holds; None where it holds no checkpoint."""
    if not any(_has_manifest(files) for files in _stored_checkpoints(store).values()):
        return None
    return _read_recipe(store)


def _fetch_records(store: str, run: Path) -> None:
    """Download what a run needs beside its checkpoint. The store's files replace those here."""
    base = f"{store.rstrip('/')}/"
    for file in list_files(base):
        parts = file.address.removeprefix(base).split("/")
        plain = all(PLAIN_NAME.fullmatch(part) for part in parts)
        if not plain or not (len(parts) == 1 or parts[0] in NEEDED):
            continue
        path = run.joinpath(*parts)
        if len(parts) == 1 or not path.is_file() or path.stat().st_size != file.num_bytes:
            download_file(file.address, path)


def _stored_checkpoints(store: str) -> dict[int, list[StoredFile]]:
    """Return the files of every checkpoint of a store, by the images seen."""
    base = f"{join_address(store, 'checkpoints')}/"
    found = defaultdict(list)
    for file in list_files(base, allow_empty=True):
        images, _, name = file.address.removeprefix(base).partition("/")
        if images.isdecimal() and name:
            found[int(images)].append(file)
    return dict(found)


def _has_manifest(files: list[StoredFile]) -> bool:
    return any(file.address.endswith(f"/{MANIFEST}") for file in files)
