"""What a set of pictures holds and what is wrong with it: damage, modes, sizes, duplicates, class balance, captions."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mezzotint.data.image_dataset import DecodedImage, ImageDataset
from mezzotint.data.transforms import UnreadableImage

SHOWN = 20  # names listed in a report's text; the JSON has all


@dataclass
class Audit:
    """Gathered sample by sample; `summary` is the report.

    unreadable: name -> reason. upscaled: pictures whose short side is below the size asked for.
    """

    size: int
    count: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height) as stored
    classes: Counter[str] = field(default_factory=Counter)
    captions: int = 0
    upscaled: int = 0
    same: dict[bytes, list[int]] = field(
        default_factory=lambda: defaultdict(list)
    )  # hash of pixels -> samples

    def add(self, images: ImageDataset, i: int, decoded: DecodedImage | UnreadableImage) -> None:
        """Count sample i."""
        if isinstance(decoded, UnreadableImage):
            self.unreadable[images.name(i)] = str(decoded)
            return
        self.count += 1
        self.modes[decoded.mode] += 1
        self.sizes[decoded.width, decoded.height] += 1
        self.upscaled += min(decoded.width, decoded.height) < self.size
        self.captions += bool(images.text(i))
        label = images.label(i)
        if images.label_names is not None:
            self.classes["no label" if label is None else images.label_names[label]] += 1
        self.same[hashlib.blake2b(decoded.pixels.tobytes(), digest_size=16).digest()].append(i)

    def summary(self, images: ImageDataset) -> dict[str, Any]:
        """The report as plain values, ready for JSON.

        "duplicates" lists groups of names whose pixels agree entirely at the size asked for;
        "duplicates_with_other_labels" those groups whose members are labelled differently.
        """
        groups = [group for group in self.same.values() if len(group) > 1]
        torn = [group for group in groups if len({images.label(i) for i in group}) > 1]
        empty = [name for name in images.label_names or () if not self.classes[name]]
        return {
            "images": self.count,
            "classes": dict(self.classes),
            "classes_without_images": empty,
            "captions": self.captions,
            "original_width": _spread(
                width for (width, _), n in self.sizes.items() for _ in range(n)
            ),
            "original_height": _spread(
                height for (_, height), n in self.sizes.items() for _ in range(n)
            ),
            "upscaled": self.upscaled,
            "modes": dict(self.modes.most_common()),
            "duplicates": [[images.name(i) for i in group] for group in groups],
            "duplicates_with_other_labels": [[images.name(i) for i in group] for group in torn],
            "unreadable": dict(self.unreadable),
            "notes": list(images.report.notes),
        }


def _spread(values: Iterable[int]) -> dict[str, float]:
    """Least, median and greatest, in pixels."""
    ordered = sorted(values)
    return {"min": ordered[0], "median": median(ordered), "max": ordered[-1]} if ordered else {}


def decode_all(
    images: ImageDataset, *, progress: bool
) -> Iterator[tuple[int, DecodedImage | UnreadableImage]]:
    """Every sample in order, decoded on all cores; those that cannot be come as the `Unreadable` that says why."""
    from rich.console import Console
    from rich.progress import track

    def one(i: int) -> DecodedImage | UnreadableImage:
        try:
            return images.decode(i)
        except UnreadableImage as reason:
            return reason

    threads = os.cpu_count() or 1
    numbers = range(len(images))
    with ThreadPoolExecutor(threads) as pool:
        flying: deque[Future[DecodedImage | UnreadableImage]] = deque(
            pool.submit(one, i) for i in numbers[: 4 * threads]
        )
        console = Console(stderr=True)
        for i in track(
            numbers, "reading images", console=console, disable=not progress, transient=True
        ):
            decoded = flying.popleft().result()
            if i + 4 * threads < len(images):
                flying.append(pool.submit(one, i + 4 * threads))
            yield i, decoded


def audit_images(images: ImageDataset, *, progress: bool = False) -> dict[str, Any]:
    """Read every sample of a set once and say what it holds, see `Audit.summary`; `describe` puts it in words."""
    found = Audit(images.size)
    for i, decoded in decode_all(images, progress=progress):
        found.add(images, i, decoded)
    return found.summary(images)


def describe_audit(summary: dict[str, Any]) -> str:
    """A summary in a few lines: what there is, then what deserves a look."""
    count = summary["images"]
    lines = [f"{count:,} images"]
    if count:
        sides = (summary["original_width"], summary["original_height"])
        spread = [f"{side['min']}...{side['max']} (median {side['median']:g})" for side in sides]
        modes = ", ".join(f"{mode} {n:,}" for mode, n in summary["modes"].items())
        lines.append(f"width {spread[0]}, height {spread[1]}; modes {modes}")
    if summary["classes"]:
        listed = [f"{name} {n:,}" for name, n in list(summary["classes"].items())[:SHOWN]]
        lines.append(
            f"{len(summary['classes'])} classes: {', '.join(listed)}{_more(summary['classes'])}"
        )
    if summary["captions"]:
        lines.append(f"{summary['captions']:,} captions")
    return "\n".join(lines + [f"! {concern}" for concern in list_problems(summary)])


def list_problems(summary: dict[str, Any]) -> list[str]:
    """One sentence for each thing that deserves a look before training; empty for a sound set."""
    said = list(summary["notes"])
    if bad := summary["unreadable"]:
        listed = [f"{name} ({reason})" for name, reason in list(bad.items())[:SHOWN]]
        said.append(f"{len(bad):,} unreadable: {', '.join(listed)}{_more(bad)}")
    if groups := summary["duplicates"]:
        extra = sum(len(group) - 1 for group in groups)
        said.append(
            f"{extra:,} duplicates in {len(groups):,} groups, first: {', '.join(groups[0][:SHOWN])}"
        )
    if torn := summary["duplicates_with_other_labels"]:
        said.append(
            f"{len(torn):,} groups of duplicates bear different labels, first: {', '.join(torn[0][:SHOWN])}"
        )
    if summary["upscaled"]:
        said.append(
            f"{summary['upscaled']:,} images are smaller than the size asked for and were enlarged"
        )
    counts = {name: n for name, n in summary["classes"].items() if name != "no label"}
    if counts and max(counts.values()) > 10 * min(counts.values()):
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        said.append(
            f"classes are uneven: {most} has {counts[most]:,} images, {least} {counts[least]:,}"
        )
    if empty := summary["classes_without_images"]:
        said.append(f"classes without images: {', '.join(empty[:SHOWN])}{_more(empty)}")
    return said


def _more(listed: dict[str, Any] | list[str]) -> str:
    return f", ... {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
