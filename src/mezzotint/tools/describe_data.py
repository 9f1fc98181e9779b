"""How a data set was understood: source, split, columns, classes, captions, ignored files, samples.

What others wrote, such as names and captions, is escaped where it becomes text.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.core import rng
from mezzotint.core.files import check_replaceable, expand_user
from mezzotint.core.image_grid import class_captions, make_grid, save_png
from mezzotint.core.text import escape_name
from mezzotint.data.columns import shown
from mezzotint.data.decode import decode_image
from mezzotint.data.image_dataset import ImageDataset, names_split_of_parent, split_source
from mezzotint.data.layout import Layout
from mezzotint.data.npz_source import NpzSource
from mezzotint.data.prepared_source import PreparedSource
from mezzotint.data.sources import FileSource
from mezzotint.data.tables import TableSource

SAMPLES, COLUMNS = 12, 4  # pictures in the PNG
LEAST_SIDE, MOST_SIDE = 128, 256  # pixels of one of them
MAX_TRIED = 1000  # pictures decoded to find SAMPLES that are readable
MAX_LISTED, CAPTION_LENGTH = 20, 100
SOFTWARE = "mezzotint doctor"  # in the PNG


def describe_data(images: ImageDataset) -> dict[str, Any]:
    """Return how the source of a dataset was understood, as plain values, ready for JSON."""
    source = images.source
    layout = _layout(source)
    captions = (images.text(i) for i in range(min(len(images), MAX_TRIED)))
    columns = layout.columns
    return {
        "kind": layout.kind,
        "split": layout.split,
        "splits": dict(layout.splits),
        "labels_from": layout.labels,
        "side_files": dict(layout.side_files),
        "columns": columns
        and {
            "image": columns.image,
            "label": columns.label,
            "caption": columns.caption,
            "others": {role: list(names) for role, names in columns.others.items() if names},
        },
        "classes": _count_classes(images),
        "unlabelled": images.count_unlabelled(),
        "caption": next((text for text in captions if text), None),
        "ignored": {
            kind: {"count": count, "first": list(first)}
            for kind, (count, first) in layout.ignored.items()
        },
        "full_scale": dict(images.full_scale.measured),
        "full_scale_notes": list(images.full_scale.notes),
    }


def stated_notes(images: ImageDataset) -> set[str]:
    """Return the notes of a dataset that say what `describe_data` does, and are no concerns."""
    return {*_layout(images.source).notes, *images.full_scale.notes}


def _layout(source: object) -> Layout:
    if isinstance(source, FileSource | TableSource):
        return source.layout
    if isinstance(source, PreparedSource):
        return Layout(kind=f"folder of mezzotint prepare, form {source.form.name}", split="")
    return Layout(kind="npz" if isinstance(source, NpzSource) else "built-in", split="")


def _count_classes(images: ImageDataset) -> list[list[Any]] | None:
    """Return [name, number of images] of every class, in order; None without labels."""
    if images.labels is None:
        return None
    names = images.label_names or ()
    counts = np.bincount(images.labels[images.labels >= 0], minlength=len(names)).tolist()
    return [list(pair) for pair in zip(names, counts, strict=False)]


def default_samples(data: str) -> Path:
    """Return a name in the current folder; in that for temporary files where it holds the data."""
    folder = _data_folder(data)
    is_inside = folder is not None and Path.cwd().is_relative_to(folder)
    return Path(tempfile.gettempdir() if is_inside else "") / "doctor-samples.png"


def check_samples(path: Path, data: str) -> None:
    """Check that a PNG may be written: outside of the data, replacing nothing but a PNG of ours.

    Errors: ValueError.
    """
    if (folder := _data_folder(data)) and path.resolve().is_relative_to(folder):
        raise ValueError(
            f"{path} would lie among the images of {data}; name another place with --samples"
        )
    check_replaceable(path, _is_samples, "a sheet of samples")


def _is_samples(path: Path) -> bool:
    return decode_image(path.read_bytes(), ("PNG",)).info.get("Software") == SOFTWARE


def _data_folder(data: str) -> Path | None:
    """Return the folder that holds the data; None if it is no folder."""
    folder = expand_user(split_source(data)[0]).resolve()
    if names_split_of_parent(folder):
        folder = folder.parent
    return folder if folder.is_dir() else None


def save_samples(images: ImageDataset, path: Path) -> int:
    """Write up to SAMPLES pictures as a PNG, captioned by class, else by caption or name.

    Returns:
        The number of pictures; without a readable one among MAX_TRIED, nothing is written.
    """
    chosen = _choose_samples(images)
    if not chosen:
        return 0
    pixels = torch.stack(list(chosen.values()))
    if images.size > MOST_SIDE:
        smaller = torch.nn.functional.interpolate(pixels.float(), MOST_SIDE, mode="area")
        pixels = smaller.round().to(torch.uint8)
    zoom = max(1, LEAST_SIDE // images.size)
    captions = [_caption(images, i) for i in chosen]
    grid = make_grid(pixels, min(COLUMNS, len(chosen)), captions, zoom)
    save_png(grid, path, software=SOFTWARE)
    return len(chosen)


def _choose_samples(images: ImageDataset) -> dict[int, Tensor]:
    """Return index -> pixels of readable images in class order, as many of each class as can be.

    Those of a class are chosen at random, always the same.
    """
    order = rng.philox("order", 0, 0).permutation(len(images)).tolist()
    seen: Counter[int | None] = Counter()
    ranks = {}
    for i in order:
        label = images.label(i)
        ranks[i] = seen[label]
        seen[label] += 1
    pixels: dict[int, Tensor] = {}
    for i in sorted(order, key=ranks.__getitem__)[:MAX_TRIED]:
        try:
            pixels[i] = images.image(i)
        except ValueError:  # unreadable
            continue
        if len(pixels) == SAMPLES:
            break
    labelled = lambda i: (images.label(i) is None, images.label(i) or 0, i)  # noqa: E731
    return {i: pixels[i] for i in sorted(pixels, key=labelled)}


def _caption(images: ImageDataset, i: int) -> str:
    label = images.label(i)
    if label is not None:
        return class_captions([label], images.label_names)[0]
    return "no label" if images.labels is not None else images.text(i) or images.name(i)


def render_data(facts: Mapping[str, Any], captions: int, read: int) -> list[str]:
    """Lay out the result of `describe_data` as lines.

    Args:
        captions: number of captions among the `read` images.
    """
    lines = {
        "source": "; ".join([facts["kind"], *_list_side_files(facts["side_files"])]),
        "split": _render_splits(facts),
        "columns": _render_columns(facts["columns"]),
        "classes": _render_classes(facts),
        "captions": f"{captions:,} of {read:,} images read have one, e.g. "
        f"{facts['caption'][:CAPTION_LENGTH]!r}"
        if facts["caption"]
        else "none",
        "ignored": ", ".join(
            f"{kind['count']:,} {escape_name(name)} ({_list_names(kind['first'], kind['count'])})"
            for name, kind in facts["ignored"].items()
        )
        or "no files",
        "grey": "; ".join(facts["full_scale_notes"]),
    }
    return [f"{title:12} {text}" for title, text in lines.items() if text]


def render_splits(splits: Mapping[str, int]) -> str:
    """Lay out the splits of a source, one a line with the number of their images."""
    return "\n".join(["splits", *(f"  {escape_name(name)}: {n:,}" for name, n in splits.items())])


def _list_side_files(files: Mapping[str, str]) -> list[str]:
    listed = [f"{escape_name(name)}: {taken}" for name, taken in list(files.items())[:MAX_LISTED]]
    return listed + [f"{len(files) - MAX_LISTED:,} more tables"] * (len(files) > MAX_LISTED)


def _render_splits(facts: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{escape_name(name)} {n:,}" for name, n in facts["splits"].items())
    chosen = "all images" if facts["split"] is None else escape_name(facts["split"])
    return f"{chosen}; there are {counts}" if counts else chosen


def _render_columns(columns: Mapping[str, Any] | None) -> str:
    if columns is None:
        return ""
    used = ", ".join(f"{role} {shown(columns[role])}" for role in ("image", "label", "caption"))
    others = "; ".join(
        f"{role} {', '.join(map(shown, names[:MAX_LISTED]))}{', ...' * (len(names) > MAX_LISTED)}"
        for role, names in columns["others"].items()
    )
    return f"{used}; other candidates: {others}" if others else used


def _render_classes(facts: Mapping[str, Any]) -> str:
    if facts["classes"] is None:
        return "none, there are no labels"
    classes = facts["classes"]
    listed = [f"{i} {escape_name(n)} ({k:,})" for i, (n, k) in enumerate(classes[:MAX_LISTED])]
    listed += [f"... {len(classes) - MAX_LISTED:,} more"] * (len(classes) > MAX_LISTED)
    listed += [f"no label ({facts['unlabelled']:,})"] * bool(facts["unlabelled"])
    origin = f" by {escape_name(facts['labels_from'])}" if facts["labels_from"] else ""
    return f"{len(classes):,}{origin}: {', '.join(listed)}"


def _list_names(first: Sequence[str], count: int) -> str:
    return ", ".join(map(escape_name, first)) + ", ..." * (count > len(first))
