"""Files of rows in a folder (parquet, Arrow, webdataset), as a clone from the hub has them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any
from unittest.mock import patch

from mezzotint.core.files import expand_user, read_json
from mezzotint.core.json_values import check_fields
from mezzotint.core.object_store import is_address
from mezzotint.core.paths import printable
from mezzotint.data.decode import image_suffixes
from mezzotint.data.side_tables import decode_text
from mezzotint.data.splits import split_kinds
from mezzotint.data.stores import Listing

# Suffix -> builder of Hugging Face datasets.
ROW_FILES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
NUMBERED = re.compile(r"(.+?)[-_.]\d+-of-\d+")  # train-00000-of-00004
METADATA = "metadata.parquet"  # labels and captions of images beside it


def is_webdataset(names: Iterable[str]) -> bool:
    """Return whether members of a tar are a webdataset's: fields with the name of an image.

    An image has a .cls of the same name; or a .json, and all images lie in one folder.
    """
    members = set(names)
    images = [PurePosixPath(name) for name in members if _suffix(name) in image_suffixes()]
    fields = {
        suffix
        for image in images
        for suffix in (".cls", ".json")
        if str(image.parent / f"{image.name.partition('.')[0]}{suffix}") in members
    }
    return ".cls" in fields or (".json" in fields and len({image.parent for image in images}) == 1)


@contextmanager
def patched_webdataset() -> Iterator[None]:
    """Let `datasets` read a .cls that holds a name, and samples that lack a field."""
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    read = WebDataset._get_pipeline_from_tar

    def read_complete(cls: type, path: str, members: Any) -> Iterator[dict[str, Any]]:
        samples = read(path, members)
        first = list(islice(samples, WebDataset.NUM_EXAMPLES_FOR_FEATURES_INFERENCE))
        fields = dict.fromkeys(field for sample in first for field in sample)
        for sample in chain(first, samples):
            yield dict.fromkeys(fields) | sample

    with (
        patch.dict(WebDataset.DECODERS, cls=decode_text),
        patch.object(WebDataset, "_get_pipeline_from_tar", classmethod(read_complete)),
    ):
        yield


def find_row_files(folder: str, listing: Listing) -> tuple[str, dict[str, list[str]]] | None:
    """Return the builder and the files of each split in a folder that holds rows and no images.

    Of an address, the files are names below it.

    A file's split is in its name (train-00000-of-00004.parquet, test.parquet), or in that of its
    folder, else it is "train". Without files of rows, or beside images, the result is None.

    Errors: ValueError, naming the folders, where several of them hold files of rows.
    """
    suffixes = Counter(_suffix(name) for name in listing.sizes)
    found = [suffix for suffix in ROW_FILES if suffixes[suffix]]
    if not found or any(suffixes[suffix] for suffix in image_suffixes()):
        return None
    suffix = max(found, key=suffixes.__getitem__)
    names = sorted(
        name
        for name in listing.sizes
        if _suffix(name) == suffix and PurePosixPath(name).name != METADATA
    )
    splits: dict[str, list[str]] = defaultdict(list)
    parts: set[str] = set()
    for name in names:
        split, part = _split_of(name)
        splits[split].append(name if is_address(folder) else str(expand_user(folder) / name))
        parts.add(part)
    if len(parts) > 1:
        shown = ", ".join(printable(part) or "the folder itself" for part in sorted(parts))
        example = next(part for part in sorted(parts) if part)
        raise ValueError(
            f"{folder} holds {suffix} files of several data sets ({shown}); give one of these "
            f"folders, e.g. {folder}/{printable(example)}"
        )
    return (ROW_FILES[suffix], dict(splits)) if names else None


def check_saved_files(folder: Path, listing: Listing) -> None:
    """Check that a folder of `save_to_disk` names files of its own alone.

    Errors: ValueError for a name that leads, or links, out of the folder, and for a damaged file.
    """
    prefixes = [""]
    try:
        if "dataset_dict.json" in listing.sizes:
            card = read_json(folder / "dataset_dict.json")
            check_fields(card, {"splits": list[str]})
            prefixes = [f"{name}/" for name in card["splits"]]
        for prefix in prefixes:
            if f"{prefix}state.json" not in listing.sizes:
                raise ValueError(f"{prefix}state.json is no file of the folder")
            state = read_json(folder / f"{prefix}state.json")
            check_fields(state, {"_data_files": list[dict[str, str]]})
            for name in [file.get("filename") for file in state["_data_files"]]:
                if f"{prefix}{name}" not in listing.sizes:
                    raise ValueError(f"{name!r} is no file of the folder")
    except ValueError as error:
        raise ValueError(f"{folder} is no whole dataset of save_to_disk: {error}") from None


def _split_of(name: str) -> tuple[str, str]:
    """Return a file's split, and its folder without the one that names the split."""
    *folders, file = name.split("/")
    stem = file.rpartition(".")[0]
    if numbered := NUMBERED.match(stem):
        return numbered[1], "/".join(folders)
    if kind := split_kinds([stem]).get(stem):
        return kind, "/".join(folders)
    for i in reversed(range(len(folders))):
        if kind := split_kinds([folders[i]]).get(folders[i]):
            return kind, "/".join(folders[:i] + folders[i + 1 :])
    return "train", "/".join(folders)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
