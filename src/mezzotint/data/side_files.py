"""Files beside images that hold their labels and captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from mezzotint.data.labels import read_labels


@runtime_checkable
class Store(Protocol):
    """Files by name: a folder or an archive."""

    root: Path

    def bytes(self, name: str) -> bytes:
        """Return the content of a file."""
        ...


def labels_from_json(
    store: Store, prefix: str, names: Sequence[str], notes: list[str]
) -> tuple[list[str], np.ndarray | None, tuple[str, ...] | None, np.ndarray | None]:
    """Return image names, labels, class names and test images of dataset.json; add to `notes`."""
    where = f"{store.root}/{prefix}dataset.json"
    try:
        card = json.loads(store.bytes(f"{prefix}dataset.json"))
        given = [(prefix + str(name), label) for name, label in card.get("labels") or []]
        listed = None if card.get("test") is None else {prefix + str(name) for name in card["test"]}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{where} is not of the form {{"labels": [["name.png", 0], ...]}}: {error}'
        ) from error
    present = set(names)
    if not given:  # EDM writes "labels": null for an unlabelled set
        ordered, labels, label_names = list(names), None, None
    else:
        missing = [name for name, _ in given if name not in present]
        if missing:
            raise ValueError(
                f"{where} lists {len(missing)} files that do not exist, first {missing[0]!r}"
            )
        given.sort(key=lambda pair: pair[0])
        ordered = [name for name, _ in given]
        if len(set(ordered)) < len(ordered):
            raise ValueError(f"{where} lists a file twice; give each file one label")
        classes = card.get("classes")
        if classes is not None and not isinstance(classes, list):
            raise ValueError(f"{where}: classes are {str(classes)[:80]!r}; give a list of names")
        found = read_labels(
            [label for _, label in given],
            len(given),
            where,
            None if classes is None else [str(name) for name in classes],
        )
        labels, label_names = (None, None) if found is None else found[:2]
        notes += [found.note] if found and found.note else []
        if len(present) > len(ordered):
            notes.append(
                f"{len(present) - len(ordered)} images are not in dataset.json and were left out"
            )
    test = None if listed is None else np.array([name in listed for name in ordered])
    return ordered, labels, label_names, test


def read_captions(store: Store, files: Sequence[str]) -> dict[str, str]:
    """Return the captions in metadata.jsonl files, by image name."""
    captions: dict[str, str] = {}
    for file in files:
        folder = file.rpartition("/")[0]
        for number, line in enumerate(store.bytes(file).decode("utf-8").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else {}
                text = next(
                    (row[key] for key in ("text", "caption", "prompt") if row.get(key) is not None),
                    None,
                )
                if text is not None:
                    captions[f"{folder}/{row['file_name']}".lstrip("/")] = str(text)
            except (ValueError, KeyError, AttributeError) as error:
                form = '{"file_name": "a.png", "text": "..."}'
                raise ValueError(
                    f"{store.root}/{file} line {number} is not of the form {form}: {error!r}"
                ) from error
    return captions
