"""Write the tables of README.md, docs/ and benchmarks/targets.md: `python docs/make_tables.py`.

It also writes `src/mezzotint/tools/time_to_quality.json`, which `mezzotint train auto` reads. The
numbers come from the library's own counts and from benchmarks/results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mezzotint.models import create_model
from mezzotint.recipes import recipe_for
from mezzotint.tools import measurements, summary
from mezzotint.tools.step_times import TABLE as STEP_TIMES

# Tests run this file by its path, which does not put its folder there.
sys.path.append(str(Path(__file__).parent))
from core_minutes_table import DISTANCES, QUALITY, core_minutes, mean_error, time_to_quality
from few_steps_table import few_steps
from gpu_table import gpu_targets
from likelihood_table import bits_per_dimension
from loader_table import loader
from prediction_table import prediction_patches
from shards_table import shard_order, shard_readers
from step_model_table import step_model, step_times
from table_text import (
    ROOT,
    how_measured,
    markdown_table,
    ratio,
    read_result,
)


def cost() -> str:
    """Return one row per preset: parameters, multiply-accumulates and the paper's FID."""
    rows = []
    for r in summary.read_summaries():
        shape = "x".join(map(str, [*r["input_shape"][1:], r["input_shape"][0]]))
        codec = "" if r["codec"] == "pixels" else f", {r['codec']}"
        params, gmac = summary.format_count(r["params"]), f"{r['gmac']:.2f}"
        fid = r["fid_claimed"] or ""
        rows.append([f"`{r['name']}`", shape + codec, params, gmac, fid, r["paper"]])
    head = ["preset", "input", "parameters", "GMAC", "FID in the paper", "source"]
    return markdown_table(head, rows, left=2).replace("---: |\n", "--- |\n", 1)


def sizes() -> str:
    """Return one row per `-mini`, `-small` and `-base` preset: its cost as trained, its recipe."""
    rows = []
    for r in summary.read_summaries():
        if r["name"].endswith(("-mini", "-small", "-base")):
            recipe = recipe_for(r["name"])
            with torch.device("meta"):
                network = create_model(r["name"], **recipe.model)
            params = summary.format_count(sum(p.numel() for p in network.parameters()))
            cells = [f"`{r['name']}`", params, f"{r['gmac']:.1f}"]
            rows.append([*cells, f"{recipe.optim.lr:.2g}", f"{recipe.batch}", f"{recipe.images:,}"])
    head = ["preset", "parameters", "GMAC at 64 pixels", "learning rate", "batch", "images"]
    return markdown_table(head, rows)


def width_transfer() -> str:
    """Return the error at every rate, mean and half range over the seeds, and the best rate."""
    result = read_result("width-transfer.json")
    rates = sorted({r["rate"] for r in result["rows"]})

    def spread(errors: list[float]) -> str:
        if not errors:
            return "–"
        half = f" ± {(max(errors) - min(errors)) / 2:.3f}" if len(errors) > 1 else ""
        return f"{fmean(errors):.3f}{half}"

    rows = []
    for best in result["best"]:
        key = {k: best[k] for k in ("preset", "width")}.items()
        errors: dict[float, list[float]] = {rate: [] for rate in rates}
        for r in result["rows"]:
            if key <= r.items():
                errors[r["rate"]].append(r["error"])
        lowest = min((rate for rate in rates if errors[rate]), key=lambda r: fmean(errors[r]))
        rate = f"{best['rate']:.2g}" if best["rate"] else f"{lowest:g}, an end of the grid"
        cells = [f"`{best['preset']}`", str(best["width"]), rate]
        rows.append([*cells, *(spread(errors[rate]) for rate in rates)])
    seeds = len({r.get("seed", 0) for r in result["rows"]})
    seeded = f"; mean and half range of {seeds} seeds" if seeds > 1 else ""
    head = ["preset", "width", "best rate", *(f"error at {rate:g}" for rate in rates)]
    text = (
        f"Mean squared error of the predicted noise on {result['held_out']}, after "
        f"{result['images']:,} images of {result['data']} at {result['size']} pixels, batch "
        f"{result['batch']}{seeded}. Rates are those at width 16; at width w the rate is 16 / w "
        f"of it. {how_measured(result)}"
    )
    return f"{text}\n\n{markdown_table(head, rows)}"


def quality() -> str:
    """Return one table per dataset: errors of the tiny presets and distances of their samples."""
    return "\n\n".join(quality_of(name) for name in QUALITY)


def quality_of(name: str) -> str:
    """Return the table of one result: the last row of each preset, which has its largest budget."""
    result = read_result(name)
    last = {row["preset"]: row for row in result["rows"]}
    levels = list(result["rows"][0]["eps_mse"])
    rows = []
    for preset, row in last.items():
        errors = [f"{row['eps_mse'][level]:.4f}" for level in levels]
        distances = row.get("distances", {})
        far = [f"{distances[key]:.3g}" if key in distances else "" for key in DISTANCES]
        budget = [f"{row['images']:,}", f"{row['gmac']:.0f}"]
        rows.append([f"`{preset}`", *budget, *errors, *far])
    head = ["preset", "images", "GMAC in all", *(f"log-SNR {x}" for x in levels), *DISTANCES]
    real = {
        value
        for row in last.values()
        for key, value in row.get("distances", {}).items()
        if key.startswith(DISTANCES[0]) and key.endswith("held-out images")
    }
    floor = f" Held-out real images are at {min(real):.3g} ({DISTANCES[0]})." if real else ""
    text = (
        f"Mean squared error of the predicted noise on {result['held_out']}, after training on "
        f"{result['data']} at {result['size']} pixels with batch {result['batch']} for "
        f"{result['budget_gmac']:g} GMAC of forward passes. Distances compare samples "
        f"({result['samples']}) with {result['reference']}.{floor} "
        f"{result['machine']}; `{name}`."
    )
    return f"{text}\n\n{markdown_table(head, rows)}"


def speed() -> str:
    """Return the speed relative to the plain networks, in the same precision."""
    result = read_result("speed-cpu.json")
    keys = ("float32", "bf16 against bf16 twin")
    rows = [
        [row["network"], *(ratio(row[mode][key]) for mode in ("train", "sample") for key in keys)]
        for row in result["rows"]
    ]
    head = ["network", "training, float32", "training, bf16", "sampling, float32", "sampling, bf16"]
    text = (
        "Speed relative to a plain transcription of the published network (`benchmarks/plain/`) in "
        f"the same precision, on a CPU:\n{result['processor']}, {result['threads']} thread, "
        f"torch {result['torch']}, load {result['load'][0]:.0f} on {result['cores']} cores, "
        f"{result['clock']}. Written by\n`{result['command']}`\n"
        "and `python docs/make_tables.py`."
    )
    return f"{text}\n\n{markdown_table(head, rows)}"


def cpu_ratios(result: dict[str, Any]) -> list[tuple[str, str, float, float, float | None]]:
    """Return (network, what, measured, upper bound, target) for the rows of the CPU result."""
    training_targets = {"dimr-2r": 1.5, "dimr-3r": 1.5, "diffit": 1.3}
    rows: list[tuple[str, str, float, float, float | None]] = []
    for row in result["rows"]:
        network = row["network"]
        for mode, name in (("train", "training step"), ("sample", "sampling call")):
            times, target = row[mode], training_targets.get(network) if mode == "train" else 1.5
            bounds = times["limits"]
            rows.append((network, f"{name}, float32", times["float32"], bounds["float32"], target))
            bf16 = times["bf16 against float32 twin"]
            rows.append((network, f"{name}, bf16", bf16, bounds["bf16"], 4.0))
    return rows


def speed_ratios() -> str:
    """Return the measured CPU ratios with their upper bounds."""
    result = read_result("speed-cpu.json")
    rows = [[n, what, ratio(value), ratio(most)] for n, what, value, most, _ in cpu_ratios(result)]
    head = ["network", "compared with the plain network in float32", "measured", "upper bound"]
    float32, bf16 = result["ceiling_flops"]["float32"], result["ceiling_flops"]["bf16"]
    rates = (
        f"The machine's own matrix products ran at {float32 / 1e9:.0f} GFLOP/s in float32 and "
        f"{bf16 / 1e9:.0f} GFLOP/s in bf16, a ratio of {bf16 / float32:.1f}."
    )
    return f"{how_measured(result)} {rates}\n\n{markdown_table(head, rows, left=2)}"


def speed_targets() -> str:
    """Return the measured CPU ratios with their targets."""
    result = read_result("speed-cpu.json")
    rows = []
    for network, what, value, most, target in cpu_ratios(result):
        aim = ["–", "–"] if target is None else [ratio(target), "yes" if value >= target else "no"]
        rows.append([network, what, ratio(value), ratio(most), *aim])
    head = ["network", "what", "measured", "upper bound", "target", "reached"]
    return f"{how_measured(result)}\n\n{markdown_table(head, rows, left=2)}"


def memory() -> str:
    """Return the peaks of training steps at published sizes, relative to the plain networks'."""
    result = read_result("memory.json")
    kinds = ["ours", "ours, selective checkpointing", "ours, checkpointing"]
    rows = []
    for row in result["rows"]:
        plain = f"{row['peak_bytes']['plain'] / 2**30:.1f} GiB"
        relative = [ratio(row["ratio"][kind]) for kind in kinds]
        rows.append([row["preset"], str(row["batch"]), row["precision"], plain, *relative])
    head = ["preset", "batch", "precision", "plain network", "none", "selective", "full"]
    source = f"`{result['command']}`, torch {result['torch']}, commit {result['commit']}."
    return f"{source} Columns 5 to 7 are `engine.checkpointing`.\n\n{markdown_table(head, rows)}"


def depthwise() -> str:
    """Return the times of the convolution and of its weight gradient in two ways."""
    result = read_result("depthwise-cpu.json")
    names = list(result["rows"][0]["seconds"])
    rows = []
    for r in result["rows"]:
        seconds = [r["seconds"][name] for name in names]
        times = [f"{1000 * s:.1f}" for s in seconds]
        gain = f"{seconds[1] / seconds[2]:.1f}×"
        rows.append([" x ".join(map(str, r["shape"])), r["dtype"], *times, gain])
    head = ["images x channels x height x width", "dtype", *(f"{n}, ms" for n in names), "gain"]
    return f"{how_measured(result)}\n\n{markdown_table(head, rows)}"


def peers() -> str:
    """Return milliseconds per GMAC, compared with diffusers' DiT."""
    result = read_result("peers-cpu.json")
    networks = list(dict.fromkeys(row["network"] for row in result["rows"]))
    kinds = list(dict.fromkeys((row["mode"], row["precision"]) for row in result["rows"]))
    milliseconds = {
        (r["network"], r["mode"], r["precision"]): 1000 * r["seconds_per_gmac"]
        for r in result["rows"]
    }
    peaks = result["peak_bytes_float32"]
    rows = [
        [n, *(f"{milliseconds[n, *k]:.1f}" for k in kinds), f"{peaks[n] / 2**20:.0f} MiB"]
        for n in networks
    ]
    columns = [f"{mode}, {precision}" for mode, precision in kinds]
    head = ["ms per GMAC", *columns, "peak of a training step"]
    return f"{how_measured(result)}\n\n{markdown_table(head, rows)}"


def scaling() -> str:
    """Return fitted exponents, and the efficiency of two processes."""
    result = read_result("scaling-cpu.json")
    keys = ("exponent_gmac", "exponent_seconds", "exponent_memory")
    rows = [[r["preset"], r["axis"], *(f"{r[key]:.2f}" for key in keys)] for r in result["rows"]]
    several = [
        f"`{r['preset']}` with {r['strategy'].upper()} on two gloo processes, one core each and "
        f"{r['batch per rank']} images per step: {r['efficiency']:.0%} of twice the speed of one."
        for r in result["ranks"]
    ]
    table = markdown_table(["preset", "axis", "GMAC", "seconds", "memory"], rows, left=2)
    return "\n\n".join([how_measured(result), table, "\n".join(several)])


def switches() -> str:
    """Return the effect of each optimisation."""
    result = read_result("switches-cpu.json")
    keys = ["train float32", "train bf16", "sample float32", "sample bf16", "peak float32"]
    rows = [
        [r["family"], r["switch"], *(ratio(r[key]) if key in r else "–" for key in keys)]
        for r in result["rows"]
    ]
    table = markdown_table(["family", "alternative", *keys], rows, left=2)
    return f"{how_measured(result)}\n\n{table}"


def distances() -> str:
    """Return the distances between real images."""
    result = read_result("distances-cifar10.json")
    count = result["images of each"]
    rows = [
        [
            f"FD-{name.capitalize()}",
            f"{result[f'FD-{name} train/test']:.4g}",
            f"{result[f'FD-{name} train halves']:.4g}",
        ]
        for name in ("inception-64", "inception-768")
    ]
    halves = f"two halves of {count // 2:,} of train"
    first = markdown_table(["distance", f"{count:,} of train to {count:,} of test", halves], rows)
    near = result["FD-inception-64 of train classes (rows) to test classes"]
    classes = [[name, *(f"{v:.2f}" for v in row.values())] for name, row in near.items()]
    second = markdown_table(["FD-Inception-64", *near], classes)
    text = f"Between classes, {count // 10} training images (rows) to as many test images:"
    return f"{first}\n\n{text}\n\n{second}"


def choices() -> str:
    """Return one row per change of a tiny recipe, lowest error after equal minutes first."""
    result = read_result("choices-eurosat.json")
    rows = []
    for row in sorted(result["rows"], key=lambda r: mean_error(r["equal_minutes"])):
        last = row["equal_minutes"]
        speed = last["images"] / last["minutes"] / 60
        work = f"{mean_error(row['equal_gmac']):.4f}" if "equal_gmac" in row else "–"
        errors = [f"{error:.2g}" for error in last["eps_mse"].values()]
        fields = " ".join(f"`{field}`" for field in row["fields"])
        cells = [f"`{row['preset']}`", row["change"], fields, f"{speed:.1f}", work]
        rows.append([*cells, f"{mean_error(last):.4f}", *errors])
    levels = [f"log-SNR {level}" for level in result["rows"][0]["equal_minutes"]["eps_mse"]]
    head = ["preset", "change", "fields", "images/s", f"mean after {result['gmac']:g} GMAC"]
    table = markdown_table([*head, f"mean after {result['minutes']:g} min", *levels], rows, left=3)
    loads = [row["load"][0] for row in result["rows"]]
    text = (
        f"`python benchmarks/choices.py --source eurosat64.zip --minutes {result['minutes']:g} "
        f"--gmac {result['gmac']:g}`, in pieces: {result['rows'][-1]['processor']}, 1 thread, "
        f"torch {result['rows'][-1]['torch']}, commits "
        f"{', '.join(sorted({row['commit'] for row in result['rows']}))}, load {min(loads):.1f} to "
        f"{max(loads):.1f} on 2 cores, processor time of one thread."
    )
    return f"{text}\n\n{table}"


def training_choices() -> str:
    """Return one table per dataset: choices that leave the speed as it is, after equal images."""
    parts = []
    for data, source in (("cifar10", "cifar10_jpg.npz"), ("eurosat", "eurosat64.zip")):
        rows = []
        found = read_result(f"training-choices-{data}.json")["rows"]
        for row in found:
            fields = " ".join(f"`{field}`" for field in row["fields"])
            errors = [f"{error:.2g}" for error in row["eps_mse"].values()]
            metrics = row["distances"]
            cells = [f"`{row['preset']}`", row["change"], fields, f"{row['images']:,}"]
            cells += [f"{mean_error(row):.4f}", *errors]
            null = row.get("eps_mse_without_label")
            cells.append(f"{100 * (null['0'] / row['eps_mse']['0'] - 1):.1f} %" if null else "–")
            rows.append(
                [
                    *cells,
                    f"{metrics['FD-EfficientNet-Lite0']:.0f}",
                    f"{metrics['coverage (efficientnet-lite0)']:.2f}",
                ]
            )
        levels = [f"log-SNR {level}" for level in found[0]["eps_mse"]]
        head = ["preset", "change", "fields", "images", "mean", *levels, "without label"]
        parts.append(
            f"`python benchmarks/training_choices.py {data} --source {source}`:\n\n"
            + markdown_table([*head, "FD-EfficientNet-Lite0", "coverage"], rows, left=3)
        )
    return "\n\n".join(parts)


def replace_between(text: str, name: str, table: str) -> str:
    """Return `text` with `table` between the two comments of `name`."""
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n\n{end}{rest.split(end)[1]}"


TABLES: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (speed,),
    "docs/backbones.md": (
        sizes,
        width_transfer,
        cost,
        quality,
        choices,
        training_choices,
        core_minutes,
        prediction_patches,
    ),
    "docs/evaluation.md": (bits_per_dimension, distances),
    "docs/few-steps.md": (few_steps,),
    "docs/performance.md": (
        step_model,
        speed_ratios,
        memory,
        depthwise,
        switches,
        peers,
        scaling,
        loader,
    ),
    "docs/shards.md": (shard_readers, shard_order),
    "benchmarks/targets.md": (speed_targets, gpu_targets),
}


def main() -> None:
    """Write every table into its page."""
    for name, tables in TABLES.items():
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        for table in tables:
            try:
                content = table()
            except FileNotFoundError as error:
                missing = Path(error.filename).name
                content = f"Not measured yet: benchmarks/results/{missing} is absent."
            text = replace_between(text, table.__name__.replace("_", " "), content)
        page.write_text(text, encoding="utf-8")
    for table, content in ((measurements.TABLE, time_to_quality()), (STEP_TIMES, step_times())):
        table.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
