"""The data of a run, kept in its folder and compared at every start.

`data.json` names the classes by their number in the network and says what was changed and when;
`data.npy` lists the images, see `data.content`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mezzotint.core.files import atomic_open, read_json, write_json
from mezzotint.core.npz_files import load_npy
from mezzotint.data.content import ROW, Changes, Content, compare
from mezzotint.train.run_folder import has_started

FACTS, IMAGES = "data.json", "data.npy"


@dataclass(frozen=True)
class DataRecord:
    """What a run knows of its data.

    label_names: of the data. classes: names by the number that each class has in the network.
    content: None where its list of images is missing or damaged. history: accepted changes.
    """

    label_names: tuple[str, ...]
    classes: tuple[str, ...]
    fingerprint: str = ""
    content: Content | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class Decision(NamedTuple):
    """Numbers of the classes for this start, and what changed in the data, "" for nothing."""

    classes: tuple[str, ...]
    change: str = ""


def read_record(folder: Path) -> DataRecord | None:
    """Return the record of a run; of one begun without, the class names of its model, or None.

    Errors: ValueError for a damaged data.json.
    """
    path = folder / FACTS
    if not path.exists():
        return _read_model_labels(folder)
    try:
        facts = read_json(path)
        names, classes = (tuple(map(str, facts[key])) for key in ("label_names", "classes"))
        fingerprint, history = str(facts["fingerprint"]), list(facts["history"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it to go on with the data given"
        ) from None
    content = _read_images(folder / IMAGES, names)
    if content is not None and content.fingerprint != fingerprint:
        content = None
    return DataRecord(names, classes, fingerprint, content, history)


def _read_model_labels(folder: Path) -> DataRecord | None:
    try:
        labels = read_json(folder / "model" / "config.json")["labels"]
        return DataRecord(tuple(map(str, labels)), tuple(map(str, labels))) if labels else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_images(path: Path, label_names: tuple[str, ...]) -> Content | None:
    try:
        rows = load_npy(path, mmap=True)
    except (OSError, ValueError, EOFError):
        return None
    if rows.dtype != ROW or rows.ndim != 1:
        return None
    labels = rows["label"]
    fits = not len(rows) or (labels.min() >= -1 and labels.max() < len(label_names))
    return Content(np.asarray(rows), label_names) if fits else None


def update_record(
    folder: Path, content: Content, decision: Decision, source: str, images: int
) -> None:
    """Write the record of this start; an accepted change is added to its history.

    Args:
        source: of the data. images: seen at the change.

    Errors: OSError where the folder cannot be written.
    """
    old = read_record(folder) if has_started(folder) else None
    history = [] if old is None else old.history
    if decision.change:
        history = [*history, {"images": images, "changes": decision.change}]
    if old is None or old.content is None or old.fingerprint != content.fingerprint:
        with atomic_open(folder / IMAGES) as file:
            np.save(file, content.rows)
    facts = {
        "source": source,
        "fingerprint": content.fingerprint,
        **_count_rows(content),
        "label_names": list(content.label_names),
        "classes": list(decision.classes),
        "history": history,
    }
    write_json(folder / FACTS, facts)


def _count_rows(content: Content) -> dict[str, int]:
    """Return how many images there are, without a label, and with a caption; or how many shards."""
    if content.of_shards:
        return {"shards": len(content.rows)}
    captions = int((content.rows["caption"] != 0).sum())
    return {"images": len(content.rows), "unlabelled": content.unlabelled, "captions": captions}


def decide(
    folder: Path, content: Content, source: str, num_classes: int | None, accept: bool
) -> Decision:
    """Compare the data with the record of a run that has started, and number the classes.

    Every class keeps its number by name. A class that is renamed, which is seen by its images,
    keeps its number too; a class that is gone keeps it, without images, until a new class needs
    one. New classes take numbers that no class has, then those of classes that are gone.

    Args:
        source: of the data, for messages.
        num_classes: that the recipe gives the network; 0 for none, None for one per class.
        accept: whether changed data may go on.

    Errors: ValueError for changed data that is not accepted, and for new classes without a number.
    """
    record = read_record(folder) if has_started(folder) else None
    if record is None:
        return Decision(content.label_names)
    changes = _find_changes(record, content)
    if changes and not accept:
        raise ValueError(
            f"{source} is not the data that {folder} was trained on: {changes}"
            f"{_describe_moves(record.classes, content.label_names)}. Give the data of the run, "
            "use another --out, or add --accept-changed-data, which keeps the number of every "
            "class by its name and records the change"
        )
    if num_classes == 0:
        return Decision(content.label_names, changes)
    classes = _number_classes(folder, record, content, num_classes)
    return Decision(classes, changes and f"{changes}{_describe_numbers(record.classes, classes)}")


def _find_changes(record: DataRecord, content: Content) -> str:
    """Return what changed in words, "" for nothing."""
    if record.fingerprint == content.fingerprint:
        return ""
    if record.content is not None:
        return str(compare(record.content, content))
    names = _compare_names(record.label_names, content.label_names)
    if record.fingerprint:
        return f"{names or 'other images'} (its list of images, {IMAGES}, is missing or damaged)"
    return str(names)


def _compare_names(old: tuple[str, ...], new: tuple[str, ...]) -> Changes:
    return Changes(
        new_classes=tuple(name for name in new if name not in old),
        gone_classes=tuple(name for name in old if name not in new),
    )


def _describe_moves(classes: tuple[str, ...], label_names: tuple[str, ...]) -> str:
    """Return which class numbers would move if the new order of the classes counted."""
    moves = [
        f"{name} from {classes.index(name)} to {k}"
        for k, name in enumerate(label_names)
        if name in classes and classes.index(name) != k
    ]
    more = " ..." if moves[5:] else ""
    return f"; class numbers would move: {', '.join(moves[:5])}{more}" if moves else ""


def _describe_numbers(old: tuple[str, ...], new: tuple[str, ...]) -> str:
    """Return which class numbers have another name."""
    names = dict(enumerate(old))
    changed = [
        f"{k} is {name}" + (f" (was {names[k]})" if k in names else "")
        for k, name in enumerate(new)
        if names.get(k) != name
    ]
    return f"; class numbers: {', '.join(changed)}" if changed else ""


def _number_classes(
    folder: Path, record: DataRecord, content: Content, num_classes: int | None
) -> tuple[str, ...]:
    """Return the names of the classes by number, see `decide`."""
    classes, names = list(record.classes), content.label_names
    if len(set(names)) < len(names) or len(set(classes)) < len(classes):
        if names == record.classes:
            return names
        raise ValueError("classes cannot be matched by name: two of them have the same name")
    if record.content is not None:
        for old, new in compare(record.content, content).renamed_classes.items():
            if old in classes and new not in classes:
                classes[classes.index(old)] = new
    count = len(classes) if num_classes is None else max(num_classes, len(classes))
    gone = [k for k, name in enumerate(classes) if name not in names]
    for name in names:
        if name in classes:
            continue
        if len(classes) < count:
            classes.append(name)
        elif gone:
            classes[gone.pop(0)] = name
        else:
            raise ValueError(
                f"class {name} is new, and the network of {folder} has {count} classes, all in use;"
                f" train a new run from its weights: --out NEW --init-from {folder}"
            )
    return tuple(classes)
