"""The table of few steps beside many."""

from __future__ import annotations

from typing import Any

from table_text import how_measured, markdown_table, read_result

METRICS = ("FD-EfficientNet-Lite0", "KID (efficientnet-lite0)")
NAMES = {"ddim": "teacher, `ddim`", "untuned": "teacher, `consistency`: not tuned"}


def few_steps() -> str:
    """Return one row per number of network calls, of the tuned model and of its teacher."""
    result = read_result("few-steps-eurosat.json")

    def cells(distances: dict[str, float]) -> list[str]:
        return [f"{distances[METRICS[0]]:.0f}", f"{distances[METRICS[1]]:.3f}"]

    rows = [
        [name_of(row), f"{row['calls']}", *cells(row["distances"])]
        for row in sorted(
            result["rows"], key=lambda r: (r["asked_minutes"], r["sampler"], r["steps"])
        )
    ]
    rows.append(["held-out real images", "", *cells(result["held_out"])])
    text = (
        f"{result['data']}; teacher {result['teacher']}; {result['samples']} samples of the same "
        f"seeds against {result['reference']}, x clipped, no guidance. "
        f"{how_measured(result['rows'][-1])}"
    )
    return f"{text}\n\n{markdown_table(['model, `sampler`', 'network calls', *METRICS], rows)}"


def name_of(row: dict[str, Any]) -> str:
    """Return the model and sampler of a row."""
    if "minutes" in row:
        return f"tuned {row['minutes']:.0f} core-minutes ({row['images']:,} images), `consistency`"
    return NAMES["ddim" if row["sampler"] == "ddim" else "untuned"]
