"""The notebooks of examples/ have no outputs, and their cells run in order with short settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mezzotint.process.samplers import registry

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def read_code_cells(path):
    """Return the source of each code cell; check that it holds no outputs."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    return ["".join(cell["source"]) for cell in cells]


def test_there_are_four_notebooks():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEZZOTINT_IMAGES", "64")
    monkeypatch.delenv("MEZZOTINT_FOLDER", raising=False)
    # Samplers that a notebook registers are removed afterwards.
    monkeypatch.setattr(registry, "_entries", dict(registry), raising=True)
    names = {"__name__": "__main__"}
    for i, text in enumerate(read_code_cells(path)):
        exec(compile(text, f"{path.name}, cell {i}", "exec"), names)
