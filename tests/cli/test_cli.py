"""The command line: help fits a screen, answers come at once, errors name what is allowed."""

import os
import resource
import subprocess
import sys

import pytest

from mezzotint import __version__, cli

ROWS, COLUMNS = 45, 100
# Runs a command, then lists on stderr which heavy packages it imported.
PROBE = """
import sys
from mezzotint import cli
sys.argv = ["mezzotint", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
packages = {name.partition(".")[0] for name in sys.modules}
heavy = {"torch", "numpy", "matplotlib", "datasets", "PIL", "gradio", "yaml", "safetensors"}
print(*sorted(heavy & packages), file=sys.stderr)
"""


def run_python(*args):
    environment = {**os.environ, "COLUMNS": str(COLUMNS)}
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=environment, check=False
    )


def children_seconds():
    """Return the processor time of finished child processes, which other jobs do not change."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "info",
        "info unet-tiny",
        "info --json",
        "plan --help",
        "train --help",
        "sample --help",
        "evaluate --help",
    ],
)
def test_answers_at_once_without_torch(command):
    start = children_seconds()
    done = run_python("-c", PROBE, *command.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr.strip() == ""
    assert children_seconds() - start < 2


def help_of(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr(sys, "argv", ["mezzotint", *command, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    return capsys.readouterr().out.rstrip().splitlines()


@pytest.mark.parametrize(
    "command",
    [*cli.COMMANDS, "edit img2img", "edit inpaint", "edit interpolate", "edit trajectory"],
)
def test_help_of_a_command_fits_a_screen(command, monkeypatch, capsys):
    lines = help_of(command.split(), monkeypatch, capsys)
    assert f"usage: mezzotint {command}" in lines[0]
    # A long description is one line, which the terminal wraps.
    assert sum(1 + (len(line) - 1) // COLUMNS if line else 1 for line in lines) <= ROWS


def test_overview_lists_every_command_on_a_screen(monkeypatch, capsys):
    lines = help_of([], monkeypatch, capsys)
    assert [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "] == [
        *cli.COMMANDS
    ]
    assert len(lines) <= ROWS
    assert max(map(len, lines)) <= COLUMNS


def test_module_is_run_as_the_program():
    done = run_python("-m", "mezzotint", "--version")
    assert done.stdout == f"mezzotint {__version__}\n"
    done = run_python("-m", "mezzotint", "info", "--help")
    assert done.stdout.startswith("usage: mezzotint info ")


@pytest.mark.parametrize(
    ("args", "code", "name"),
    [
        (["info", "unet-tinny"], 1, "unet-tiny"),
        (["plan", "unet-tiny", "--gpu", "2"], 2, "--gpus"),
        (["plam", "unet-tiny"], 2, "plan"),
    ],
)
def test_errors_name_the_nearest_choice(args, code, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mezzotint", *args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    printed = capsys.readouterr()
    assert name in printed.err
    assert printed.out == ""
