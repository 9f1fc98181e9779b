"""What all ranks must share, compared before the first step; a difference ends every rank.

A rank with another learning rate, other images or a run folder of its own would train for days
without an error.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import mezzotint
from mezzotint.config import Recipe
from mezzotint.core.distributed import (
    World,
    all_ranks,
    any_rank,
    broadcast_from_rank0,
    gather_from_ranks,
    on_rank0,
)
from mezzotint.core.files import sha256_of_file
from mezzotint.data.content import Content
from mezzotint.data.sources import hash_parts
from mezzotint.train.run_folder import flatten_recipe

# The data may lie elsewhere on each machine, and each may load it with its own number of processes.
OWN = (
    "data.source", "data.workers", "data.shards.cache", "data.shards.cache_gb",
    "data.shards.patience_s",
)  # fmt: skip
SHARED_FOLDER_SECONDS = 10.0  # network disks show a new file after a few


def check_same(facts: Mapping[str, Any], world: World) -> None:
    """Raise ValueError, on every rank, where a rank has other facts than rank 0."""
    theirs = broadcast_from_rank0(dict(facts), world)
    own = [
        f"rank {world.rank} has {name} {facts.get(name)}, rank 0 {theirs.get(name)}"
        for name in {**theirs, **facts}
        if facts.get(name) != theirs.get(name)
    ]
    # One flag first: the facts of thousands of ranks would be megabytes on each.
    if any_rank(bool(own), world):
        differences = [line for lines in gather_from_ranks(own, world) for line in lines]
        shown = [*differences[:5], *([f"{len(differences) - 5} more"] if differences[5:] else [])]
        raise ValueError(
            f"the ranks differ: {'; '.join(shown)}; start every rank with the same command, data "
            "and installation"
        )


def check_same_recipe_and_code(recipe: Recipe, init_from: bool, world: World) -> None:
    """Raise ValueError, on every rank, where recipes, versions or code differ.

    Args:
        init_from: whether the run starts from weights.
    """
    if world.size == 1:
        return
    fields = {k: v for k, v in flatten_recipe(recipe).items() if k not in OWN}
    versions = {
        "mezzotint": mezzotint.__version__,
        "torch": torch.__version__,
        "world size": world.size,
        "code of mezzotint": all_ranks(hash_code, world),
    }
    check_same({**fields, **versions, "--init-from": init_from}, world)


def hash_code() -> str:
    """Return a short hash of the package's source files."""
    folder = Path(__file__).parents[1]
    files = sorted(folder.rglob("*.py"))
    return hash_parts(f"{p.relative_to(folder)} {sha256_of_file(p)}" for p in files)[:12]


def check_same_content(content: Content, source: str, world: World) -> None:
    """Raise ValueError, on every rank, where a rank reads other data than rank 0."""
    classes = len(content.label_names)
    described = (
        f"{len(content.rows):,} images of {classes} classes (fingerprint "
        f"{content.fingerprint[:8]}) in {source}"
    )
    differs = broadcast_from_rank0(content.fingerprint, world) != content.fingerprint
    if any_rank(differs, world):
        check_same({"data": described}, world)


def check_shared_folder(folder: Path, world: World) -> None:
    """Raise, on every rank, where a rank does not see a file that rank 0 writes in its run folder.

    Errors: ValueError on the rank that does not see it.
    """
    if world.size == 1:
        return
    path = folder / f".{secrets.token_hex(8)}.partial"  # a name that no rank has looked for yet
    where = on_rank0(lambda: _write_token(path), world)

    def wait_for_token() -> None:
        own = folder / Path(where[0]).name
        until = time.monotonic() + SHARED_FOLDER_SECONDS
        while not own.exists():
            if time.monotonic() > until:
                raise ValueError(
                    f"{folder} on {socket.gethostname()} is not the run folder of rank 0, "
                    f"{where[0].parent} on {where[1]}: a file written there is not seen here; "
                    "give every rank the same --out on a disk that all share"
                )
            time.sleep(0.1)

    try:
        all_ranks(wait_for_token, world)
    finally:
        if world.is_rank0:
            path.unlink(missing_ok=True)


def _write_token(path: Path) -> tuple[Path, str]:
    path.write_text("all ranks look for this file\n")
    return path.absolute(), socket.gethostname()
