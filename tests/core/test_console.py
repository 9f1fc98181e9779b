"""Tables keep their numbers in a pipe; text is never markup; printing never ends the work."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest
from rich.table import Table

from mezzotint.core.console import PIPE_COLUMNS, EscapingConsole, echo, open_console
from mezzotint.core.progress import ProgressBar
from mezzotint.core.text import escape_controls
from mezzotint.tools import summary
from mezzotint.train.progress import ProgressDisplay


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


MARKUP = "evaluate.features=[inception-2048] [/data]/d [red]x[/red] :dog: \\[b]"


def printed_table(capsys, *cells):
    table = Table("name", *cells, title=cells[0])
    table.add_row("row", *cells)
    open_console().print(table)
    return capsys.readouterr().out


def test_text_is_never_markup(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert printed_table(capsys, MARKUP).count(MARKUP) == 3
    open_console().print(MARKUP, style="red")
    echo(MARKUP)
    assert capsys.readouterr().out.splitlines() == [MARKUP, MARKUP]
    display = ProgressDisplay(show=True)
    display.print_line(MARKUP)
    display.print_event({"event": "[b]", "images": 1, "why": MARKUP})
    ProgressBar(MARKUP, 10).update(5, MARKUP, line=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == [MARKUP, f"[b] at 1 images: why {MARKUP}"]
    assert lines[2].count(MARKUP) == 2


@pytest.mark.parametrize("evil", ["\x1b]0;owned\x07", "\x9b31m", "\u202egnp", "\x08\x08"])
def test_text_never_reaches_the_terminal_raw(capsys, evil):
    shown = escape_controls(evil)
    assert printed_table(capsys, evil).count(shown) == 3
    open_console().print(evil)
    echo("a", evil)
    echo(evil, stderr=True)
    ProgressDisplay(show=True).print_line(evil)
    ProgressBar(evil, 10).update(5, evil, line=True)
    out, err = capsys.readouterr()
    assert evil not in out + err
    assert out.count(shown) == 2
    assert err.count(shown) == 4


def test_a_bar_on_a_terminal_shows_names_as_they_are(monkeypatch):
    file = io.StringIO()
    console = EscapingConsole(file=file, force_terminal=True, width=300, markup=False)
    with ProgressBar(f"{MARKUP}\x1b]0;", 10, console=console) as bar:
        bar.update(5, "[/b]\x07")
    assert MARKUP in file.getvalue()
    assert "[/b]\\x07" in file.getvalue()
    assert "\x1b]0;" not in file.getvalue()
    assert "\x07" not in file.getvalue()


# Each prints from everything that training and the commands print with, then leaves a file.
PRINTS = """
import sys, warnings
from pathlib import Path
import mezzotint.core.console as console
from mezzotint.core.progress import ProgressBar
from mezzotint.train.progress import ProgressDisplay
if sys.argv[2] == "command":
    console.protect_output()
for _ in range(3):
    display = ProgressDisplay(show=True)
    display.start(100, 0)
    for i in range(50):  # more than the buffer holds
        display.print_line("a line of \\u732b " + "x" * 50)
        display.update(i, {"loss": 1.0})
    display.print_event({"event": "spike", "images": 1, "why": "\\udcff"})
    display.close()
    for i in range(50):
        console.echo("\\u732b" * 30)
        console.open_console().print("\\u732b" * 30)
    warnings.warn("printed on standard error")
open(sys.argv[1], "w").write("done")
if sys.argv[2] == "command":
    console.finish_output()
"""
ENVIRONMENTS = {
    "utf-8": {},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "latin": {"PYTHONIOENCODING": "latin-1:strict"},
}


@pytest.mark.parametrize(
    ("redirection", "where", "environment"),
    [
        ("2>&1 | head -1", "command", "C"),
        ("2>&1 | head -1", "python", "latin"),
        ("> full 2>&1", "command", "latin"),
        ("> full 2>&1", "python", "utf-8"),
        (">&- 2>&-", "command", "utf-8"),
        ("2>&-", "python", "C"),
    ],
)
def test_telling_never_ends_the_work(tmp_path, redirection, environment, where):
    # A file that may not grow is a full disk.
    command = f'ulimit -f 2; trap "" XFSZ; "$0" -c "$1" done {where} {redirection}'
    shell = ["bash", "-c", command, sys.executable, PRINTS]
    subprocess.run(
        shell, cwd=tmp_path, env={**os.environ, **ENVIRONMENTS[environment]}, check=False,
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "done").read_text() == "done"


def test_a_dead_terminal_ends_nothing(tmp_path):
    parent, child = pty.openpty()
    command = [sys.executable, "-c", PRINTS, str(tmp_path / "done"), "command"]
    process = subprocess.Popen(command, stdout=child, stderr=child)
    os.close(child)
    os.read(parent, 100)
    os.close(parent)  # every further write fails with EIO
    assert process.wait(60) == 0
    assert (tmp_path / "done").read_text() == "done"


def test_what_is_printed_never_lands_in_a_file(tmp_path):
    script = (
        "import sys; from mezzotint.core.console import *; protect_output()\n"
        "file = open('mine', 'w'); print('out'); print('err', file=sys.stderr); echo('both')\n"
        "import os; os.write(1, b'from C'); os.write(2, b'from C'); file.close(); finish_output()"
    )
    subprocess.run(
        ["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, script],
        cwd=tmp_path, check=True,
    )  # fmt: skip
    assert (tmp_path / "mine").read_text() == ""
