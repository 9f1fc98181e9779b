"""The table of bits per dimension."""

from __future__ import annotations

from table_text import how_measured, markdown_table, read_result

TERMS = ("reconstruction", "prior", "diffusion")


def bits_per_dimension() -> str:
    """Return one row per model: the bound with its standard error, and its three terms."""
    result = read_result("likelihood-cifar10.json")
    rows = []
    for row in result["rows"]:
        found = {number["metric"]: number for number in row["numbers"]}
        bound = found["bits/dim"]
        start = [f"`{row['preset']}`", f"{row['images']:,}"]
        size = f"{row['params'] / 1e6:.1f} M"
        value = f"{bound['value']:.3f} ± {bound['error']:.3f}"
        terms = [f"{found[f'bits/dim of {term}']['value']:.4f}" for term in TERMS]
        rows.append([*start, size, value, *terms])
    first = result["rows"][0]
    settings, protocol = first["numbers"][0]["settings"], first["protocol"]
    low, high = settings["logsnr"]
    text = (
        f"{protocol['num_images']} images of {result['data']}, log-SNR {low:g} to {high:g}, "
        f"{settings['draws']} noise levels for each image, the model is given the "
        f"{settings['condition']}; ± is one standard error over images. The same images as PNG "
        f"files take {result['png']:.2f} bits per dimension. {how_measured(result)}"
    )
    head = ["preset", "images seen", "parameters", "bits/dim", *TERMS]
    return f"{text}\n\n{markdown_table(head, rows)}"
