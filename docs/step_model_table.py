"""The table of modelled steps on a GPU."""

from __future__ import annotations

from typing import Any

from table_text import markdown_table, read_result

DTYPES = {"bfloat16": "bf16", "float32": "float32"}
STEPS = {"train": "training", "sample": "sampling"}


def step_times() -> dict[str, dict[str, Any]]:
    """Return the training steps in bf16 by preset, for `mezzotint.tools.step_times`."""
    times: dict[str, dict[str, Any]] = {}
    for row in read_result("step-model.json"):
        kind = row["step"], row["dtype"], row.get("depthwise", "cudnn")
        if kind == ("train", "bfloat16", "cudnn"):
            preset = times.setdefault(row["preset"], {"batch": row["batch"]})
            preset |= {"teraflop": row["teraflop"], row["mode"]: row["milliseconds"]}
    return times


def step_model() -> str:
    """Return one row per preset and step: eager beside compiled."""
    found: dict[tuple[str, int, str, str], dict[str, dict[str, Any]]] = {}
    for row in read_result("step-model.json"):
        key = (row["preset"], row["batch"], row["step"], row["dtype"])
        found.setdefault(key, {})[row["mode"]] = row
    rows = []
    for (preset, batch, step, dtype), modes in found.items():
        unit = " a call" if step == "sample" else ""
        digits = 2 if step == "sample" else 0
        cells = [f"`{preset}`, {batch}", f"{STEPS[step]}, {DTYPES[dtype]}"]
        for mode in ("eager", "compiled"):
            row = modes[mode]
            cells += [f"{row['milliseconds']:.1f}{unit}", f"{row['images_per_second']:.{digits}f}"]
        kernels = " and ".join(f"{modes[mode]['kernels']:,}" for mode in ("eager", "compiled"))
        rows.append([*cells, kernels])
    head = ["preset, batch", "step", "eager, ms", "eager, images/s", "compiled, ms"]
    head += ["compiled, images/s", "kernels, eager and compiled"]
    last = next(reversed(found.values()))["compiled"]
    text = (
        f"`python benchmarks/step_model.py`, torch {last['torch']}, commit {last['commit']}. "
        "Modelled, not measured."
    )
    return f"{text}\n\n{markdown_table(head, rows, left=2)}"
