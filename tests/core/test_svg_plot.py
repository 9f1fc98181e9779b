"""SVG line plots: gaps, axes, ids, and nothing that a page would have to load."""

from __future__ import annotations

import math
import re

import pytest
from PIL import Image

from mezzotint.core.svg_plot import INK, Line, save_plot, svg_plot


def clip_ids(svg):
    return re.findall(r'<clipPath id="([^"]+)"', svg)


def test_an_svg_element_in_the_colour_of_its_page():
    svg = svg_plot([Line([0, 1], [1.0, 2.0], "a & b")], "u", "loss", marks=[0.5])
    assert svg.startswith('<svg class="plot"')
    assert 'aria-label="loss over u: a &amp; b"' in svg
    assert INK not in svg
    assert "currentColor" in svg
    assert "<metadata>" not in svg


@pytest.mark.parametrize("values", [[1.0, math.nan, 2.0], [math.nan], [0.0], []])
def test_gaps_and_empty_lines_from_zero(values):
    assert "<svg" in svg_plot([Line(list(range(len(values))), values)], "x", "y", from_zero=True)


def test_the_same_plot_is_the_same_text():
    line = Line([0, 1], [1.0, 2.0])
    assert svg_plot([line], "x", "y") == svg_plot([line], "x", "y")


def test_plots_of_one_page_share_no_ids():
    line = Line([0, 1], [1.0, 2.0])
    assert not set(clip_ids(svg_plot([line], "x", "a"))) & set(clip_ids(svg_plot([line], "x", "b")))


def test_thousands_are_abbreviated_on_the_x_axis():
    svg = svg_plot([Line([0, 50_000, 100_000], [1.0, 2.0, 3.0])], "images", "loss")
    assert ">100k<" in re.sub(r"\s", "", svg)


def test_categories_on_the_x_axis():
    svg = svg_plot([Line(["low", "high"], [1.0, 2.0])], "bin", "loss", log_y=True)
    assert ">low<" in svg
    assert ">high<" in svg


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_plot_of_its_own_is_dark_on_white(kind, tmp_path):
    file = tmp_path / f"plot.{kind}"
    save_plot(file, [Line([0, 1], [1.0, 2.0], labels=["low", "high"])], "u", "loss")
    if kind == "svg":
        text = file.read_text()
        assert "currentColor" not in text
        assert all(f">{word}<" in text for word in ("low", "high", "u", "loss"))
    else:
        with Image.open(file) as image:
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
