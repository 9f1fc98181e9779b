"""The table of GPU targets: what benchmarks/gpu.sh measured, beside what the step model says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from table_text import RESULTS, markdown_table, read_result

Row = dict[str, Any]
XL, DIFFIT, SID2 = "dimr-xl-2r-256", "diffit-256", "sid2-256"
PRODUCT = 790e12  # FLOP/s of a large bf16 product on an H200, as benchmarks/step_model.py has it


def measured_rows() -> list[Row]:
    """Return the rows that benchmarks/gpu.sh wrote, or none."""
    path = RESULTS / "gpu" / "gpu.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measured(part: str, key: str, **wanted: Any) -> list[float]:
    """Return the values of `key` in the rows of a part that have the wanted fields."""
    rows = [r for r in measured_rows() if r["part"] == part and key in r]
    return [r[key] for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def measured_share(preset: str) -> float | None:
    """Return the largest share of the rate of the card's own products that a step reached."""
    products = measured("machine", "flops", product="bf16")
    rates = measured("train", "achieved_flops", preset=preset)
    return max(rates) / max(products) if rates and products else None


def graph_speedup() -> float | None:
    """Return the latency of one image's guided call without CUDA graphs over that with them."""
    eager, graphs = (
        measured("sample", "seconds", preset=XL, way=way, batch=1) for way in ("eager", "graphs")
    )
    return eager[0] / graphs[0] if eager and graphs else None


def modelled(preset: str, step: str, value: Callable[[Row], float]) -> float | None:
    """Return the largest value of the step model's rows in bf16, eager or compiled."""
    rows = [
        r
        for r in read_result("step-model.json")
        if (r["preset"], r["step"], r["dtype"]) == (preset, step, "bfloat16")
    ]
    return max((value(r) for r in rows), default=None)


def rate(row: Row) -> float:
    """Return the images per second of a modelled row."""
    return row["images_per_second"]


def share(row: Row) -> float:
    """Return the share of the rate of products that a modelled row reaches."""
    return row["teraflop"] * 1e12 / (row["milliseconds"] / 1e3) / PRODUCT


def largest(values: list[float]) -> float | None:
    """Return the largest value, None without any."""
    return max(values, default=None)


def gpu_targets() -> str:
    """Return every GPU target with what was measured, where it has been, and what is modelled."""
    train = {p: largest(measured("train", "images_per_second", preset=p)) for p in (XL, DIFFIT)}
    sampled = largest(measured("sample", "images_per_second_at_250_steps", preset=XL))
    twin = largest(measured("twins", "ratio", preset=XL))
    products, shares = "share of the rate of matrix products", [0.35, 0.45]
    targets: list[tuple[str, float | None, float | None, list[float], str]] = [
        ("train DiMR-XL/2R, images/s", train[XL], modelled(XL, "train", rate), [290, 370, 425],
         "{:.0f}"),
        (f"train DiMR-XL/2R, {products}", measured_share(XL), modelled(XL, "train", share), shares,
         "{:.0%}"),
        ("train DiffiT-256, images/s", train[DIFFIT], modelled(DIFFIT, "train", rate), [700],
         "{:.0f}"),
        (f"train DiffiT-256, {products}", measured_share(DIFFIT), modelled(DIFFIT, "train", share),
         shares, "{:.0%}"),
        (f"train SiD2-256, {products}", measured_share(SID2), modelled(SID2, "train", share),
         shares, "{:.0%}"),
        ("sample DiMR-XL/2R by default, 250 guided steps, images/s", sampled,
         modelled(XL, "sample", rate), [2.4], "{:.2f}"),
        ("training step of DiMR-XL/2R relative to the plain network", twin, None, [2.5], "{:.2f}×"),
        ("latency at batch 1, without graphs over with graphs", graph_speedup(), None, [3],
         "{:.2f}×"),
    ]  # fmt: skip
    rows = []
    for what, value, model, aims, form in targets:
        reached = "–" if value is None else " / ".join("yes" if value >= a else "no" for a in aims)
        rows.append(
            [
                what,
                "not measured" if value is None else form.format(value),
                "–" if model is None else form.format(model),
                ", then ".join(form.format(aim) for aim in aims),
                reached,
            ]
        )
    text = (
        "`OUT=benchmarks/results/gpu bash benchmarks/gpu.sh` on one GPU (`benchmarks/gpu-call.md`)."
    )
    if not measured_rows():
        text += " It has not been run yet, for lack of a GPU."
    text += (
        " Modelled: `benchmarks/step_model.py` for an H200, the better of eager and compiled, "
        "optimistic by 5 to 15 %."
    )
    head = ["in bf16", "measured", "modelled", "target", "target reached as measured"]
    return f"{text}\n\n{markdown_table(head, rows)}"
