"""The command line: one function per command, whose docstring is its help.

A command imports what it needs when it runs, so that help and errors come at once.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
import warnings

import tyro

from mezzotint import __version__
from mezzotint.cli import data, evaluation, models, sampling, tools, training, tuning, usage
from mezzotint.core.console import echo, finish_output, protect_output
from mezzotint.core.fields import suggest
from mezzotint.core.text import escape_controls

COMMANDS = {
    "demo": training.demo,
    "train": training.train,
    "sample": sampling.sample,
    "edit": sampling.edit,
    "evaluate": evaluation.evaluate,
    "reference": evaluation.reference,
    "tune": tuning.tune,
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
TAKE_FIELDS = ("train", "plan", "bench", "download")  # commands whose arguments are FIELD=VALUE


# Their result is what they print. All others write files, and succeed though nobody reads them.
PRINTING = {"", "-h", "--help", "--version", "info", "plan", "doctor", "bench", "compare", "replay"}


def main() -> None:
    """Run a command; a user's error is one sentence on stderr and exit code 1, a usage error 2.

    What cannot be printed, e.g. since the reader of a pipe has closed it, is dropped and stops
    nothing. A command whose result is what it prints then ends with exit code 1.
    """
    protect_output()
    # A sentence, without the place in the library that Python prints before it.
    warnings.formatwarning = lambda message, *place, **line: f"! {escape_controls(str(message))}\n"
    status = 0
    try:
        if sys.argv[1:] in ([], ["-h"], ["--help"]):
            echo(overview())
        elif sys.argv[1:] == ["--version"]:
            echo(f"mezzotint {__version__}")
        else:
            run_command(*sys.argv[1:])
    except KeyboardInterrupt:
        echo("mezzotint: interrupted; run the same command again", stderr=True)
        status = 130
    except Exception as error:
        sentence = describe_error(error)
        if sentence is None:
            raise
        echo(f"mezzotint: {sentence}", stderr=True)
        status = 1
    finally:
        lost = finish_output()
    if lost is not None and not status and (sys.argv[1:2] or [""])[0] in PRINTING:
        if not isinstance(lost, BrokenPipeError):
            echo(f"mezzotint: standard output cannot be written: {lost}", stderr=True)
        status = 1
    if status:
        sys.exit(status)


def describe_error(error: Exception) -> str | None:
    """Return the sentence of an error that a user can mend; None for a fault of the library."""
    if isinstance(error, ValueError | OSError | FloatingPointError):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    # By name: torch is not imported for this. On a CPU it is a RuntimeError as any other.
    no_memory = type(error).__name__ == "OutOfMemoryError"
    if isinstance(error, MemoryError) or no_memory or "can't allocate memory" in first:
        return (
            f"out of memory{f' ({first})' if first else ''}; use a smaller batch (--batch, or in "
            "training engine.microbatch), engine.checkpointing=full or a smaller size "
            "(`mezzotint plan PRESET` says what training needs)"
        )
    return None


def run_command(name: str, *arguments: str) -> None:
    """Parse a command's arguments and run it; exit with 2 for a usage error."""
    if name.startswith("--tyro-"):  # completion scripts of all commands
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mezzotint", args=[name, *arguments])
    if name not in COMMANDS:
        usage.fail("mezzotint", f"unknown command {name!r}; {suggest(name, COMMANDS)}")
    command, program = COMMANDS[name], f"mezzotint {name}"
    if wrong := usage.explain_number(arguments, command):
        usage.fail(program, wrong)
    if name in TAKE_FIELDS and "--help" not in arguments and "-h" not in arguments:
        options = inspect.signature(command).parameters
        if wrong := usage.explain_field(arguments, options, of_model=name == "bench"):
            usage.fail(program, wrong)
        arguments = tuple(usage.gather_fields(arguments, options))
    tyro.cli(usage.checked(command), prog=program, args=arguments)


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
