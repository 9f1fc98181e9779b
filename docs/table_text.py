"""What the tables share: results by name, Markdown, and how a result was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read_result(name: str) -> dict[str, Any]:
    """Read one file of benchmarks/results."""
    return json.loads((RESULTS / name).read_text())


def markdown_table(head: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """Return a Markdown table: the first `left` columns left-aligned, the others right-aligned."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *rows])


def how_measured(result: dict[str, Any]) -> str:
    """Return one sentence with the command, the machine and the commit of a result."""
    return (
        f"`{result['command']}`: {result['processor']}, {result['threads']} thread, "
        f"torch {result['torch']}, commit {result['commit']}, load {result['load'][0]:.1f} "
        f"on {result['cores']} cores, {result['clock']}."
    )


def ratio(value: float) -> str:
    """Format a ratio: 1.28×."""
    return f"{value:.2f}×"
