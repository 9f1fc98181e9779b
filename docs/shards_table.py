"""The tables of docs/shards.md, of benchmarks/shard_readers.py and benchmarks/shard_order.py."""

from __future__ import annotations

from statistics import mean
from typing import Any

from table_text import how_measured, markdown_table, read_result

NAMES = {"mezzotint": "mezzotint, on `datasets`"}


def shard_readers() -> str:
    """Return one column per library: order, resume, change of ranks, rates, damage, upkeep."""
    result = read_result("shard-readers.json")
    libraries = result["libraries"]
    rows = [
        *_order_rows(libraries),
        *_resume_rows(libraries),
        *_rate_rows(result),
        *_damage_rows(libraries),
        *_upkeep_rows(result),
    ]
    head = ["", *(NAMES.get(name, f"`{name}`") for name in libraries)]
    missing = "; ".join(f"{name}: {reason}" for name, reason in result["not_run"].items())
    text = f"{how_measured(result)} Not run: {missing}."
    return f"{text}\n\n{markdown_table(head, rows)}"


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, "failed")


def _order_rows(libraries: dict[str, Any]) -> list[list[str]]:
    """Return what the order depends on, and what an epoch reads."""
    keys = {
        "same seed, same order": "same seed, same order",
        "same order with 1 and 2 workers": "same order with 1 and 2 workers",
        "same first 10 batches with 2 ranks": "same batches with 1 and 2 ranks",
        "same first 10 batches with 4 ranks": "same batches with 1 and 4 ranks",
    }
    found = [library["order"] for library in libraries.values()]
    rows = [[text, *(_yes(order[key]) for order in found)] for key, text in keys.items()]
    mixed = [f"{order['classes in a batch']:.1f}" for order in found]
    return [*rows, ["classes in a batch of 64, of 10", *mixed]]


def _count(found: Any) -> str:
    """Return "exact", the images that were missed or repeated, or that the library refuses."""
    if isinstance(found, str):
        return "refused"
    parts = [f"{found[key]:,} {key}" for key in ("missing", "repeated") if found[key]]
    return ", ".join(parts) or "exact"


def _resume_rows(libraries: dict[str, Any]) -> list[list[str]]:
    """Return what a restart reads, on as many ranks and on others, and how long it takes."""
    found = list(libraries.values())
    rows = [
        ["restarted twice", *(_count(library["resume"]) for library in found)],
        ["…in the same order", *(_yes(library["resume"]["resumes exactly"]) for library in found)],
        [
            "bytes of a state",
            *(f"{lib['resume']['bytes of a rank' + chr(39) + 's state']:,}" for lib in found),
        ],
    ]
    for key in found[0]["ranks"]:
        rows.append([key, *(_count(library["ranks"][key]) for library in found)])
    uneven = [library["uneven"] for library in found]
    shares = [" and ".join(f"{n:,}" for n in found["images of each rank"]) for found in uneven]
    rows.append(["2 ranks, shards of 30 to 100", *map(_count, uneven)])
    rows.append(["…images of the ranks", *shares])
    times = [library["processor seconds to the first batch"] for library in found]
    for key in ("0 %", "10 %", "90 %"):
        cells = [f"{t[key]:.2f}" if isinstance(t, dict) else "failed" for t in times]
        rows.append([f"core seconds to the first batch at {key}", *cells])
    return rows


def _rate_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return images per second of processor time."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in result["rates"]:
        rounds = [r["processor"] for r in row["rounds"] if isinstance(r, dict)]
        cell = f"{mean(rounds):,.0f}" if rounds else "failed"
        rows.setdefault((row["images"], row["place"]), []).append(cell)
    return [
        [f"images/s and core, {name}, {place}", *cells] for (name, place), cells in rows.items()
    ]


def _damage_rows(libraries: dict[str, Any]) -> list[list[str]]:
    """Return whether damage stops a run."""
    rows = []
    for kind in ("missing", "cut", "altered"):
        cells = [str(library["damage"][kind]) for library in libraries.values()]
        cells = ["not noticed" if cell.endswith(" images") else "stops" for cell in cells]
        rows.append([f"a shard is {kind}", *cells])
    return rows


def _upkeep_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return versions, dates, sizes and stores; ours are those of `datasets`."""
    found = [
        result["upkeep"].get(name, result["upkeep"]["datasets"]) for name in result["libraries"]
    ]
    return [
        ["version", *(f["version"] for f in found)],
        ["newest file", *(f["released"] or "not stated" for f in found)],
        ["licence", *(f["licence"].replace("Apache 2.0", "Apache-2.0") for f in found)],
        ["lines of Python", *(f"{f['lines of Python']:,}" for f in found)],
        ["packages that it brings", *(str(f["packages"]) for f in found)],
        ["needs torchvision", *(_yes(f["torchvision"]) for f in found)],
        ["reads stores by", *(f["stores"] for f in found)],
    ]


def shard_order() -> str:
    """Return a rank's plan for a billion images, and how well smaller settings mix."""
    result = read_result("shard-order.json")
    plan, fetches, small = result["plan"], result["fetches"], result["small case"]
    lanes = result["sampled lanes"]
    rows = [
        ["memory of a rank's plan", f"{plan['bytes at most'] / 1e6:.1f} MB"],
        ["time to the first batch", f"{1000 * plan['seconds to the first batch']:.0f} ms"],
        ["time per batch, mean", f"{1e6 * plan['seconds per batch, mean']:.0f} µs"],
        ["time per batch, slowest", f"{1000 * plan['seconds per batch, slowest']:.2f} ms"],
        [
            "time to the first batch of the next epoch",
            f"{1000 * plan['seconds to the first batch of another epoch']:.1f} ms",
        ],
        [
            "images of a rank in an epoch",
            f"{result['rows']['images of a rank, least']:,} to {result['rows']['most']:,}",
        ],
        [
            "shards of a rank in an epoch",
            f"{fetches['shards of a rank, least']} to {fetches['shards of a rank, most']}, "
            f"mean {fetches['shards of a rank, mean']:.1f}",
        ],
        [
            "times that a shard is fetched",
            f"{fetches['fetches per shard, a cache per rank']:.3f}; "
            f"{fetches['fetches per shard, a cache per 8 ranks']:.3f} with a cache for 8 ranks",
        ],
        [
            f"images of {lanes['lanes']} whole lanes",
            f"{lanes['images']:,}, {lanes['repeated']} repeated",
        ],
    ]
    head = [
        f"{result['images']:,} images, {result['shards']:,} shards, {result['ranks']:,} ranks",
        "",
    ]
    counted = small["8, 4, 16 ranks, read once"]
    same = "in the same batches" if small["8, 4, 16 ranks, same batches"] else "in other batches"
    text = (
        f"{how_measured(result)} The batch is {result['batch']:,}, of {result['lanes']:,} lanes "
        f"and blocks of {result['shuffle_images']:,} images."
    )
    counts = (
        f"All of {small['images']:,} images in {small['shards']} shards were counted. Two epochs "
        f"read {small['epoch 0, read once']:,} and {small['epoch 1, read once']:,} of them once. "
        f"An epoch on 8, then 4, then 16 ranks read {counted:,} once, {same} as one on 8."
    )
    mixing = [
        [
            str(row["lanes"]),
            f"{row['shuffle_images']:,}",
            f"{row['classes in a batch']:.0f}",
            f"{row['shards in a batch']:.0f}",
        ]
        for row in result["mixing"]
    ]
    about = (
        f"The same images, sorted by {result['classes']:,} classes, in batches of "
        f"{small['batch']}; a permutation of all images has "
        f"{result['classes in a batch of a permutation']:.0f} classes in a batch:"
    )
    columns = ["lanes", "`shuffle_images`", "classes in a batch", "shards in a batch"]
    return "\n\n".join(
        [text, markdown_table(head, rows), counts, about, markdown_table(columns, mixing)]
    )
