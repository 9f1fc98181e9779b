"""Write the tables of docs/ and README.md from the library's own counts and from benchmarks/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mezzotint.tools import summary

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "backbones.md", ROOT / "README.md"
PERFORMANCE, EVALUATION = ROOT / "docs" / "performance.md", ROOT / "docs" / "evaluation.md"
RESULTS = ROOT / "benchmarks" / "results"
QUALITY = ("quality-cpu.json", "quality-cifar10.json")
DISTANCES = ("FD-Inception-64", "coverage (inception-64)")
SPEED = RESULTS / "speed-cpu.json"


def cost() -> str:
    """One row per preset: parameters, multiply-accumulates, and what the paper claims."""
    lines = [
        "| preset | input | parameters | GMAC | FID claimed | source |",
        "|---|---|---:|---:|---:|---|",
    ]
    for r in summary.table():
        shape = "x".join(map(str, [*r["input_shape"][1:], r["input_shape"][0]]))
        space = "" if r["codec"] == "pixels" else f", {r['codec']}"
        cells = [
            f"`{r['name']}`",
            shape + space,
            summary.si(r["params"]),
            f"{r['gmac']:.2f}",
            r["fid_claimed"] or "",
            r["paper"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quality() -> str:
    """Per data set: the error of each tiny preset at the largest budget it reached, and distances of its samples."""
    parts: list[str] = []
    for name in QUALITY:
        if not (RESULTS / name).exists():
            parts += [
                f"Not measured yet: `python benchmarks/quality.py` writes {name}, whose numbers belong here.",
                "",
            ]
            continue
        found = json.loads((RESULTS / name).read_text())
        last = {
            row["preset"]: row for row in found["rows"]
        }  # rows of a preset come in order of its images
        levels = list(found["rows"][0]["eps_mse"])
        head = [
            "preset",
            "images",
            "GMAC in all",
            *(f"log-SNR {level}" for level in levels),
            *DISTANCES,
        ]
        lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
        for preset, row in last.items():
            errors = [f"{row['eps_mse'][k]:.4f}" for k in levels]
            far = [
                f"{row['distances'][k]:.3g}" if k in row.get("distances", {}) else ""
                for k in DISTANCES
            ]
            cells = [f"`{preset}`", f"{row['images']:,}", f"{row['gmac']:.0f}", *errors, *far]
            lines.append(f"| {' | '.join(cells)} |")
        real = {v for row in last.values() for k, v in row.get("distances", {}).items() if k.endswith("held-out images")
                and k.startswith(DISTANCES[0])}  # fmt: skip
        floor = f" Held-out real images are at {min(real):.3g} ({DISTANCES[0]})." if real else ""
        said = (
            f"Mean squared error of the noise on {found['held_out']}, after training on {found['data']} at "
            f"{found['size']} pixels in batches of {found['batch']} for {found['budget_gmac']:g} GMAC of forward "
            f"passes; distances of samples ({found['samples']}) to {found['reference']}.{floor} "
            f"{found['machine']}; `{name}`."
        )
        parts += [said, "", *lines, ""]
    return "\n".join(parts).rstrip()


def speed() -> str:
    """How many times as fast as plain transcriptions of the published networks, with the machine and the command."""
    found = json.loads(SPEED.read_text())
    lines = [
        "| network | training, float32 | training, bf16 | sampling, float32 | sampling, bf16 |",
        "|---|" + "---:|" * 4,
    ]
    for row in found["rows"]:
        pairs = [
            row[mode][key]
            for mode in ("train", "sample")
            for key in ("float32", "bf16 against bf16 twin")
        ]
        lines.append(
            f"| {row['network']} | " + " | ".join(f"{ratio:.2f}×" for ratio in pairs) + " |"
        )
    said = (
        "Times as fast as a plain transcription of the published network (`benchmarks/plain/`) in the same precision;\n"
        f"{found['processor']}, {found['threads']} thread, torch {found['torch']}, load "
        f"{found['load'][0]:.0f} on {found['cores']} cores, {found['clock']}. Written by\n`{found['command']}`\n"
        "and `python docs/make_tables.py`."
    )
    return "\n".join([said, "", *lines])


def read(name: str) -> dict[str, Any]:
    """A file of benchmarks/results."""
    return json.loads((RESULTS / name).read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown with the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def made(found: dict[str, Any]) -> str:
    """The command and the circumstances of a result."""
    return (
        f"`{found['command']}`: {found['processor']}, {found['threads']} thread, torch {found['torch']}, commit "
        f"{found['commit']}, load {found['load'][0]:.1f} on {found['cores']} cores, {found['clock']}."
    )


def speed_targets() -> str:
    """Every target of a ratio on the CPU beside what was measured and what shared arithmetic leaves room for."""
    found = read("speed-cpu.json")
    targets = {"dimr-2r": 1.5, "dimr-3r": 1.5, "diffit": 1.3}
    rows: list[list[str]] = []
    for row in found["rows"]:
        name = row["network"]
        for mode, words in (("train", "training step"), ("sample", "sampling call")):
            least = targets.get(name) if mode == "train" else 1.5
            for key, precision, target in (
                ("float32", "float32", least),
                ("bf16 against float32 twin", "bf16", 4.0),
            ):
                value, most = row[mode][key], row[mode]["limits"][precision]
                reached = "–" if target is None else "yes" if value >= target else "no"
                aim = "–" if target is None else f"{target:.1f}×"
                rows.append(
                    [name, f"{words}, {precision}", f"{value:.2f}×", f"{most:.2f}×", aim, reached]
                )
    head = [
        "network",
        "against the float32 twin",
        "measured",
        "if all else were free",
        "target",
        "reached",
    ]
    flops = found["ceiling_flops"]
    said = (
        f"{made(found)} The machine's own matrix products ran at {flops['float32'] / 1e9:.0f} (float32) and "
        f"{flops['bf16'] / 1e9:.0f} GFLOP/s (bf16), a ratio of {flops['bf16'] / flops['float32']:.1f}."
    )
    return f"{said}\n\n{table(head, rows)}"


def gpu_targets() -> str:
    """Every target of a GPU beside what `benchmarks/gpu.sh` measured, where it has been run."""
    folder = RESULTS / "gpu"

    def found(name: str) -> list[dict[str, Any]]:
        path = folder / f"{name}.json"
        return json.loads(path.read_text())["rows"] if path.exists() else []

    def best(preset: str, mode: str, key: str) -> float | None:
        values = [
            r[key]
            for r in found("presets")
            if (r["preset"], r["mode"]) == (preset, mode) and key in r
        ]
        return max(values, default=None)

    def latency() -> float | None:
        calls = {r.get("graphs", False): r["latency_seconds"] for r in found("presets")
                 if (r["preset"], r["mode"]) == ("dimr-xl-2r-256", "sample")
                 and "latency_seconds" in r and not r.get("compile", False)}  # fmt: skip
        return calls[False] / calls[True] if len(calls) == 2 else None

    twins = {r["network"]: r["train"]["bf16 against bf16 twin"] for r in found("twins")}
    xl, rate, share = "dimr-xl-2r-256", "images_per_second", "fraction"
    targets: list[tuple[str, float | None, list[float], str]] = [
        ("training DiMR-XL/2R, images per second", best(xl, "train", rate), [290, 370], "{:.0f}"),
        (
            "training DiMR-XL/2R, of the matrix products' rate",
            best(xl, "train", share),
            [0.35, 0.45],
            "{:.0%}",
        ),
        (
            "training DiffiT-256, of that rate",
            best("diffit-256", "train", share),
            [0.35, 0.45],
            "{:.0%}",
        ),
        ("sampling DiMR-XL/2R, of that rate", best(xl, "sample", share), [0.35, 0.45], "{:.0%}"),
        ("training step against the plain twin", twins.get("dimr-2r"), [2.5], "{:.2f}×"),
        ("latency at batch 1, without graphs over with", latency(), [3], "{:.2f}×"),
    ]
    rows = [
        [
            what,
            "not measured" if value is None else shape.format(value),
            ", then ".join(shape.format(aim) for aim in aims),
            "–" if value is None else " / ".join("yes" if value >= aim else "no" for aim in aims),
        ]
        for what, value, aims, shape in targets
    ]
    said = "`OUT=benchmarks/results/gpu bash benchmarks/gpu.sh` on one H200"
    said += (
        "."
        if folder.exists()
        else "; it has not been run yet, since there was no GPU to run it on."
    )
    return f"{said}\n\n{table(['in bf16', 'measured', 'target', 'reached'], rows)}"


def memory() -> str:
    """Peaks of training steps at published sizes beside the twins'."""
    found = read("memory.json")
    names = ["ours", "ours, selective checkpointing", "ours, checkpointing"]
    rows = [
        [
            row["preset"],
            str(row["batch"]),
            row["precision"],
            f"{row['peak_bytes']['plain'] / 2**30:.1f} GiB",
            *(f"{row['ratio'][name]:.2f}×" for name in names),
        ]
        for row in found["rows"]
    ]
    head = ["preset", "batch", "precision", "twin", "none", "selective", "full"]
    return f"`{found['command']}`, torch {found['torch']}, commit {found['commit']}.\n\n{table(head, rows)}"


def depthwise() -> str:
    """The convolution, and its weight gradient in two ways."""
    found = read("depthwise-cpu.json")
    names = list(found["rows"][0]["seconds"])
    rows = [
        [
            " x ".join(map(str, r["shape"])),
            r["dtype"],
            *(f"{1000 * r['seconds'][name]:.1f}" for name in names),
            f"{r['seconds'][names[1]] / r['seconds'][names[2]]:.1f}×",
        ]
        for r in found["rows"]
    ]
    return f"{made(found)}\n\n{table(['images x channels x sides', 'dtype', *(f'{n}, ms' for n in names), 'gain'], rows)}"


def peers() -> str:
    """Milliseconds per GMAC beside diffusers' DiT."""
    found = read("peers-cpu.json")
    names = list(dict.fromkeys(row["network"] for row in found["rows"]))
    kinds = list(dict.fromkeys((row["mode"], row["precision"]) for row in found["rows"]))
    cost = {
        (r["network"], r["mode"], r["precision"]): 1000 * r["seconds_per_gmac"]
        for r in found["rows"]
    }
    peaks = found["peak_bytes_float32"]
    rows = [
        [n, *(f"{cost[n, *k]:.1f}" for k in kinds), f"{peaks[n] / 2**20:.0f} MiB"] for n in names
    ]
    head = [
        "ms per GMAC",
        *(f"{mode}, {precision}" for mode, precision in kinds),
        "peak of a training step",
    ]
    return f"{made(found)}\n\n{table(head, rows)}"


def scaling() -> str:
    """Fitted exponents beside theory's."""
    found = read("scaling-cpu.json")
    rows = [
        [
            r["preset"],
            r["axis"],
            *(f"{r[k]:.2f}" for k in ("exponent_gmac", "exponent_seconds", "exponent_memory")),
        ]
        for r in found["rows"]
    ]
    several = [
        f"`{r['preset']}` under {r['strategy'].upper()}, two gloo processes on a core each with {r['batch per rank']} "
        f"images per step: {r['efficiency']:.0%} of twice the images per second of one."
        for r in found["ranks"]
    ]
    return "\n\n".join(
        [
            made(found),
            table(["preset", "axis", "GMAC", "seconds", "memory"], rows),
            "\n".join(several),
        ]
    )


def switches() -> str:
    """What each choice buys."""
    found = read("switches-cpu.json")
    keys = ["train float32", "train bf16", "sample float32", "sample bf16", "peak float32"]
    rows = [
        [r["family"], r["switch"], *(f"{r[k]:.2f}×" if k in r else "–" for k in keys)]
        for r in found["rows"]
    ]
    return f"{made(found)}\n\n{table(['family', 'the other form', *keys], rows)}"


def loader() -> str:
    """Rates per core, and which presets eight cores feed."""
    found = read("loader-cpu.json")
    rows = [[name, f"{rate:,.0f}"] for name, rate in found["rates_per_core"].items()]
    short = [r["preset"] for r in found["rows"] if not r["outruns"]]
    said = (
        f"{made(found)} At {found['gpu_flops'] / 1e12:.0f} TFLOP/s, which no step reaches, eight such cores outrun "
        f"{len(found['rows']) - len(short)} of {len(found['rows'])} presets; not {', '.join(short)}, whose steps are "
        "bound by launches long before."
    )
    return f"{said}\n\n{table(['source', 'images per second and core'], rows)}"


def distances() -> str:
    """Real images against real images."""
    found = read("distances-cifar10.json")
    near = found["FD-inception-64 of train classes (rows) to test classes"]
    sets = ("inception-64", "inception-768")
    rows = [
        [
            f"FD-{name.capitalize()}",
            f"{found[f'FD-{name} train/test']:.4g}",
            f"{found[f'FD-{name} train halves']:.4g}",
        ]
        for name in sets
    ]
    n = found["images of each"]
    first = table(
        ["distance", f"{n:,} of train to {n:,} of test", f"two halves of {n // 2:,} of train"], rows
    )
    between_classes = table(
        ["FD-Inception-64", *near],
        [[a, *(f"{v:.2f}" for v in row.values())] for a, row in near.items()],
    )
    said = f"Between classes, {n // 10} training images (rows) to as many test images:"
    return f"{first}\n\n{said}\n\n{between_classes}"


def between(text: str, name: str, table: str) -> str:
    """`text` with what stands between the two comments of `name` replaced."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    page = PAGE.read_text()
    for name, shown in (("cost", cost()), ("quality", quality())):
        page = between(page, name, shown)
    PAGE.write_text(page)
    README.write_text(between(README.read_text(), "speed", speed()))
    page = PERFORMANCE.read_text()
    for make in (speed_targets, gpu_targets, memory, depthwise, switches, peers, scaling, loader):
        try:
            shown = make()
        except FileNotFoundError as error:
            name = Path(error.filename).name
            shown = f"Not measured yet: benchmarks/results/{name} is not there."
        page = between(page, make.__name__.replace("_", " "), shown)
    PERFORMANCE.write_text(page)
    EVALUATION.write_text(between(EVALUATION.read_text(), "distances", distances()))
