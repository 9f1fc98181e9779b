"""Where commands may write: nothing of a run, and no file of another kind."""

from __future__ import annotations

from pathlib import Path

# What training, and tuning the sampling, write into a run folder.
RUN_PARTS = (
    ".lock", "bundles", "checkpoints", "data.json", "data.npy", "ema", "environment.json",
    "evaluations", "events.jsonl", "log.jsonl", "model", "model-raw", "recipe.yaml", "samples",
    "tensorboard", "tune.json", "tune.pieces", "tuned", "unreadable.txt",
)  # fmt: skip

# Endings of what lies beside an evaluation or a sweep, with its name.
PARTS = (".svg", ".png", ".pieces")


def check_outside_run(out: Path | None) -> None:
    """Check that `out` is no part of a run folder, which training may be writing at this moment.

    Errors: ValueError naming the run.
    """
    if out is None:
        return
    path = out.absolute()
    for run, child in zip(path.parents, (path, *path.parents), strict=False):
        is_run = (run / "recipe.yaml").is_file() and (run / ".lock").exists()
        if is_run and child.name in RUN_PARTS:
            raise ValueError(f"{out} belongs to the run {run}, which writes it; choose another")


def evaluation_base(out: Path, kind: str = "evaluation") -> Path:
    """Check that an evaluation may be written to `out`; return the path that its parts lie beside.

    Beside a device there is no place for parts; they go into the current folder.

    Args:
        kind: "evaluation", or "sweep", which also writes a figure.

    Errors: ValueError for a part of a run, for a file that is no evaluation and for the name of a
        part.
    """
    from mezzotint.core.files import check_replaceable, is_special, read_json

    check_outside_run(out)
    if out.suffix.lower() in PARTS and not is_special(out):
        raise ValueError(f"{out} ends like a part of {kind}s; give --out a name that ends in .json")
    is_ours = lambda path: f"mezzotint_{kind}" in read_json(path)  # noqa: E731
    article = "an" if kind == "evaluation" else "a"
    check_replaceable(out, is_ours, f"{article} {kind}")
    base = Path(f"{kind}.json") if is_special(out) else out
    if kind == "sweep":
        check_outside_run(base)
        for suffix in (".svg", ".png"):
            # A figure is ours if it lies beside a finished sweep.
            check_replaceable(
                base.with_suffix(suffix), lambda _: base.is_file() and is_ours(base), "a figure"
            )
    return base
