"""Captions of grids: names in any script, of any length, drawn and told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mezzotint.core.image_grid import MARGIN, class_captions, make_grid, to_drawable


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("café", "café"), ("naïve", "naïve"), ("Ελλάδα", "Ελλάδα"), ("кошка", "кошка"),
        ("日本語", "RiBenYu"), ("한국어", "HanGugEo"), ("हिन्दी", "hindi"), ("a\nb\tc", "a b c"),
        ("\x1b[31mred", "[31mred"), ("caf\udce9", "caf"), ("", ""),
    ],
)  # fmt: skip
def test_what_the_font_lacks_is_transliterated(text, drawn):
    assert to_drawable(text) == drawn


def test_class_captions_tell_classes_apart():
    names = ["cat", "café", "日本語", "日本语", "\udce9"]
    assert class_captions([0, 1, 2, 3, 4, 7], names) == [
        "cat", "café", "2 RiBenYu", "3 RiBenYu", "4", "7",
    ]  # fmt: skip
    assert class_captions([3, 0], None) == ["3", "0"]


def captions_of(names, side=64):
    """The pixels under each image of a grid of one row, as gray (side wide)."""
    images = torch.zeros(len(names), 3, side, side, dtype=torch.uint8)
    grid = make_grid(images, columns=len(names), captions=names, zoom=1).convert("L")
    under = np.asarray(grid)[MARGIN + side :]
    step = side + MARGIN
    return [under[:, MARGIN + i * step : MARGIN + i * step + side] for i in range(len(names))]


def test_names_in_any_script_differ_in_the_grid():
    names = class_captions(range(6), ["ant", "café", "日本語", "中文", "हिन्दी", "ไทย"])
    drawn = captions_of(names)
    assert all((caption < 128).any() for caption in drawn)
    assert all((a != b).any() for i, a in enumerate(drawn) for b in drawn[:i])


def test_long_names_keep_their_beginning_and_end():
    drawn = captions_of(["a long class name number 1", "a long class name number 2"])
    assert (drawn[0] != drawn[1]).any()
    # Nothing runs into the neighbour: the last column of the cell is the gap between letters.
    assert all((caption[:, -1] == 255).all() for caption in drawn)


@pytest.mark.parametrize(
    ("n", "columns"),
    [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (8, 4), (10, 5), (14, 7), (16, 4), (17, 5), (23, 5),
     (26, 6), (30, 6), (32, 8), (50, 10), (64, 8), (100, 10)],
)  # fmt: skip
def test_rows_are_full_where_the_grid_stays_compact(n, columns):
    grid = make_grid(torch.zeros(n, 3, 64, 64, dtype=torch.uint8))
    rows = -(-n // columns)
    assert grid.size == (columns * 66 + MARGIN, rows * 66 + MARGIN)
