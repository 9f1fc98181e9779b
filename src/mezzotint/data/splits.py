"""Folders that hold the splits of a data set (train, Testing, seg_val, ...): which they are.

The rule: a folder is named as a split if its name has one of the words in WORDS and, besides it,
nothing but numbers, words in OTHER_WORDS, or what another split folder has too (DIV2K_train_HR
beside DIV2K_valid_HR). Folders are taken for splits if two kinds of them are there, and either no
other folder of images, or both training and test (or validation) images. Of two folders, one is
taken for a split if it alone holds class folders. So the classes car, train, bus stay classes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from mezzotint.core.paths import printable
from mezzotint.core.registry import suggest

WORDS = {
    "train": "train training trn trainset traindata trainval",
    "test": "test testing tst tests testset testdata devtest",
    "validation": "val valid validation validate validating dev develop eval evaluation holdout "
    "heldout valset",
    "unlabeled": "unlabeled unlabelled unsupervised unsup extra pred predict prediction",
}
KIND_OF_WORD = {word: kind for kind, words in WORDS.items() for word in words.split()}
MEASURED = {"test", "validation"}
_OTHER = (
    "seg set data dataset split splits image images img imgs picture pictures pic pics photo "
    "photos folder dir part final full small large mini original orig resized cropped crop "
    "raw jpg jpeg png hr lr a b x y of the my and labeled labelled public private"
)
OTHER_WORDS = frozenset(_OTHER.split())


def _parse(name: str) -> tuple[str, str] | None:
    """Return (kind, the name without split words and numbers), or None without a split word."""
    # "trainA", "TestSet", "val2017", "01_train": words begin at capitals and end at digits.
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+", name)
    words = [part.lower() for part in parts]
    found = [word for word in words if word in KIND_OF_WORD]
    if not found:
        return None
    return KIND_OF_WORD[found[0]], " ".join(word for word in words if word not in found)


def split_kinds(names: Iterable[str]) -> dict[str, str]:
    """Return the kind ("train", "test", "validation", "unlabeled") of the names that are splits."""
    parsed = {name: found for name in names if (found := _parse(name)) is not None}
    kinds_with = defaultdict(set)
    for kind, rest in parsed.values():
        kinds_with[rest].add(kind)
    return {
        name: kind
        for name, (kind, rest) in parsed.items()
        if set(rest.split()) <= OTHER_WORDS or len(kinds_with[rest]) > 1
    }


def _are_splits(below: Mapping[str, set[str]]) -> bool:
    """Return whether folders are splits, see the module; `below`: folder -> folders in it."""
    names = split_kinds(below)
    kinds = set(names.values())
    if len(kinds) > 1:
        return len(names) == len(below) or ("train" in kinds and bool(kinds & MEASURED))
    divided = {name for name, folders in below.items() if len(folders) > 1}
    return len(below) == 2 and len(divided) == 1 and divided <= set(names)


def find_splits(names: Sequence[str], base: str) -> dict[str, dict[str, str]]:
    """Return the splits of images: folder's name -> image -> its path without base and split.

    Splits lie directly in `base` (train/ant/0.png), or in every class folder (ant/train/0.png).
    Other folders beside split folders count as splits too; images outside of folders are left out.
    Without splits the result is empty.
    """
    paths = {name: name[len(base) :].split("/") for name in names}
    below: dict[str, set[str]] = defaultdict(set)
    inner: dict[str, set[str]] = defaultdict(set)
    for parts in paths.values():
        if len(parts) > 1:
            below[parts[0]].update(parts[1:-1][:1])
        if len(parts) > 2:
            inner[parts[1]].update(parts[2:-1][:1])
    if _are_splits(below):
        depth = 0
    elif len(below) > 1 and all(len(parts) > 2 for parts in paths.values()) and _are_splits(inner):
        depth = 1
    else:
        return {}
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for name, parts in paths.items():
        if len(parts) > depth + 1:
            splits[parts[depth]][name] = "/".join([*parts[:depth], *parts[depth + 1 :]])
    return dict(sorted(splits.items()))


def match_split(wanted: str, splits: Iterable[str]) -> str | None:
    """Return the split meant by `wanted`: by name, without regard to case, or by kind; else None.

    "val" means a split "Validation" if it is the only one of its kind.
    """
    names = list(splits)
    same = [name for name in names if name == wanted] or [
        name for name in names if name.lower() == wanted.lower()
    ]
    kinds = split_kinds(names)
    kind = split_kinds([wanted]).get(wanted)
    alike = same or [name for name in names if kind is not None and kinds.get(name) == kind]
    return alike[0] if len(alike) == 1 else None


class SplitError(ValueError):
    """A split that has to be chosen. splits: name -> number of its images."""

    def __init__(self, message: str, splits: Mapping[str, int]):
        super().__init__(message)
        self.splits = dict(splits)


def choose_split(what: str, counts: Mapping[str, int], wanted: str | None) -> str:
    """Return one of the splits' names; `SplitError`, naming them, if none is chosen or meant.

    Args:
        counts: name of each split -> number of its images.
    """
    splits = list(counts)
    found = None if wanted is None else match_split(wanted, splits)
    if found is not None:
        return found
    shown = [printable(name) for name in splits]
    if wanted is None:
        kinds = split_kinds(splits)
        example = next((name for name in splits if kinds.get(name) == "train"), splits[0])
        raise SplitError(
            f"{what} holds the splits {', '.join(shown)}; give one of them, e.g. "
            f"{what}:{printable(example)}, or {what}:all",
            counts,
        )
    raise SplitError(
        f"{what} has no split {wanted!r}; it has {', '.join(shown)}; {suggest(wanted, shown)}",
        counts,
    )


def common_folder(names: Sequence[str]) -> str:
    """Return the deepest folder of all names, as a prefix ending in "/", or ""."""
    # `zip -r` of a folder adds one level.
    folders = [name.split("/")[:-1] for name in names]
    shared = takewhile(
        lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False)
    )
    return "".join(f"{part}/" for part, _ in shared)
