"""What a shard holds, in counts that add up over shards; kept in the shard's own metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mezzotint.core.json_values import check_fields
from mezzotint.data.audit import Audit

REPORT = "report.json"  # of all shards, beside them
# Numbers, and counters: class, mode of the stored image, its width, its height -> images.
COUNTS = ("rows", "captions", "tokens", "cut", "upscaled", "dark", "bytes")
COUNTERS = ("classes", "modes", "widths", "heights")
REPORT_KINDS = {
    **dict.fromkeys((*COUNTS, "longest"), int),
    **dict.fromkeys(COUNTERS, dict[str, int]),
    "unreadable": dict[str, str],
    "latents": dict | None,
    **dict.fromkeys(("sha256", "fingerprint"), str),
    "plan": dict,
}


def count_rows(audit: Audit) -> dict[str, Any]:
    """Return the counts of an audit that add up; those of bytes and tokens are 0.

    longest: caption, in tokens. cut: captions. bytes: of images or latents.
    """
    return {
        **dict.fromkeys(COUNTS, 0),
        "longest": 0,
        "rows": audit.count,
        "captions": audit.captions,
        "upscaled": audit.upscaled,
        "dark": audit.dark,
        "classes": dict(audit.classes),
        "modes": dict(audit.modes),
        "widths": _histogram((size[0], n) for size, n in audit.sizes.items()),
        "heights": _histogram((size[1], n) for size, n in audit.sizes.items()),
        "unreadable": audit.unreadable,
    }


def _histogram(pairs: Iterable[tuple[int, int]]) -> dict[str, int]:
    counter: Counter[str] = Counter()
    for value, n in pairs:
        counter[str(value)] += n
    return dict(counter)


def check_report(report: Mapping[str, Any]) -> None:
    """Raise ValueError for a shard's report that lacks fields."""
    check_fields(report, REPORT_KINDS)
    if sides := [s for name in ("widths", "heights") for s in report[name] if not s.isdecimal()]:
        raise ValueError(f"a side is {sides[0]!r} pixels")


def add_reports(
    reports: Sequence[Mapping[str, Any]], label_names: Sequence[str] | None, notes: Sequence[str]
) -> dict[str, Any]:
    """Return the report of all shards, as `mezzotint.data.audit.Audit.summary`.

    Duplicates are not looked for: no process sees all images.
    """
    totals = {name: sum(report[name] for report in reports) for name in COUNTS}
    counters = {name: _add_counters(report[name] for report in reports) for name in COUNTERS}
    classes = counters["classes"]
    names = [*(label_names or ()), "no label"]
    return {
        "images": totals.pop("rows"),
        **totals,
        "longest": max((report["longest"] for report in reports), default=0),
        "classes": {name: classes[name] for name in names if classes[name]},
        "classes_without_images": [name for name in label_names or () if not classes[name]],
        "original_width": _spread(counters["widths"]),
        "original_height": _spread(counters["heights"]),
        "modes": dict(counters["modes"].most_common()),
        "unreadable": {k: v for report in reports for k, v in report["unreadable"].items()},
        "notes": list(notes),
        "shards": len(reports),
    }


def _add_counters(counters: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _spread(histogram: Mapping[str, int]) -> dict[str, float]:
    """Return minimum, median and maximum, in pixels."""
    if not histogram:
        return {}
    sides, counts = np.array(sorted((int(side), n) for side, n in histogram.items())).T
    ends, total = np.cumsum(counts), int(counts.sum())
    middle = sides[np.searchsorted(ends, [(total - 1) // 2, total // 2], side="right")]
    return {"min": int(sides[0]), "median": float(middle.mean()), "max": int(sides[-1])}
