"""The notebooks of examples/: stripped of outputs, and every cell runs, in order, with short settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mezzotint.process.samplers import registry

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def cells(path):
    """The source of each code cell; a shell line (!) has no place in a notebook that a test runs."""
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    return ["".join(cell["source"]) for cell in code]


def test_there_are_four():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEZZOTINT_IMAGES", "64")
    monkeypatch.delenv("MEZZOTINT_FOLDER", raising=False)
    monkeypatch.setattr(
        registry, "_entries", dict(registry), raising=True
    )  # what a notebook registers goes with it
    names = {"__name__": "__main__"}
    for i, text in enumerate(cells(path)):
        exec(compile(text, f"{path.name}, cell {i}", "exec"), names)
