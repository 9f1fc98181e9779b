"""Tables keep their numbers where nobody looks at a terminal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mezzotint.core.console import PIPE_COLUMNS, open_console
from mezzotint.tools import summary


@pytest.mark.parametrize(("columns", "width"), [(None, PIPE_COLUMNS), ("60", 60), ("300", 300)])
def test_the_width_of_a_pipe_is_columns_or_ours(monkeypatch, columns, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert open_console().width == width


def test_a_piped_table_cuts_no_number(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    command = [sys.executable, "-m", "mezzotint", "info"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "…" not in printed
    for row in summary.read_summaries():
        line = next(line for line in printed.splitlines() if f" {row['name']} " in line)
        assert f"{row['gmac']:.3f}" in line
