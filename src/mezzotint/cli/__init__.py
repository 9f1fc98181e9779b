"""The command line. Every command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import os
import sys

import tyro

from mezzotint import __version__
from mezzotint.cli import data, evaluation, sampling, tools, training

COMMANDS = {
    "demo": training.demo,
    "train": training.train,
    "sample": sampling.sample,
    "prepare": data.prepare,
    "prefetch": data.prefetch,
    "info": tools.info,
    "convert": sampling.convert,
    "evaluate": evaluation.evaluate,
    "compare": evaluation.compare,
    "reproduce": evaluation.reproduce,
    "bench": tools.bench,
    "serve": sampling.serve,
    "export": sampling.export,
    "card": sampling.card,
    "ema": training.ema,
    "replay": training.replay,
    "plan": tools.plan,
    "doctor": tools.doctor,
    "report": training.report,
}


def main() -> None:
    """Entry point: a user's error is one sentence on stderr and exit code 1 (2 for a wrong command line)."""
    try:
        if sys.argv[1:] == ["--version"]:
            print(f"mezzotint {__version__}", flush=True)
            return
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="mezzotint",
            description="High-resolution image diffusion backbones: train, sample, evaluate. "
            "--version prints the version.",
        )
        sys.stdout.flush()  # here, where a closed pipe is understood, and not when the interpreter ends
    except BrokenPipeError:  # whoever read the output has seen enough, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"mezzotint: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("mezzotint: interrupted; run the same command again", file=sys.stderr)
        sys.exit(130)
