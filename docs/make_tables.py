"""Write the tables of docs/backbones.md and README.md from the library's own counts and from benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path

from mezzotint import info

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "backbones.md", ROOT / "README.md"
QUALITY = ROOT / "benchmarks" / "results" / "quality-cpu.json"
SPEED = ROOT / "benchmarks" / "results" / "speed-cpu.json"


def cost() -> str:
    """One row per preset: parameters, multiply-accumulates, and what the paper claims."""
    lines = ["| preset | input | parameters | GMAC | FID claimed | source |", "|---|---|---:|---:|---:|---|"]
    for r in info.table():
        shape = "x".join(map(str, [*r["input_shape"][1:], r["input_shape"][0]]))
        space = "" if r["codec"] == "pixels" else f", {r['codec']}"
        cells = [
            f"`{r['name']}`",
            shape + space,
            info.si(r["params"]),
            f"{r['gmac']:.2f}",
            r["fid_claimed"] or "",
            r["paper"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quality() -> str:
    """The error of each tiny preset at the largest budget it reached; a sentence where nothing was measured."""
    if not QUALITY.exists():
        return "Not measured yet: `python benchmarks/quality.py` writes the numbers that belong here."
    found = json.loads(QUALITY.read_text())
    levels = list(found["rows"][0]["eps_mse"])
    head = ["preset", "images", "GMAC in all", *(f"log-SNR {level}" for level in levels)]
    lines = [f"| {' | '.join(head)} |", "|---|---:|---:|" + "---:|" * len(levels)]
    last = {row["preset"]: row for row in found["rows"]}  # rows of a preset come in order of its images
    for name, row in last.items():
        cells = [f"`{name}`", f"{row['images']:,}", f"{row['gmac']:.0f}", *(f"{row['eps_mse'][k]:.4f}" for k in levels)]
        lines.append(f"| {' | '.join(cells)} |")
    said = (
        f"Mean squared error of the noise on {found['held_out']}, after training on {found['data']} at {found['size']} "
        f"pixels in batches of {found['batch']} for {found['budget_gmac']:g} GMAC of forward passes; "
        f"{found['machine']}."
    )
    return "\n".join([said, "", *lines])


def speed() -> str:
    """How many times as fast as plain transcriptions of the published networks, with the machine and the command."""
    found = json.loads(SPEED.read_text())
    lines = [
        "| network | training, float32 | training, bf16 | sampling, float32 | sampling, bf16 |",
        "|---|" + "---:|" * 4,
    ]
    for row in found["rows"]:
        pairs = [row[mode][key] for mode in ("train", "sample") for key in ("float32", "bf16 against bf16 twin")]
        lines.append(f"| {row['network']} | " + " | ".join(f"{ratio:.2f}×" for ratio in pairs) + " |")
    said = (
        "Times as fast as a plain transcription of the published network (`benchmarks/plain/`) in the same precision;\n"
        f"{found['processor']}, {found['threads']} thread, torch {found['torch']}, load "
        f"{found['load'][0]:.0f} on {found['cores']} cores, {found['clock']}. Written by\n`{found['command']}`\n"
        "and `python docs/make_tables.py`."
    )
    return "\n".join([said, "", *lines])


def between(text: str, name: str, table: str) -> str:
    """`text` with what stands between the two comments of `name` replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    page = PAGE.read_text()
    for name, table in (("cost", cost()), ("quality", quality())):
        page = between(page, name, table)
    PAGE.write_text(page)
    README.write_text(between(README.read_text(), "speed", speed()))
