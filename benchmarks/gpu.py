"""The parts of gpu.sh: what a GPU alone can show, in the order of its worth.

    python benchmarks/gpu.py PART --device cuda --seconds 60 --out DIR

A part appends its rows to DIR/gpu.jsonl, each the moment it is measured. It does not begin what
needs more time than is left of its seconds. With `--device cpu --small` the same code runs on tiny
networks, to see that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import gpu_checks
import gpu_kernels
import gpu_steps
from common import facts
from gpu_rows import Clock, Row, RowFile, guarded, release

Part = Callable[[str, bool, Clock], Iterator[Row]]


def parts(out: Path) -> dict[str, list[tuple[str, Part, float]]]:
    """Return the parts by name: what each measures, and the seconds that it may take of its part's.

    Parts are processes of their own, so that none pays for the memory or the crash of another. A
    later item of a part begins with what the earlier ones have left.
    """
    kernels, steps, checks = gpu_kernels, gpu_steps, gpu_checks
    return {
        "first": [
            ("machine", kernels.machine, 8),
            ("depthwise", kernels.depthwise_kernels, 20),
            ("train", steps.training_eager, 35),
            ("profile", partial(steps.profile, out=out), 20),
        ],
        "compiled": [("train", steps.training_compiled, 90)],
        "second": [
            ("cascade", kernels.cascade, 25),
            ("sample", steps.sampling, 30),
            ("attention", kernels.attention, 45),
        ],
        "others": [("train", steps.training_others, 60)],
        "loop": [("loop", steps.loop, 50)],
        "checks": [("checks", checks.checks, 45)],
        "twins": [("twins", checks.twins, 40)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=parts(Path()))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    whole, failed = Clock(args.seconds), 0
    path = args.out / "gpu.jsonl"
    RowFile(path, "machine").write({"process": args.part, **facts(args.device)})
    for name, measure, seconds in parts(args.out)[args.part]:
        # As in gpu.sh: the machine of a rehearsal is slow, or busy with other work.
        limit = seconds * (4 if args.small else 1)
        rows, clock = RowFile(path, name), Clock(min(limit, whole.left))
        found = measure(args.device, args.small, clock)
        while True:
            row = guarded(args.device, {}, lambda found=found: next(found, None) or {})
            if not row:
                break
            rows.write(row)
            failed += not row.get("ok", "error" not in row)
        release(args.device)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
