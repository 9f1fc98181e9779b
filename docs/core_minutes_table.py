"""The tables of distance over core-minutes of training, and what `mezzotint train auto` reads."""

from __future__ import annotations

import math
import sys
from statistics import geometric_mean, median
from typing import Any

from table_text import RESULTS, ROOT, markdown_table, read_result

from mezzotint.models import presets

sys.path.append(str(ROOT / "benchmarks"))
import time_to_quality as benchmark

QUALITY = ("quality-cpu.json", "quality-cifar10.json")
DATA_NAMES = {
    "eurosat64.zip": "EuroSAT",
    "cifar10_jpg.npz": "CIFAR-10 (JPEG copy)",
    "flowers128.zip": "flowers",
}
PICTURED_MINUTES = 10  # about those of the runs in docs/images/time-to-quality-*.png
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

    rows, speeds = [], result["speeds"]
    for r in sorted(result["rows"], key=lambda r: benchmark.core_minutes(r, speeds)):
        minutes = benchmark.core_minutes(r, speeds)
        start = [f"`{r['entrant']}`", f"{minutes:.1f}", f"{r['images']:,}"]
        start += [f"{r['params'] / 1e6:.1f} M", f"{mean_error(r):.4f}"]
        rows.append([*start, *cells(r["distances"])])
    rows.append(["held-out real images", *[""] * 4, *cells(result["held_out"])])
    head = ["entrant", "core-minutes", "images", "parameters", "mean error", *metrics]
    last = next(iter(speeds.values()))
    processors = "; ".join(sorted({r["processor"] for r in result["rows"]}))
    text = (
        f"{result['data']}: {result['samples']} samples ({result['sampler']}) against "
        f"{result['reference']}. The mean error is the mean squared error of the predicted noise "
        "on 128 held-out images, a geometric mean over the log-SNRs -6 to 6. Core-minutes are the "
        f"images over the speed below. Trained on {processors}."
    )
    loads = sorted(speed["load"][0] for speed in speeds.values())
    speed_text = (
        f"Speed of training on {last['processor']}: {last['threads']} thread, torch "
        f"{last['torch']}, median, lowest and highest of "
        f"{len(last['images_per_second'])} rounds in turns, processor time, load "
        f"{loads[0]:.1f} to {loads[-1]:.1f} on {last['cores']} cores."
    )
    speed_rows = []
    for entrant, measured in sorted(speeds.items()):
        found = measured["images_per_second"]
        cells_of = [f"{value:.2f}" for value in (median(found), min(found), max(found))]
        speed_rows.append([f"`{entrant}`", *cells_of])
    speed_table = markdown_table(["entrant", "images/s", "lowest", "highest"], speed_rows)
    reached = "Core-minutes until the distance is at most as large, interpolated between rows:"
    minutes_table = benchmark.tabulate_minutes(result["rows"], speeds, metrics[0])
    table = markdown_table(head, rows, left=1)
    return "\n\n".join([text, table, reached, minutes_table, speed_text, speed_table])


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
        picture, speeds = f"docs/images/{path.stem}.png", result["speeds"]
        for preset in sorted({row["entrant"] for row in result["rows"]} & set(presets())):
            runs = [row for row in result["rows"] if row["entrant"] == preset]
            minutes = [benchmark.core_minutes(row, speeds) for row in runs]
            measured = [
                measured_run(preset, data, side, row, held_out, metric)
                | {"core_minutes": round(spent, 1)}
                for row, spent in zip(runs, minutes, strict=True)
            ]
            if (ROOT / picture).exists():
                off = [abs(math.log(spent / PICTURED_MINUTES)) for spent in minutes]
                measured[off.index(min(off))]["picture"] = picture
            rows += measured
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
        "core_minutes": None,
        "distance": row["distances"][metric],
        "held_out": held_out,
    }
