"""The command line: help fits a screen, answers come at once, errors name what is allowed."""

import contextlib
import inspect
import os
import re
import resource
import subprocess
import sys
import types

import pytest

from mezzotint import __version__, cli
from mezzotint.cli import measure, usage

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
    # The parser ends the process after the help of a command.
    with pytest.raises(SystemExit) if command else contextlib.nullcontext() as end:
        cli.main()
    assert end is None or not end.value.code
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
        # Fields of a recipe written as options, as scripts of other libraries take them.
        (["train", "unet-tiny", "--images=64"], 2, "without dashes: images=64;"),
        (["train", "unet-tiny", "--batch", "8"], 2, "without dashes: batch=8;"),
        (["train", "unet-tiny", "--optim.lr=1e-4", "--out", "x"], 2, "dashes: optim.lr=1e-4;"),
        (["train", "unet-tiny", "--lr", "1e-4"], 2, "without dashes: optim.lr=1e-4;"),
        (["train", "unet-tiny", "--model.size", "64"], 2, "without dashes: model.size=64;"),
        (["train", "unet-tiny", "--label-drop"], 2, "without dashes: label_drop=VALUE;"),
        (["plan", "unet-tiny", "--steps=9"], 2, "samples.steps=9 or evaluate.steps=9;"),
        (["bench", "unet-tiny", "--size", "64"], 2, "without dashes: size=64;"),
        (["plan", "unet-tiny", "--hours", "8"], 2, "Unrecognized.*--hours"),
        (["sample", "x", "--stepz", "3"], 2, "--steps"),
        # Options out of range.
        (["plan", "unet-tiny", "--gpus", "0"], 1, "--gpus 0 must be at least 1"),
        (["sample", "x", "-n", "-1"], 1, "--num-images -1 must be"),
        (["sample", "x", "--steps", "0"], 1, "--steps 0 must be"),
        (["sample", "x", "--seed", str(2**70)], 1, f"--seed {2**70} must be"),
        (["edit", "interpolate", "x", "--frames", "1"], 1, "--frames 1 must be at least 2"),
        (
            ["edit", "img2img", "x", "--image", "y", "--start-logsnr", "nan"],
            1,
            "--start-logsnr nan",
        ),
        (["evaluate", "x", "--reference", "y", "-n", "0"], 1, "--num-images 0 must be"),
        *[
            (["evaluate", "x", "--bits-per-dim", "--data", "y", name, value], 1,
             f"{name} is of samples of a model")
            for name, value in (("--features", "dinov2"), ("--weights", "w.pth"),
                                ("--channels", "1"), ("--reference-source", "adm"))
        ],
        *[
            (["evaluate", "x", "--clip", "y", name, value], 1, f"{name} needs --reference")
            for name, value in (("--features", "dinov2"), ("--weights", "w.pth"),
                                ("--heldout", "h.npz"), ("--reference-source", "adm"))
        ],
        *[
            (["evaluate", model, "--reference", "y", "--channels", "1"], 1,
             f"--channels is of images, and {model} is a model")
            for model in ("eurosat-64", "nobody/model", "s3://bucket/run")
        ],
        (["reference", "x", "y", "--size", "-3"], 1, "--size -3 must be at least 1"),
        (["reference", "x", "y", "--channels", "2"], 2, "--channels"),
        (["train", "unet-tiny", "--hours", "8h"], 2, "--hours is '8h'; a number is needed"),
        (["train", "unet-tiny", "--hours=0,5"], 2, "--hours is '0,5'; a number is needed"),
        (["prepare", "x", "y", "--size", "32x48"], 2, "--size is '32x48'; a whole number"),
        (["sample", "x", "--steps", "abc"], 2, "--steps is 'abc'; a whole number is needed"),
        (["edit", "trajectory", "x", "-n", "4", "--batch", "1e3"], 2, "--batch is '1e3'; a whole"),
        (["train", "unet-tiny", "--dryrun", "--out", "r"], 2, "unknown option --dryrun .*dry-run"),
        (["plan", "unet-tiny", "--gpu", "4"], 2, "unknown option --gpu .*--gpus"),
        (["prepare", "x", "y", "--size", "1000000000"], 1, "--size 1000000000 must be"),
        (["bench", "unet-tiny", "--rounds", "0"], 1, "--rounds 0 must be"),
        (["doctor", "x", "--size", "0"], 1, "--size 0 must be"),
        (["serve", "--port", "65536"], 1, "--port 65536 must be .*a TCP port"),
        (["ema", "x", "--width", "nan"], 1, "--width nan must be"),
        (["demo", "--images", "-5"], 1, "--images -5 must be"),
        (["export", "x", "y", "--to", "torch", "--size", "0"], 1, "--size 0 must be"),
        (["train", "unet-tiny", "--out", "s3://b/x"], 1, "OUT s3://b/x is an address"),
        (["sample", "x", "--out", "file://x/y.png"], 1, "OUT file://x/y.png is an address"),
        (["reference", "x", "gs://b/x.npz"], 1, "OUT gs://b/x.npz is an address"),
        (["reference", "x", "y.pkl"], 1, "a reference is written as .npz; given y.pkl"),
        (["train", "autoo", "--hours", "1"], 1, "did you mean auto, with --hours H"),
        (["train", "unet-tiny", "size=32"], 1, r"model\.size"),
        (["reference", "s3://b/x", "y.npz"], 1, "s3://b/x is an address"),
        (["prepare", "x", "s3://b/x", "--size", "8"], 1, "s3://b/x is an address"),
        (["report", "hf://x/y"], 1, "RUN hf://x/y is an address"),
        (["train", "unet-tiny", "save.store=s3://b/a*"], 1, r"save.store s3://b/a\* holds a \*"),
        (["convert", "x", "y", "--hint", "heads=[1"], 1, "--hint heads=.* is not YAML"),
    ],
)  # fmt: skip
def test_errors_name_the_nearest_choice(args, code, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mezzotint", *args])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    printed = capsys.readouterr()
    assert re.search(name, printed.err), printed.err
    assert printed.out == ""
    others = [
        c for c in cli.COMMANDS if c not in (args[0], "plan") and f"mezzotint {c} " in printed.err
    ]
    assert not others, "a wrong option names other commands"


@pytest.mark.parametrize(
    ("given", "gathered"),
    [
        ("p a=1 --data x b=2", "p a=1 b=2 --data x"),
        ("p --data x=y a=1", "p a=1 --data x=y"),
        ("p --data=x a=1 --dry-run b=2", "p a=1 b=2 --data=x --dry-run"),
        ("--out o p a=-1 --accept-changed-data", "p a=-1 --out o --accept-changed-data"),
        ("p --data x", "p --data x"),
        ("p --data", "p --data"),
    ],
)
def test_fields_may_follow_options(given, gathered):
    options = inspect.signature(cli.COMMANDS["train"]).parameters
    assert usage.gather_fields(given.split(), options) == gathered.split()


@pytest.mark.parametrize(
    ("given", "statistics", "features", "chosen"),
    [
        (None, measure.FEATURES, [], measure.FEATURES),
        (None, ["inception-2048"], [], ["inception-2048", "inception-logits"]),
        (
            None,
            ["efficientnet-lite0", "inception-2048"],
            [],
            ["inception-2048", "inception-logits"],
        ),
        (None, ["efficientnet-lite0"], [], ["efficientnet-lite0"]),
        (None, ["dinov2"], ["dinov2", "efficientnet-lite0"], ["dinov2", "efficientnet-lite0"]),
        (None, ["inception-64"], [], ["inception-64"]),
        (None, ["of another program"], [], measure.FEATURES),
        (["dinov2"], ["efficientnet-lite0"], [], ["dinov2"]),
    ],
)
def test_a_model_is_measured_in_the_features_of_the_reference(given, statistics, features, chosen):
    reference = types.SimpleNamespace(
        statistics=dict.fromkeys(statistics), features=dict.fromkeys(features)
    )
    assert [*measure.choose_features(given, reference)] == [*chosen]
