"""The tables of distance over core-minutes of training, and what `mezzotint train auto` reads."""

from __future__ import annotations

import sys
from statistics import geometric_mean
from typing import Any

from table_text import RESULTS, ROOT, markdown_table, read_result

from mezzotint.models import presets

sys.path.append(str(ROOT / "benchmarks"))
from time_to_quality import name_processors, tabulate_minutes

QUALITY = ("quality-cpu.json", "quality-cifar10.json")
DATA_NAMES = {
    "eurosat64.zip": "EuroSAT",
    "cifar10_jpg.npz": "CIFAR-10 (JPEG copy)",
    "flowers128.zip": "flowers",
}
PICTURED_MINUTES = 10  # of the runs in docs/images/time-to-quality-*.png
DISTANCES = ("FD-Inception-64", "coverage (inception-64)")


def mean_error(measured: dict[str, Any]) -> float:
    """Return the geometric mean over log-SNRs: a ratio counts equally at every level."""
    return geometric_mean(measured["eps_mse"].values())


def core_minutes() -> str:
    """Return one table per dataset: distances of every entrant over core-minutes of training."""
    found = sorted(RESULTS.glob("time-to-quality-*.json"))
    if not found:
        raise FileNotFoundError(2, "not measured", "time-to-quality-*.json")
    return "\n\n".join(core_minutes_of(read_result(path.name)) for path in found)


def core_minutes_of(result: dict[str, Any]) -> str:
    """Return the table of one result."""
    metrics = [
        "FD-EfficientNet-Lite0",
        "KID (efficientnet-lite0)",
        "coverage (efficientnet-lite0)",
        "FD-Inception-768",
    ]

    def cells(distances: dict[str, float]) -> list[str]:
        return [f"{distances[m]:.3g}" if m in distances else "–" for m in metrics]

    rows = []
    letters = name_processors(result["rows"])
    for r in sorted(result["rows"], key=lambda r: (r["asked_minutes"], mean_error(r))):
        size, letter = f"{r['params'] / 1e6:.1f} M", letters[r["processor"]]
        start = [f"`{r['entrant']}`", letter, f"{r['minutes']:.0f}", f"{r['images']:,}", size]
        rows.append([*start, f"{mean_error(r):.4f}", *cells(r["distances"])])
    rows.append(["held-out real images", *[""] * 5, *cells(result["held_out"])])
    head = ["entrant", "processor", "core-minutes", "images", "parameters", "mean error", *metrics]
    load = [r["load"][0] for r in result["rows"]]
    last = result["rows"][-1]
    processors = "; ".join(f"{letter} {name}" for name, letter in letters.items())
    text = (
        f"{result['data']}: {result['samples']} samples ({result['sampler']}) against "
        f"{result['reference']}. The mean error is the mean squared error of the predicted noise "
        "on 128 held-out images, a geometric mean over the log-SNRs -6 to 6. "
        f"Processors: {processors}. {last['threads']} thread, torch {last['torch']}, load "
        f"{min(load):.0f} to {max(load):.0f} on {last['cores']} cores, {result['clock']}."
    )
    tables = [text, markdown_table(head, rows, left=2)]
    if len({r["asked_minutes"] for r in result["rows"]}) > 1:
        reached = "Core-minutes until the distance is at most as large, interpolated between rows:"
        tables += [reached, tabulate_minutes(result["rows"], metrics[0])]
    return "\n\n".join(tables)


def time_to_quality() -> dict[str, Any]:
    """Return the measurements of `mezzotint train auto`: every run with a distance.

    They are of benchmarks/time_to_quality.py or, until it has measured as many datasets, of
    benchmarks/quality.py.
    """
    metric, rows = "FD-EfficientNet-Lite0", []
    found = sorted(RESULTS.glob("time-to-quality-*.json"))
    found = found if len(found) >= len(QUALITY) else []
    for path in found:
        result = read_result(path.name)
        data, size = result["data"].split(", ")  # "eurosat64.zip, 64 px"
        side, held_out = int(size.split()[0]), result["held_out"][metric]
        picture = f"docs/images/{path.stem}.png"
        shown = {"picture": picture} if (ROOT / picture).exists() else {}
        rows += [
            measured_run(row["entrant"], data, side, row, held_out, metric)
            | (shown if row["asked_minutes"] == PICTURED_MINUTES else {})
            for row in result["rows"]
            if row["entrant"] in presets()
        ]
    if not rows:
        metric, found = DISTANCES[0], [RESULTS / name for name in QUALITY]
        key = f"{metric} of held-out images"
        for result in (read_result(path.name) for path in found):
            data, side = result["data"].partition(":")[0], result["size"]
            rows += [
                measured_run(row["preset"], data, side, row, row["distances"][key], metric)
                for row in result["rows"]
                if "distances" in row
            ]
    source = " and ".join(str(path.relative_to(ROOT)) for path in found)
    return {"source": source, "metric": metric, "rows": rows}


def measured_run(
    preset: str, data: str, size: int, row: dict[str, Any], held_out: float, metric: str
) -> dict[str, Any]:
    """Return one row of `time_to_quality`."""
    return {
        "preset": preset,
        "data": DATA_NAMES.get(data, data),
        "size": size,
        "images": row["images"],
        "core_minutes": row.get("minutes"),
        "distance": row["distances"][metric],
        "held_out": held_out,
    }
