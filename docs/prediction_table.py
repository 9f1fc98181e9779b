"""The table of what a network predicts, by its patch."""

from __future__ import annotations

from statistics import geometric_mean

from table_text import how_measured, markdown_table, read_result

NETWORKS = {"jit-tiny": "JiT", "uvit-tiny": "U-ViT", "dimr-tiny": "DiMR"}
PREDICTIONS = ("x", "eps", "v")
LEVELS = ("0", "6")  # log-SNRs with a column of their own: x is best at one end, v at the other


def prediction_patches() -> str:
    """Return one row per network and patch: the error on held-out images, predicting x, eps, v."""
    result = read_result("prediction-patches.json")
    found = {(row["preset"], row["patch"], row["prediction"]): row for row in result["rows"]}
    rows = []
    for preset, patch in dict.fromkeys((preset, patch) for preset, patch, _ in found):
        three = [found.get((preset, patch, prediction)) for prediction in PREDICTIONS]
        cells = [NETWORKS[preset], f"{patch}", f"{3 * patch**2}"]
        cells.append(f"{max(row['images'] for row in three if row):,}")
        cells += _compare([row and geometric_mean(row["eps_mse"].values()) for row in three])
        for level in LEVELS:
            cells += _compare([row and row["eps_mse"][level] for row in three])
        rows.append(cells)
    head = ["network", "patch", "its numbers", "images"]
    for what in ("mean", *(f"log-SNR {level}" for level in LEVELS)):
        head += [f"{what}: x", "eps", "v"]
    text = (
        f"Error of the predicted noise on {result['held_out_images']} held-out images: its "
        f"geometric mean over five log-SNRs, and at two of them. {result['data']}; "
        f"{result['minutes']:g} core-minutes of training each, as many images as that takes. "
        f"{how_measured(result['rows'][-1])}"
    )
    return f"{text}\n\n{markdown_table(head, rows)}"


def _compare(errors: list[float | None]) -> list[str]:
    """Return the errors as cells, the smallest in bold, a dash where one is missing."""
    best = min(e for e in errors if e is not None)
    shown = ["–" if e is None else f"{e:.2g}" for e in errors]
    return [f"**{s}**" if e == best else s for e, s in zip(errors, shown, strict=True)]
