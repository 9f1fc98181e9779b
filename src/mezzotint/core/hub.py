"""Files of the Hugging Face hub, and models of an object store, from a cache or a download."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mezzotint.core.boxed import suggest_boxed
from mezzotint.core.files import cache_dir, expand_user
from mezzotint.core.object_store import download_file, is_address, join_address, stat_file
from mezzotint.core.paths import explain_path, is_hub_name


def download_model(repo: str, names: Sequence[str]) -> Path:
    """Return the folder of a model repository's files, from the cache if they are there.

    Args:
        repo: owner/name of the hub, or an address, see `fetch_model`.

    Errors: ValueError for a name that is none of the hub's, and where the hub does not have it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if is_address(repo):
        return fetch_model(repo, names)
    if not is_hub_name(repo):
        raise ValueError(
            f"{explain_path(repo, 'a model folder')}; give a run folder, a model folder, or the "
            f"name of a hub repository (owner/name){suggest_boxed(repo)}"
        )
    try:
        return Path(snapshot_download(repo, allow_patterns=list(names)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        # Without an answer of the hub, a mistyped folder is the likely cause.
        answered = isinstance(error, HfHubHTTPError | HFValidationError)
        said = "the hub has no such repository for us" if answered else "the hub was not reached"
        parent, name = os.path.split(repo)
        beside = os.listdir(parent) if os.path.isdir(parent) else []
        near = difflib.get_close_matches(name, beside, n=3, cutoff=0.5)
        hint = f" (did you mean {' or '.join(f'{parent}/{n}' for n in near)}?)" if near else ""
        raise ValueError(f"there is no folder {repo}{hint}, and {said}: {reason}") from None


def fetch_model(address: str, names: Sequence[str]) -> Path:
    """Return a folder of our cache with the files of a model at an address.

    Args:
        address: of the model's folder, or of a run, whose model/ is taken.

    Errors: ValueError where there is no model, or no access; StoreUnavailable.
    """
    for place in (address, join_address(address, "model")):
        found = [stat_file(join_address(place, name)) for name in names]
        files = [file for file in found if file is not None]
        if len(files) == len(names):
            break
    else:
        raise ValueError(
            f"there is no model at {address}; give the address of a run, or of a folder with "
            f"{', '.join(names)}"
        )
    # Content that changes gets a folder of its own.
    versions = "\n".join(f"{file.address} {file.version} {file.num_bytes}" for file in files)
    folder = cache_dir() / "stored-models" / hashlib.sha256(versions.encode()).hexdigest()[:16]
    for name, file in zip(names, files, strict=True):
        if not (file.version and (folder / name).is_file()):
            download_file(file.address, folder / name)
    return folder


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "spiece.model", "special_tokens_map.json",
    "vocab.json", "merges.txt",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A kind of pretrained model with a tokenizer.

    kind: as messages call it. shelf: its folder in our cache. files: patterns of its files.
    example: a name of the hub, with what it is.
    """

    kind: str
    shelf: str
    files: tuple[str, ...]
    example: str


def find_pretrained(
    what: Pretrained, name: str, fetch: bool = True, revision: str | None = None
) -> Path:
    """Return the folder of a model: `name` itself, in our cache or the hub's, or downloaded.

    Args:
        fetch: whether it may be downloaded.
        revision: the commit of the repository; by default its newest.

    Errors: ValueError for a name that is neither a folder nor of the hub, and for a model that
        cannot be downloaded, with what to download and where to put it.
    """
    path = expand_user(name)
    if path.is_dir():
        return path.resolve()
    ours = cache_dir() / what.shelf / name
    if ours.is_dir():
        return ours
    if not is_hub_name(name):
        raise ValueError(
            f"no {what.kind} {name!r}: neither a folder nor OWNER/NAME of the hub; "
            f"{explain_path(name, f'a folder of a {what.kind}')}; {what.example}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=list(what.files),
                local_files_only=not fetch,
                revision=revision,
            )
        )
    except Exception as error:  # the hub, the network and the cache raise their own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        at = f" (revision {revision})" if revision else ""
        raise ValueError(
            f"{what.kind} {name} is not on this machine and could not be downloaded: {first}. "
            f"Download its config.json, tokenizer and *.safetensors{at} on a machine with a "
            f"network (mezzotint download {name}) and put them into {ours}, or give the folder "
            "that holds them"
        ) from None


def hash_tokenizer(folder: Path) -> str:
    """Return the SHA-256 of the files of a tokenizer, in hexadecimal."""
    h = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            h.update(name.encode() + (folder / name).read_bytes())
    return h.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bar that transformers draws when it loads weights from disk."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
