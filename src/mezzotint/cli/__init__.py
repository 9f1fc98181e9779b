"""The command line: one function per command, whose docstring is its help.

A command imports what it needs when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import inspect
import os
import sys
import textwrap

import tyro

from mezzotint import __version__
from mezzotint.cli import data, evaluation, models, sampling, tools, training

COMMANDS = {
    "demo": training.demo,
    "train": training.train,
    "sample": sampling.sample,
    "edit": sampling.edit,
    "evaluate": evaluation.evaluate,
    "reference": evaluation.reference,
    "compare": evaluation.compare,
    "reproduce": evaluation.reproduce,
    "prepare": data.prepare,
    "download": data.download,
    "info": tools.info,
    "plan": tools.plan,
    "doctor": tools.doctor,
    "bench": tools.bench,
    "serve": sampling.serve,
    "convert": models.convert,
    "export": models.export,
    "card": models.card,
    "ema": training.ema,
    "replay": training.replay,
    "report": training.report,
}


def main() -> None:
    """Run a command; a user's error is one sentence on stderr and exit code 1, a usage error 2."""
    try:
        if sys.argv[1:] in ([], ["-h"], ["--help"]):
            print(overview(), flush=True)
            sys.exit(0)
        if sys.argv[1:] == ["--version"]:
            print(f"mezzotint {__version__}")
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mezzotint")
        # A closed pipe is handled below; when the interpreter exits it would be a traceback.
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has closed it, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"mezzotint: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mezzotint: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)


def overview() -> str:
    """Return the help of `mezzotint --help`: every command with the first sentence of its help."""
    indent = " " * 12
    lines = [
        "usage: mezzotint COMMAND [options]",
        "",
        "Train, sample and evaluate image diffusion models. Commands:",
    ]
    for name, command in COMMANDS.items():
        summary = " ".join((inspect.getdoc(command) or "").split("\n\n")[0].split())
        sentence = summary.partition(". ")[0].rstrip(".") + "."
        lines += textwrap.wrap(
            sentence, 96, initial_indent=f"  {name:10}", subsequent_indent=indent
        )
    lines += [
        "",
        "mezzotint COMMAND --help shows the options of a command; mezzotint --version the version.",
    ]
    return "\n".join(lines)
