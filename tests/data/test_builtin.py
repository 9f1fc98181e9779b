"""The built-in digits: scikit-learn's, read without importing it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mezzotint.data.builtin import open_digits


def test_the_digits_are_those_of_scikit_learn():
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    ours = open_digits("all")
    assert np.array_equal(ours.labels, theirs.target)
    assert np.array_equal(np.round(ours.pixels * (16 / 255)), theirs.images)
    parts = open_digits("train"), open_digits("test")
    assert [len(part) for part in parts] == [1500, 297]
    assert sorted(np.concatenate([part.numbers for part in parts])) == list(range(1797))
    for part in parts:
        assert np.array_equal(part.labels, theirs.target[part.numbers])


def test_they_are_read_without_importing_it():
    code = "import sys; from mezzotint.data import builtin; builtin.open_digits(); "
    code += "assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_without_scikit_learn_the_error_says_what_to_install(split, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"pip install 'mezzotint\[demo\]'"):
        open_digits(split)
