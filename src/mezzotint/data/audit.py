"""What a dataset of images holds and what is wrong with it: damage, sizes, duplicates, ..."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mezzotint.core.progress import track
from mezzotint.core.threads import map_in_order
from mezzotint.data.image_dataset import DecodedImage, ImageDataset
from mezzotint.data.transforms import UnreadableImage

DARK = 32  # of 255
MAX_LISTED = 20  # names listed in a report's text; the JSON has all


@dataclass
class Audit:
    """Counts over the images of a dataset; `summary` is the report.

    unreadable: name -> reason. sizes: (width, height) as stored. upscaled: images whose short
    side is below `size`. dark: images that use less than 1/8 of the range. same_pixels: hash of the
    pixels -> image indices.
    """

    size: int
    count: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    upscaled: int = 0
    dark: int = 0
    same_pixels: dict[bytes, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, dataset: ImageDataset, i: int, decoded: DecodedImage | UnreadableImage) -> None:
        """Count image i."""
        if isinstance(decoded, UnreadableImage):
            self.unreadable[dataset.name(i)] = str(decoded)
            return
        self.count += 1
        self.modes[decoded.mode] += 1
        self.sizes[decoded.width, decoded.height] += 1
        self.upscaled += min(decoded.width, decoded.height) < self.size
        self.captions += bool(dataset.text(i))
        label = dataset.label(i)
        if dataset.label_names is not None:
            self.classes["no label" if label is None else dataset.label_names[label]] += 1
        self.dark += bool(decoded.pixels.max() < DARK)
        pixels = decoded.pixels.tobytes()
        self.same_pixels[hashlib.blake2b(pixels, digest_size=16).digest()].append(i)

    def summary(self, dataset: ImageDataset) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON.

        "duplicates" lists groups of names whose pixels are equal at this size;
        "duplicates_with_other_labels" those groups whose labels differ.
        """
        groups = [group for group in self.same_pixels.values() if len(group) > 1]
        differing = [group for group in groups if len({dataset.label(i) for i in group}) > 1]
        sizes = list(self.sizes.elements())
        return {
            "images": self.count,
            "classes": dict(self.classes),
            "classes_without_images": [
                name for name in dataset.label_names or () if not self.classes[name]
            ],
            "captions": self.captions,
            "original_width": _spread(width for width, _ in sizes),
            "original_height": _spread(height for _, height in sizes),
            "upscaled": self.upscaled,
            "dark": self.dark,
            "modes": dict(self.modes.most_common()),
            "duplicates": [[dataset.name(i) for i in group] for group in groups],
            "duplicates_with_other_labels": [
                [dataset.name(i) for i in group] for group in differing
            ],
            "unreadable": dict(self.unreadable),
            "notes": list(dataset.report.notes),
        }


def _spread(values: Iterable[int]) -> dict[str, float]:
    """Return minimum, median and maximum, in pixels."""
    ordered = sorted(values)
    return {"min": ordered[0], "median": median(ordered), "max": ordered[-1]} if ordered else {}


def decode_all(
    dataset: ImageDataset, *, progress: bool
) -> Iterator[tuple[int, DecodedImage | UnreadableImage]]:
    """Yield every index with its image, decoded on all cores; for a damaged one, the error."""

    def decode(i: int) -> DecodedImage | UnreadableImage:
        try:
            return dataset.decode(i)
        except UnreadableImage as reason:
            return reason

    indices = track(range(len(dataset)), "reading images", len(dataset), show=progress)
    decoded = map_in_order(decode, range(len(dataset)), os.cpu_count() or 1)
    yield from zip(indices, decoded, strict=True)


def audit_images(dataset: ImageDataset, *, progress: bool = False) -> dict[str, Any]:
    """Read every image of a dataset once and return `Audit.summary`."""
    audit = Audit(dataset.size)
    for i, decoded in decode_all(dataset, progress=progress):
        audit.add(dataset, i, decoded)
    return audit.summary(dataset)


def describe_audit(summary: dict[str, Any]) -> str:
    """Return a summary as a few lines of text: what there is, then its problems."""
    count = summary["images"]
    lines = [f"{count:,} images"]
    if count:
        sides = (summary["original_width"], summary["original_height"])
        width, height = (
            f"{side['min']}...{side['max']} (median {side['median']:g})" for side in sides
        )
        modes = ", ".join(f"{mode} {n:,}" for mode, n in summary["modes"].items())
        lines.append(f"width {width}, height {height}; modes {modes}")
    if classes := summary["classes"]:
        listed = ", ".join(f"{name} {n:,}" for name, n in list(classes.items())[:MAX_LISTED])
        count = len(classes.keys() - {"no label"})
        lines.append(f"{count} classes: {listed}{_count_unlisted(classes)}")
    if summary["captions"]:
        lines.append(f"{summary['captions']:,} captions")
    return "\n".join(lines + [f"! {problem}" for problem in list_problems(summary)])


def list_problems(summary: dict[str, Any]) -> list[str]:
    """Return one sentence for each thing to check before training; empty for a sound dataset."""
    problems = list(summary["notes"])
    if unreadable := summary["unreadable"]:
        listed = [f"{name} ({reason})" for name, reason in list(unreadable.items())[:MAX_LISTED]]
        problems.append(
            f"{len(unreadable):,} unreadable: {', '.join(listed)}{_count_unlisted(unreadable)}"
        )
    if groups := summary.get(
        "duplicates"
    ):  # of shards, which are counted one by one, there is none
        extra = sum(len(group) - 1 for group in groups)
        first = ", ".join(groups[0][:MAX_LISTED])
        problems.append(f"{extra:,} duplicates in {len(groups):,} groups, first: {first}")
    if differing := summary.get("duplicates_with_other_labels"):
        first = ", ".join(differing[0][:MAX_LISTED])
        problems.append(
            f"{len(differing):,} groups of duplicates have different labels, first: {first}"
        )
    if summary["upscaled"]:
        problems.append(
            f"{summary['upscaled']:,} images are smaller than the chosen size and were enlarged"
        )
    if summary["dark"]:
        problems.append(
            f"{summary['dark']:,} images use less than 1/8 of the range; is white another value in "
            "them (see --full-scale)?"
        )
    counts = {name: n for name, n in summary["classes"].items() if name != "no label"}
    if counts and max(counts.values()) > 10 * min(counts.values()):
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        problems.append(
            f"classes are uneven: {most} has {counts[most]:,} images, {least} {counts[least]:,}"
        )
    if empty := summary["classes_without_images"]:
        listed = ", ".join(empty[:MAX_LISTED])
        problems.append(f"classes without images: {listed}{_count_unlisted(empty)}")
    return problems


def _count_unlisted(listed: dict[str, Any] | list[str]) -> str:
    return f", ... {len(listed) - MAX_LISTED:,} more" if len(listed) > MAX_LISTED else ""
