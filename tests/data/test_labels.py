"""Labels of any kind become classes where that is plain, and are refused in words elsewhere."""

from __future__ import annotations

import datetime
import tracemalloc

import numpy as np
import pytest

from mezzotint.data.labels import find_class, read_labels, sort_classes

NONE = -1


@pytest.mark.parametrize(
    ("cells", "indices", "names"),
    [
        ([0, 1, 2], [0, 1, 2], ("0", "1", "2")),
        ([0, 3, 1, 0], [0, 3, 1, 0], ("0", "1", "2", "3")),  # 2 has no image in this split
        ([1, 2, 3], [0, 1, 2], ("1", "2", "3")),
        ([10, 2, 10], [1, 0, 1], ("2", "10")),
        ([2**40, 2**70, 2**40], [0, 1, 0], (str(2**40), str(2**70))),
        (["10", "2", "1"], [2, 1, 0], ("1", "2", "10")),
        (["1.0", "nan", "0.0", ""], [1, NONE, 0, NONE], ("0", "1")),
        (["007", "7", "10"], [0, 1, 2], ("007", "7", "10")),
        (["dog", None, "cat", " "], [1, NONE, 0, NONE], ("cat", "dog")),
        (["none", "glioma"], [1, 0], ("glioma", "none")),
        ([b"b", b"a"], [1, 0], ("a", "b")),
        ([0.0, float("nan"), 1.0], [0, NONE, 1], ("0", "1")),
        ([0.5, 1.5, 0.5, 1.5], [0, 1, 0, 1], ("0.5", "1.5")),
        ([True, False, None], [1, 0, NONE], ("false", "true")),
        ([-1, 0, 1], [NONE, 0, 1], ("0", "1")),
        ([[1], [0], []], [1, 0, NONE], ("0", "1")),
        ([["b"], ["a"], None], [1, 0, NONE], ("a", "b")),
        ([[0, 0, 1], [1, 0, 0], [0, 0, 0], None], [2, 0, NONE, NONE], ("0", "1", "2")),
        ([datetime.date(2024, 1, 2)] * 2, [0, 0], ("2024-01-02",)),
        (np.eye(3), [0, 1, 2], ("0", "1", "2")),
        (np.array([[1], [0]], np.uint8), [1, 0], ("0", "1")),
        (np.array([1.0, np.nan, 0.0]), [1, NONE, 0], ("0", "1")),
        (np.array([True, False]), [1, 0], ("false", "true")),
        (np.array(["y", "x"]), [1, 0], ("x", "y")),
        (np.array([2**63, 2**63 + 1], np.uint64), [0, 1], (str(2**63), str(2**63 + 1))),
    ],
)
def test_values_become_classes(cells, indices, names):
    found = read_labels(cells, len(cells), "the labels")
    assert found is not None
    assert found.indices.tolist() == indices
    assert found.indices.dtype == np.int64
    assert found.names == names


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ([0.1, 0.2, 0.7], "3 different values in 3 images, first '0.1': these are no classes"),
        (["0.1", "0.2"], "no classes"),
        (list(range(5000)), "5,000 different values in 5,000 images"),
        ([f"sentence {i}" for i in range(3000)], "first 'sentence 0'"),
        ([-5, 1], "the negative label -5"),
        ([float("inf"), 0.0], "holds inf"),
        ([[1, 1], [0, 1]], r"lists that are no classes, first \[1, 1\]"),
        ([[0.2, 0.8], [1.0, 0.0]], "lists that are no classes"),
        ([[0, 1], [0, 1, 0]], "lists that are no classes"),
        ([["a", "b"], ["c"]], "lists that are no classes"),
        ([{"a": 1}], "a dict, which is no class"),
        ([b"\xff\xfe"], "bytes that are no text"),
        (np.zeros((2, 2, 2)), r"float64 \(2, 2, 2\)"),
        (np.zeros(2, np.complex64), "complex64"),
        (np.array(5), r"\(\)"),
    ],
)
def test_values_that_are_no_classes_are_refused(cells, words):
    with pytest.raises(ValueError, match=words):
        read_labels(
            cells,
            1 if isinstance(cells, np.ndarray) and not cells.ndim else len(cells),
            "the labels",
        )


def test_no_label_at_all_and_another_number_of_labels():
    for cells in ([None, None], [-1, -1], ["", " "], np.array([np.nan]), []):
        assert read_labels(cells, len(cells), "the labels") is None
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"2 labels for {count} images"):
            read_labels([0, 1], count, "the labels")


def test_declared_classes_are_found_by_name_and_by_number():
    found = read_labels(["7", "1", 0, None, -1, 2.0], 6, "the labels", ["5", "7", "9"])
    assert found is not None
    assert found.indices.tolist() == [1, 1, 0, NONE, NONE, 2]
    for cell in (3, "3", "lion", -2, 0.5):
        with pytest.raises(ValueError, match=f"label {cell} but only 3 classes"):
            read_labels([cell], 1, "the labels", ["5", "7", "9"])


def test_memory_does_not_grow_with_the_value_of_a_label():
    tracemalloc.start()
    try:
        for cells in ([0, 10**9], [0, 2**62], ["9" * 90, "0"], np.array([0, 2**62])):
            assert len(read_labels(cells, 2, "the labels").names) == 2  # type: ignore[union-attr]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_classes_named_by_numbers_are_in_numeric_order():
    assert sort_classes(["10", "9", "1", "-2", "1.5"]) == ("-2", "1", "1.5", "9", "10")
    assert sort_classes(["b", "a10", "a2", "10", "9"]) == ("10", "9", "a10", "a2", "b")


def test_a_name_comes_before_an_index():
    assert find_class("2", ("10", "9", "2")) == 2
    assert [find_class(label, ("ant", "bee")) for label in ("bee", "0", "5")] == [1, 0, 5]
    assert find_class("7", tuple("01234")) == 7  # more classes than names
    assert find_class("3", None) == 3
    for label, names in [
        ("0", ("1", "2", "3")),
        ("be", ("ant", "bee")),
        ("²", ("ant",)),
        ("9" * 5000, ()),
        ("-1", ("ant",)),
    ]:
        with pytest.raises(ValueError, match="unknown label"):
            find_class(label, names)
