"""Measure training and sampling speed, memory, and the share of the matrix-product rate.

Work is counted as the papers do, in multiply-accumulates of one forward pass. A forward pass is two
floating-point operations per multiply-accumulate and a training step three forward passes, whatever
is recomputed on top. The limit is the rate of one large matrix product in the same precision,
measured in the same process.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from mezzotint import backbones
from mezzotint.backbones import get_backbone
from mezzotint.backbones.blocks import compile_blocks
from mezzotint.backbones.checkpointing import Checkpointing
from mezzotint.backbones.flops import GIGA, count_macs
from mezzotint.core.machine import describe_machine
from mezzotint.core.registry import Spec, build
from mezzotint.data.text_encoder import MAX_TOKENS
from mezzotint.models import create_model, get_schedule
from mezzotint.process import guidance, objectives
from mezzotint.process.denoiser import Cond, Denoised, Denoiser, Model
from mezzotint.sampling.cuda_graphs import CudaGraphDenoiser

Work = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """What to measure.

    preset, overrides: the network and fields of its config.
    batch: images per step or call.
    precision: float32, or bf16 autocast over float32 weights.
    device: cpu or cuda.
    compile: torch.compile of each repeated block.
    checkpointing: of each block, see `run_block`.
    graphs: replay sampling from CUDA graphs.
    rounds: measured repetitions; the median counts.
    objective: the loss of the training step, by name.
    """

    preset: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 8
    precision: Literal["float32", "bf16"] = "float32"
    device: str = "cpu"
    compile: bool = False
    checkpointing: Checkpointing = "none"
    graphs: bool = False
    rounds: int = 5
    objective: Spec = field(default_factory=lambda: Spec("eps_mse"))

    def __post_init__(self) -> None:
        if self.batch < 1 or self.rounds < 1:
            raise ValueError(f"batch {self.batch} and rounds {self.rounds} must be at least 1")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device {self.device!r} must be cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: this machine has no CUDA device; try device cpu")
        if self.graphs and self.device != "cuda":
            raise ValueError("graphs needs device cuda; choose it, or leave graphs out")


def read_clock(device: str) -> float:
    """Return seconds: wall clock on a GPU after its work is done, processor time on one CPU thread.

    Processor time leaves out the waiting that other jobs on the same cores cause. It adds up over
    threads, so with several of them the wall clock counts.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def time_interleaved(
    contenders: Mapping[str, Work], device: str, rounds: int = 5
) -> dict[str, float]:
    """Return each contender's median seconds, run in turn (A B C A B C ...) after a warm-up."""
    for work in contenders.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            start = read_clock(device)
            work()
            seconds[name].append(read_clock(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_matmul_flops(device: str, precision: str, side: int | None = None) -> float:
    """Return the floating-point operations per second of a square matrix product, best of several.

    side: of the matrices; by default 8192 on a GPU and 2048 on a CPU.
    """
    n = side or (8192 if device == "cuda" else 2048)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Random inputs: zeros run faster than data.
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    repeats = 10 if device == "cuda" else 1
    best = float("inf")
    for _ in range(8):
        start = read_clock(device)
        for _ in range(repeats):
            torch.mm(a, b)
        best = min(best, (read_clock(device) - start) / repeats)
    return 2 * n**3 / best


def measure_peak_bytes(work: Work, device: str) -> int:
    """Run `work` once; return the peak bytes of torch's allocator beyond those it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # silences its banner on stderr
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    assert profile.profiler is not None
    results: Any = profile.profiler.kineto_results
    # Each allocation (positive) and release (negative) is one event.
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        peak = max(peak, now)
    return peak


def random_inputs(model: Model, batch: int, device: str) -> tuple[Tensor, Tensor, Cond]:
    """Return random images (b, c, h, w) and noise at the native size, labels, and captions.

    Captions are random embeddings of MAX_TOKENS tokens, for a network that reads text.
    """
    config = model.info.config
    shape = (batch, config.channels, *backbones.native_size(config))
    x, eps = torch.randn(shape, device=device).clamp(-1, 1), torch.randn(shape, device=device)
    label = (
        torch.randint(config.num_classes, (batch,), device=device) if config.num_classes else None
    )
    if not (width := backbones.text_width(config)):
        return x, eps, Cond(label=label)
    text = torch.randn(batch, MAX_TOKENS, width, device=device)
    real = torch.ones(batch, MAX_TOKENS, dtype=torch.bool, device=device)
    return x, eps, Cond(label=label, text=text, text_mask=real)


def make_training_step(model: Model, settings: BenchmarkSettings) -> Work:
    """Make one step on random images: loss, backward, clipping, fused AdamW, weight average."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    averages = [p.detach().clone() for p in parameters]
    objective = build(objectives.registry, settings.objective)
    x, eps, cond = random_inputs(model, settings.batch, settings.device)
    logsnr = get_schedule(model)(torch.linspace(0.02, 0.98, settings.batch, device=settings.device))

    def step() -> None:
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = objective(model, x, eps, logsnr, cond).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1e-4)

    return step


def _is_guided(model: Model) -> bool:
    """Return whether the call is guided: the network has classes and a null label."""
    config = model.info.config
    return config.num_classes > 0 and not backbones.needs_label(config)


def make_sampling_call(model: Model, settings: BenchmarkSettings, batch: int) -> Work:
    """Make one network evaluation as in sampling: guided, `batch` images in one doubled batch."""
    denoise: Denoiser = CudaGraphDenoiser(model) if settings.graphs else model
    z, _, cond = random_inputs(model, batch, settings.device)
    if _is_guided(model):
        null = guidance.null_label(model.info.config.num_classes)
        denoise = guidance.classifier_free(denoise, null, guidance.dit_s(1.5))
    # On the CPU, as samplers pass it, so that guidance can read its values.
    logsnr = get_schedule(model)(torch.full((batch,), 0.5, dtype=torch.float64))

    def call() -> Denoised:
        with (
            torch.no_grad(),
            torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16"),
        ):
            return denoise(z, logsnr, cond)

    return call


def make_benchmark_model(settings: BenchmarkSettings) -> Model:
    """Build the preset with random weights on the device, compiled by block if so set."""
    with torch.device(settings.device):
        model = create_model(settings.preset, **settings.overrides)
    get_backbone(model).checkpointing = settings.checkpointing
    if settings.compile:
        torch.compiler.reset()  # earlier compilations count against torch's limits
        compile_blocks(model.backbone)
    return model


def run_benchmark(settings: BenchmarkSettings, mode: Literal["train", "sample"]) -> dict[str, Any]:
    """Measure one preset.

    Returns:
        JSON-ready: the settings; seconds per step (or guided call); images_per_second (of a step,
        or of one network evaluation: divide by the sampler's steps); latency_seconds of one guided
        call at batch 1; peak_bytes beyond the weights (and optimiser state); weight_bytes; gmac
        computed per forward pass of one image; achieved_flops and ceiling_flops per second and
        their ratio `fraction`; machine.

    Errors: ValueError for an unknown preset or override, or a missing device.
    """
    model = make_benchmark_model(settings)
    tokens = MAX_TOKENS if backbones.text_width(model.info.config) else 0
    gmac = count_macs(get_backbone(model), tokens).computed / GIGA
    if mode == "train":
        model.train()
        step = make_training_step(model, settings)
        passes = 3 + objectives.EXTRA_PASSES.get(settings.objective.name, 0)
    else:
        model.eval().requires_grad_(False)
        step = make_sampling_call(model, settings, settings.batch)
        passes = 2 if _is_guided(model) else 1  # guidance is two evaluations
    seconds = time_interleaved({"step": step}, settings.device, settings.rounds)["step"]
    latency = None
    if mode == "sample":
        single = make_sampling_call(model, settings, 1)
        latency = time_interleaved({"call": single}, settings.device, settings.rounds)["call"]
    achieved = 2e9 * gmac * passes * settings.batch / seconds
    ceiling = measure_matmul_flops(settings.device, settings.precision)
    return {
        "mode": mode,
        **asdict(settings),
        "overrides": dict(settings.overrides),
        "seconds": seconds,
        "images_per_second": settings.batch / seconds,
        "latency_seconds": latency,
        "peak_bytes": measure_peak_bytes(step, settings.device),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gmac": gmac,
        "achieved_flops": achieved,
        "ceiling_flops": ceiling,
        "fraction": achieved / ceiling,
        "machine": describe_machine(settings.device),
    }


def render_benchmark(rows: list[dict[str, Any]]) -> RenderableType:
    """Lay out the results of `run_benchmark` for a terminal, one column each."""
    table = Table(
        title=f"{rows[0]['preset']} on {rows[0]['machine']['processor']}", title_justify="left"
    )
    table.add_column("")
    for r in rows:
        table.add_column(f"{r['mode']}, {r['precision']}, batch {r['batch']}", justify="right")
    lines: dict[str, Callable[[dict[str, Any]], str]] = {
        "seconds per step or guided call": lambda r: f"{r['seconds']:.4f}",
        "images per second": lambda r: f"{r['images_per_second']:.2f}",
        "guided call at batch 1, seconds": lambda r: (
            "" if r["latency_seconds"] is None else f"{r['latency_seconds']:.4f}"
        ),
        "peak memory beyond weights, MiB": lambda r: f"{r['peak_bytes'] / 2**20:.0f}",
        "GMAC per image and pass": lambda r: f"{r['gmac']:.3f}",
        "achieved GFLOP/s": lambda r: f"{r['achieved_flops'] / 1e9:.0f}",
        "of the matrix-product rate": lambda r: f"{r['fraction']:.0%}",
    }
    for name, value in lines.items():
        table.add_row(name, *map(value, rows))
    machine = rows[0]["machine"]
    return Group(
        table,
        f"{machine['threads']} threads of {machine['cores']} cores, load {machine['load'][0]}",
    )
