"""The table of reading images and drawing noise, of benchmarks/loader.py."""

from __future__ import annotations

from table_text import how_measured, markdown_table, read_result

IMAGENET = 1_281_167  # training images


def loader() -> str:
    """Return the loading rates per core, the forms, and which presets 16 cores can feed."""
    result = read_result("loader-cpu.json")
    rows = [[name, f"{rate:,.0f}"] for name, rate in result["rates_per_core"].items()]
    measured = [r for r in result["rows"] if r["outruns"] is not None]
    slow = [f"`{r['preset']}`" for r in measured if not r["outruns"]]
    limited = f"; the others are {', '.join(slow)}" if slow else ""
    unmeasured = len(result["rows"]) - len(measured)
    text = (
        f"{how_measured(result)} By these rates, 16 such cores read for {len(measured) - len(slow)}"
        f" of {len(measured)} presets faster than 8 GPUs train at {result['utilisation']:.0%} of "
        f"{result['gpu_flops'] / 1e12:.0f} TFLOP/s{limited} ({unmeasured} are of other sizes)."
    )
    forms = [
        [
            f"`{r['form']}` {r['size']}",
            f"{r['bytes_per_image'] / 1e3:,.0f}",
            f"{r['bytes_per_image'] * IMAGENET / 1e9:,.0f}",
            f"{r['read_for_a_gpu_per_core']:,.0f}",
            f"{r['prepared_per_core']:,.0f}",
        ]
        for r in result["forms"]
    ]
    head = ["form and size", "kB per image", "GB for ImageNet", "read per core", "written per core"]
    photos = f"Forms of {result['forms'][0]['images']} photographs, images per second:"
    rates = markdown_table(["source", "images per second and core"], rows)
    return f"{text}\n\n{rates}\n\n{photos}\n\n{markdown_table(head, forms)}"
