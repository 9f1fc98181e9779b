"""A training step and a sampling call of a preset on one H200, modelled by counting kernels.

    python benchmarks/step_model.py                                     # all rows, and the JSON
    python benchmarks/step_model.py --preset dimr-xl-2r-256 --mode eager --out new.json
    python benchmarks/step_model.py --compare OLD.json NEW.json         # what a change bought

Nothing runs: tensors are fake, with a shape, a dtype and the device cuda, but no storage. The
network's own code runs on them under autocast, with autograd of the CUDA backend, and every kernel
is counted with the bytes it moves, its FLOP, its dtype and the line it serves. Modelled time is the
sum over kernels of max(bytes / 3.9 TB/s, FLOP / 680 TFLOP/s), float32 at 45 TFLOP/s (no TF32).
Attention is that of `fake_cuda.attention_kernel`, depthwise convolutions count their bytes alone,
NCHW maps of 16-bit convolutions are copied to cuDNN's layout
and back (`kernel_counts.operation_kernels`). Not modelled: gaps between launches, caches, waiting
for the host, loading. So times are a lower bound: expect 5 to 15 % more. `compiled` compiles each
repeated block as the training loop does and counts after fusion (`fusion_model`); all else is
eager.

A training step is the recipe's loss under bf16 autocast, the backward pass, the gradient's norm,
fused AdamW and one weight average. A sampling row is one guided call, two network evaluations in
one batch of twice the size; its images per second are those of 250 calls.

The environment. torch's CUDA build is needed, but no GPU and no driver (6 GB):

    python3.12 -m venv .venv-cuda
    .venv-cuda/bin/pip install torch==2.11.0 numpy tyro pyyaml safetensors jaxtyping rich pillow \
        matplotlib anyascii datasets huggingface_hub
    PYTHONPATH=src .venv-cuda/bin/python benchmarks/step_model.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from common import RESULTS, commit
from fake_cuda import backward, gpu_pretended
from kernel_counts import CountingMode, Counts, Kernel, kind_of
from mezzotint.backbones import get_backbone, needs_label
from mezzotint.backbones.blocks import compile_blocks
from mezzotint.backbones.kernels.depthwise import DepthwiseKernel, ResidualDepthwise
from mezzotint.config import Recipe
from mezzotint.core.registry import build
from mezzotint.models import meta_model, preset_info
from mezzotint.process import guidance, objectives
from mezzotint.process.denoiser import Cond, Model
from mezzotint.process.objectives import Objective
from mezzotint.recipes import recipe_for

Row = dict[str, Any]
CALLS = 250  # of the published sampler


class Work(NamedTuple):
    """One row: what runs, on how many images, in which dtype."""

    preset: str
    batch: int
    step: str  # train or sample
    dtype: str = "bfloat16"


ROWS = (
    Work("dimr-xl-2r-256", 128, "train"),
    Work("diffit-256", 128, "train"),
    Work("sid2-256", 64, "train"),
    Work("uvit-256", 32, "train"),
    Work("dimr-xl-2r-256", 64, "sample"),
    Work("dimr-xl-2r-256", 64, "sample", "float32"),
)


def count_step(work: Work, compiled: bool, depthwise: DepthwiseKernel) -> tuple[Counts, int]:
    """Return the kernels of one step, and graph breaks."""
    recipe = recipe_for(work.preset)
    objective = build(objectives.registry, recipe.objective)
    model = meta_model(preset_info(work.preset))
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the schedules' tables are real
    counts = Counts()
    counting = CountingMode(counts)
    for module in model.modules():
        if isinstance(module, ResidualDepthwise):
            module.kernel = depthwise
    counters.clear()
    torch.compiler.reset()
    with mode, gpu_pretended(counts.add_attention):
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        if compiled:
            from fusion_model import fusing_backend

            compile_blocks(get_backbone(model), fusing_backend(counting))
        if work.step == "train":
            train(model.train().requires_grad_(), objective, recipe, work, counting)
        else:
            sample(model, work, counting)
    return counts, sum(counters["graph_break"].values())


def random_inputs(model: Model, batch: int) -> tuple[torch.Tensor, torch.Tensor, Cond]:
    """Return fake images, log-SNRs and labels."""
    c = model.info.config
    x = torch.empty(batch, c.channels, c.size, c.size, device="cuda")
    label = torch.zeros(batch, dtype=torch.long, device="cuda") if c.num_classes else None
    return x, torch.empty(batch, device="cuda"), Cond(label=label)


def train(
    model: Model, objective: Objective, recipe: Recipe, work: Work, counting: CountingMode
) -> None:
    """Run one training step as `mezzotint.train.step` does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, logsnr, cond = random_inputs(model, work.batch)
    exp_avg, exp_avg_sq, average = ([torch.empty_like(p) for p in parameters] for _ in range(3))
    steps = [torch.empty((), device="cuda") for _ in parameters]
    with counting:
        with torch.autocast("cuda", torch.bfloat16, enabled=work.dtype == "bfloat16"):
            loss = objective(model, x, torch.empty_like(x), logsnr, cond)
        backward(loss.sum() / work.batch, counting.visit)
        counting.phase = "update"
        gradients = [p.grad for p in parameters]
        with torch.no_grad():
            torch._foreach_norm(gradients)
            if recipe.optim.clip is not None:
                torch._foreach_mul_(gradients, 0.5)
            options = {
                "lr": 1e-4, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8,
                "amsgrad": False, "maximize": False,
            }  # fmt: skip
            torch._fused_adamw_(parameters, gradients, exp_avg, exp_avg_sq, [], steps, **options)
            torch._foreach_lerp_(average, parameters, 1e-4)


def sample(model: Model, work: Work, counting: CountingMode) -> None:
    """Run one guided call of the network, in one doubled batch."""
    z, logsnr, cond = random_inputs(model, work.batch)
    denoise: Any = model
    if not needs_label(model.info.config):
        null = guidance.null_label(model.info.config.num_classes)
        denoise = guidance.classifier_free(model, null, guidance.dit_s(1.5))
    half = torch.autocast("cuda", torch.bfloat16, enabled=work.dtype == "bfloat16")
    with torch.no_grad(), counting, half:
        denoise(z, logsnr, cond)


def make_row(work: Work, compiled: bool, depthwise: DepthwiseKernel) -> Row:
    """Model one row; print its table and its ten largest losses."""
    counts, breaks = count_step(work, compiled, depthwise)
    milliseconds = counts.total("milliseconds")
    calls = 1 if work.step == "train" else CALLS
    row = {
        **work._asdict(),
        "mode": "compiled" if compiled else "eager",
        "depthwise": depthwise,
        "milliseconds": round(milliseconds, 1),
        "images_per_second": round(1e3 * work.batch / milliseconds / calls, 3),
        "kernels": int(counts.total("count")),
        "gigabytes": round(counts.total("bytes") / 1e9, 1),
        "teraflop": round(counts.total("flop") / 1e12, 2),
        "attention": counts.attention,
        "graph_breaks": breaks,
        "torch": torch.__version__,
        "commit": commit(),
    }
    print(
        f"\n{work.preset}, {work.step}, {row['mode']}, batch {work.batch}, {work.dtype}: modelled "
        f"{row['milliseconds']} ms, {row['images_per_second']} images/s, {row['kernels']} kernels, "
        f"{row['gigabytes']} GB, attention {counts.attention}, {breaks} graph breaks"
    )
    by_kind = counts.grouped(lambda name, where, dtype: (kind_of(name), dtype))
    print_table("kind, dtype", by_kind.items())
    by_line = counts.grouped(lambda name, where, dtype: (where, name, dtype))
    losses = sorted(by_line.items(), key=lambda i: i[1].arithmetic - i[1].milliseconds)
    print("the largest losses: time beyond that of the FLOP")
    print_table("line, operation, dtype", losses[:10])
    return row


def print_table(title: str, items: Iterable[tuple[tuple[str, ...], Kernel]]) -> None:
    """Print kernels by group, the slowest first."""
    print(f"{'ms':>8} {'beyond FLOP':>11} {'GB':>8} {'kernels':>8}  {title}")
    for key, k in sorted(items, key=lambda i: -i[1].milliseconds):
        lost = k.milliseconds - k.arithmetic
        print(
            f"{k.milliseconds:8.2f} {lost:11.2f} {k.bytes / 1e9:8.1f} {k.count:8d}  "
            f"{', '.join(filter(None, key))}"
        )


def compare(before: list[Row], after: list[Row]) -> Iterator[str]:
    """Yield a line for each row of both files that differs."""
    identity = ("preset", "batch", "step", "dtype", "mode")
    old = {tuple(row[k] for k in identity): row for row in before}
    for row in after:
        key = tuple(row[k] for k in identity)
        if key not in old or old[key]["milliseconds"] == row["milliseconds"]:
            continue
        was = old[key]
        changes = "; ".join(
            f"{name} {was[name]} to {row[name]}"
            for name in (
                "milliseconds",
                "images_per_second",
                "kernels",
                "gigabytes",
                "graph_breaks",
            )
        )
        bought = was["milliseconds"] - row["milliseconds"]
        yield f"{', '.join(map(str, key))}: {bought:.1f} ms bought; {changes}"


def main() -> None:
    """Model the rows that the options choose, or compare two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", help="only these; by default the table's")
    parser.add_argument("--step", choices=("train", "sample"))
    parser.add_argument("--batch", type=int, help="in place of the table's")
    parser.add_argument("--mode", choices=("eager", "compiled"))
    parser.add_argument("--compiled", action="store_const", const="compiled", dest="mode")
    parser.add_argument("--depthwise", choices=("cudnn", "triton"), default="cudnn")
    parser.add_argument("--out", type=Path, default=RESULTS / "step-model.json")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    options = parser.parse_args()
    if options.compare:
        before, after = (json.loads(path.read_text()) for path in options.compare)
        print(*compare(before, after), sep="\n")
        return
    works = [w for w in ROWS if not options.preset or w.preset in options.preset]
    known = {w.preset for w in ROWS}
    works += [Work(p, 32, s) for p in options.preset or [] if p not in known for s in STEPS]
    rows: list[Row] = []
    for work in works:
        if options.step in (None, work.step):
            work = work._replace(batch=options.batch or work.batch)
            for mode in (options.mode,) if options.mode else ("eager", "compiled"):
                rows.append(make_row(work, mode == "compiled", options.depthwise))
                # Written after each row, so that an end by force keeps what is done.
                options.out.write_text(json.dumps(rows, indent=1) + "\n")


STEPS = ("train", "sample")

if __name__ == "__main__":
    main()
