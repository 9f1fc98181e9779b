"""Memory and time of training: against counts by hand, real steps, and measurements."""

from __future__ import annotations

import ctypes
import gc
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from mezzotint import config
from mezzotint.core.registry import build
from mezzotint.models import build_model, preset_info
from mezzotint.process import objectives
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for
from mezzotint.tools import plan as planning
from mezzotint.tools import step_times
from mezzotint.tools.accelerators import ACCELERATORS, Accelerator, detect_device
from mezzotint.tools.memory import LiveBytes, StepMemoryEstimator
from mezzotint.tools.plan import (
    MEMORY_PARTS,
    gathered_bytes,
    optimiser_bytes,
    plan,
    render_plan,
)
from mezzotint.train.loop import train

MIB = 2**20
# Large activations, so that the interpreter's own few MiB do not matter; small images (digits).
MEASURED = [("unet-tiny", 128, "bf16"), ("dimr-tiny", 48, "float32"), ("diffit-tiny", 32, "bf16")]


# The smallest network with every kind of layer of its family.
SMALL = [
    "model.size=16",
    "model.width=8",
    "model.emb_dim=16",
    "model.multipliers=[1,2]",
    "model.blocks=[1,1]",
    "model.attention=[false,true]",
    "model.heads=1",
]


def make_recipe(preset, *overrides):
    return config.override(recipe_for(preset), overrides)


def meta_model(recipe):
    with torch.device("meta"):
        return build_model(preset_info(recipe.preset, **recipe.model))


def estimator(recipe, *, bf16=False, checkpointing="none", gradients_leave=True):
    return StepMemoryEstimator(
        meta_model(recipe),
        build(objectives.registry, recipe.objective),
        weights=torch.float32,
        bf16=bf16,
        checkpointing=checkpointing,
        gradients_leave=gradients_leave,
    )


def test_live_bytes_counts_a_storage_until_it_is_freed():
    weight = torch.ones(8)
    with LiveBytes([weight]) as live:
        a = torch.ones(16)  # 64 bytes
        b = a.view(4, 4)  # the same storage
        # Two temporaries of 64 bytes and the result, then only the result.
        c = a * 2 + weight.repeat(2)
        assert live.now == 128
        assert live.peak == 256
        del a, b
        assert live.now == 64
        weight.mul_(2)
        assert live.now == 64
    del c
    assert live.now == 0


def test_live_bytes_counts_what_autograd_keeps():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with LiveBytes([*net.parameters()]) as live:
        x = torch.ones(5, 8)
        y = net(x)
        assert live.now == 3 * 160  # input, hidden, output
        y.sum().backward()
        assert live.now == 2 * 160 + 2 * (64 + 8) * 4  # hidden is gone, gradients are there


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_estimated_peak_is_that_of_a_real_step(bf16, checkpointing):
    recipe = make_recipe("unet-tiny", *SMALL)
    model = build_model(preset_info(recipe.preset, **recipe.model)).train()
    model.backbone.checkpointing = checkpointing
    objective = build(objectives.registry, recipe.objective)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        x = torch.randn(4, 3, 16, 16)
        eps, logsnr = torch.randn_like(x), torch.zeros(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(model, x, eps, logsnr, Cond())
        loss.sum().backward()
    estimate = estimator(
        recipe, bf16=bf16, checkpointing=checkpointing, gradients_leave=False
    ).peak(4)
    assert estimate == pytest.approx(live.peak, rel=0.03)  # kernels may differ between devices


def test_checkpointing_and_freed_gradients_lower_the_peak():
    recipe = make_recipe("unet-tiny", *SMALL, "model.emb_dim=512")
    plain = estimator(recipe).peak(8)
    selective, full = (
        estimator(recipe, checkpointing=how).peak(8) for how in ("selective", "full")
    )
    assert full < 0.8 * selective
    assert selective < 0.8 * plain
    kept = estimator(recipe, gradients_leave=False, checkpointing="full")
    assert kept.peak(1) > 1.5 * estimator(recipe, checkpointing="full").peak(1)


def test_largest_batch_fits_and_a_larger_one_does_not():
    estimate = estimator(make_recipe("unet-tiny", *SMALL), checkpointing="full")
    for available, near in ((4 * MIB, 64), (100 * MIB, 1)):
        largest = estimate.largest_batch(available, near)
        assert estimate.peak(largest) <= 1.02 * available
        assert estimate.peak(largest + max(1, largest // 20)) > available
    assert estimate.largest_batch(1000, 4) == 0


def test_fsdp_shards_what_ddp_repeats():
    recipe = make_recipe(
        "unet-tiny", *SMALL, "batch=64", "engine.precision=float32", "ema.power_stds=[0.05]"
    )
    model = meta_model(recipe)
    count = sum(p.numel() for p in model.parameters())
    result = json.loads(json.dumps(plan(recipe, gpus=4, device="a100")))
    ddp, _, _, fsdp, _, _ = result["memory"]
    assert [(c["strategy"], c["checkpointing"]) for c in result["memory"]] == [
        (strategy, how) for strategy in ("ddp", "fsdp") for how in ("none", "selective", "full")
    ]
    assert result["params"] == count
    assert ddp["gradients"] == 4 * count
    assert ddp["optimiser"] == 8 * count
    assert ddp["averages"] == 2 * 4 * count  # the exponential one and one power function
    for key in ("weights", "gradients", "optimiser", "averages"):
        assert fsdp[key] == ddp[key] // 4
    # Four batches ahead of 16 images per rank, with their noise.
    assert ddp["batches"] == 4 * 16 * 2 * 4 * 3 * 16**2
    assert ddp["gathered"] == 0 < fsdp["gathered"] == gathered_bytes(model, 4)
    for c in result["memory"]:
        assert c["total"] == sum(c[part] for part in MEMORY_PARTS)
        assert c["fits"]
    assert result["advice"][0].startswith("ddp fits")
    printed = text(result)
    assert "fsdp, full checkpointing" in " ".join(printed.split())
    assert "a100" in printed


def test_host_memory_counts_a_checkpoint_once_per_job():
    recipe = make_recipe("unet-tiny", *SMALL, "batch=64", "ema.power_stds=[0.05]", "data.workers=2")
    count = sum(p.numel() for p in meta_model(recipe).parameters())
    state = (4 + 8 + 2 * 4) * count  # weights, moments, two averages
    one, node, nodes, hsdp = (
        plan(config.override(recipe, changes), gpus=gpus, device="h100", compare=False)
        for gpus, changes in [
            (1, []), (8, []), (16, []), (16, ["engine.strategy=fsdp", "engine.shard_ranks=4"]),
        ]
    )  # fmt: skip
    assert [r["host_memory"]["ranks"] for r in (one, node, nodes, hsdp)] == [1, 8, 8, 4]
    shares = [r["host_memory"]["checkpoint"] for r in (one, node, nodes, hsdp)]
    assert shares == [state, state, state // 2, state // 4]
    for r in (one, node, nodes, hsdp):
        host = r["host_memory"]
        assert host["models"] == 3 * 4 * count
        assert host["total"] == sum(
            host[k] for k in ("processes", "batches", "checkpoint", "models")
        )
    # Four loaded uint8 batches and four drawn ones with noise, of 8 images on each of 8 ranks.
    assert node["host_memory"]["batches"] == 64 * 3 * 16**2 * (4 + 4 * 2 * 4)
    assert hsdp["memory"][0]["weights"] == node["memory"][0]["weights"] // 4
    assert "a machine of 8 ranks needs" in " ".join(text(node).split())
    three = plan(recipe, gpus=3, device="h100", compare=False)
    assert three["per_rank_batch"] == 22  # the largest of three shares
    uneven = config.override(recipe, ["engine.strategy=fsdp", "engine.shard_ranks=4", "batch=60"])
    with pytest.raises(ValueError, match="does not divide 6 ranks; 2, 3, 6 do"):
        plan(uneven, gpus=6)


def test_time_follows_from_flop_rate_and_efficiency():
    recipe = make_recipe("unet-tiny", "images=1e6", "batch=64", "engine.precision=bf16", *SMALL)
    a, b = (
        plan(recipe, device="h200", compare=False),
        plan(recipe, device="h200", efficiency=0.7, compare=False),
    )
    assert a["flop"] == pytest.approx(6 * a["gmac"] * 1e9 * 1e6)
    assert a["seconds_per_step"] == pytest.approx(64 * 6 * a["gmac"] * 1e9 / (0.35 * 790e12))
    assert a["days"] * 86400 * a["images_per_second"] == pytest.approx(1e6)
    assert b["days"] == pytest.approx(a["days"] / 2)
    for days, words in [(2.5, "2.5 days"), (0.5, "12 hours"), (0.000987, "1.42 minutes")]:
        assert f"images take {words} and" in text({**a, "days": days})
    full = plan(
        config.override(recipe, ["engine.checkpointing=full"]), device="h200", compare=False
    )
    assert full["seconds_per_step"] == pytest.approx(a["seconds_per_step"] * 4 / 3)
    assert full["flop"] == a["flop"]
    tuned = plan(
        config.override(recipe, ["objective.name=consistency"]), device="h200", compare=False
    )
    for key in ("seconds_per_step", "flop"):  # the target of consistency is a forward pass
        assert tuned[key] == pytest.approx(a[key] * 4 / 3)


def test_time_on_an_h200_is_modelled_for_presets_that_were():
    recipe = make_recipe("diffit-256", "engine.precision=bf16")
    row = step_times.read_table()["diffit-256"]
    eager = step_times.modelled_flops(recipe, "h200")
    assert eager == pytest.approx(row["teraflop"] * 1e15 / row["eager"] / 1.1)
    compiled = config.override(recipe, ["engine.compile=true"])
    faster = step_times.modelled_flops(compiled, "h200")
    assert faster / eager == pytest.approx(row["eager"] / row["compiled"])
    # An H100 is between as fast and as much slower as its memory.
    slower = step_times.modelled_flops(recipe, "h100")
    assert 3.0 / 3.9 < slower / eager < 1
    for other, device in (
        (recipe, "b200"),
        (make_recipe("unet-tiny"), "h200"),
        (make_recipe("diffit-256", "model.depth=2"), "h200"),
    ):
        assert step_times.modelled_flops(other, device) is None


def test_the_plan_says_that_a_time_is_modelled(monkeypatch):
    table = {"unet-tiny": {"batch": 64, "teraflop": 1.0, "eager": 4.0, "compiled": 2.0}}
    monkeypatch.setattr(step_times, "read_table", lambda: table)
    recipe = make_recipe("unet-tiny", "batch=64", "engine.precision=bf16")
    result = plan(recipe, device="h200", compare=False)
    assert result["efficiency"] == pytest.approx(1e12 / (1.1 * 4e-3) / 790e12)
    assert "modelled kernel by kernel for eager blocks, not measured" in text(result)
    assert plan(recipe, device="h200", efficiency=0.5, compare=False)["efficiency"] == 0.5


def test_the_packaged_step_times_are_those_of_the_step_model():
    """`python docs/make_tables.py` writes them."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "step-model.json"
    if not results.exists():
        pytest.skip("benchmarks are not part of the source distribution")
    found = {
        (r["preset"], r["mode"]): r["milliseconds"]
        for r in json.loads(results.read_text())
        if (r["step"], r["dtype"], r["depthwise"]) == ("train", "bfloat16", "cudnn")
    }
    table = step_times.read_table()
    packaged = {(p, mode): table[p][mode] for p in table for mode in ("eager", "compiled")}
    assert packaged == found


def test_advice_for_a_step_that_does_not_fit(monkeypatch):
    monkeypatch.setitem(
        ACCELERATORS, "tiny-gpu", Accelerator(memory=24e6, bf16=1e12, float32=1e12, source="-")
    )
    result = plan(make_recipe("unet-tiny", *SMALL, "batch=256"), device="tiny-gpu", compare=False)
    most = result["memory"][0]["largest_microbatch"]
    assert not result["memory"][0]["fits"]
    assert 0 < most < 256
    even = int(re.search(r"engine.microbatch=(\d+)", " ".join(result["advice"]))[1])
    parts = math.ceil(256 / even)
    assert f"in {parts} parts" in " ".join(result["advice"])
    assert math.ceil(256 / (parts - 1)) > most >= even > 0
    split = make_recipe("unet-tiny", *SMALL, "batch=256", f"engine.microbatch={even}")
    fitting = plan(split, device="tiny-gpu", compare=False)
    assert fitting["memory"][0]["gradients"] > 0  # they stay from one microbatch to the next
    assert fitting["memory"][0]["fits"]


def test_muon_keeps_one_moment_of_its_matrices():
    adam, muon = (make_recipe("uvit-tiny", f"optim.name={name}") for name in ("adamw", "muon"))
    model = meta_model(adam)
    count = sum(p.numel() for p in model.parameters())
    assert optimiser_bytes(adam, model) == 8 * count
    assert 4 * count < optimiser_bytes(muon, model) < 8 * count


def test_errors_name_the_value_and_an_allowed_one():
    recipe = make_recipe("unet-tiny", "batch=64")
    with pytest.raises(ValueError, match=r"h20.*h200"):
        plan(recipe, device="h20")
    with pytest.raises(ValueError, match="batch=65"):
        plan(recipe, gpus=65)
    for gpus in (0, -8):
        with pytest.raises(ValueError, match=f"gpus {gpus}"):
            plan(recipe, gpus=gpus)
    for efficiency in (0, 35):
        with pytest.raises(ValueError, match=f"efficiency {efficiency} "):
            plan(recipe, efficiency=efficiency)
    with pytest.raises(ValueError, match="1000000"):
        plan(make_recipe("unet-tiny", "model.size=1000000"))


@pytest.mark.parametrize(
    ("gpu", "memory", "row"),
    [
        ("NVIDIA H200", 150e9, "h200"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "a100"),
        ("NVIDIA A100-PCIE-40GB", 42e9, "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", 25e9, "rtx4090"),
        ("Other X1", 8e9, None),
        # Parts of a GPU, other chips of its name, and laptops.
        ("NVIDIA GH200 480GB", 102e9, None),
        ("NVIDIA H200 MIG 1g.18gb", 17.7e9, None),
        ("NVIDIA A100-SXM4-40GB MIG 2g.10gb", 10.2e9, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16.9e9, None),
    ],
)
def test_gpu_is_found_by_name_and_memory(monkeypatch, gpu, memory, row):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, memory))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert detect_device() == row
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_device() == "cpu"


def test_plan_command_and_dry_run_print_the_plan(capsys):
    from mezzotint.cli import tools, training

    tools.plan("unet-tiny", tuple(SMALL), batch=8, device="cpu", checkpointing="full", json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["batch"] == 8
    assert "with full checkpointing fits" in result["advice"][0]
    with pytest.raises(ValueError, match="efficiency 0"):
        tools.plan("unet-tiny", efficiency=0.0)
    training.train("unet-tiny", ("batch=8", *SMALL), data="digits", dry_run=True)
    printed = capsys.readouterr().out
    assert "difference from the recipe" in printed
    assert "images per forward pass" in printed


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_time_on_a_cpu_is_that_of_a_step_timed_here(monkeypatch, precision):
    """The rate is measured here, and a step is timed by the wall clock."""
    clock = iter(range(100))  # each reading a second later: every step takes one second
    monkeypatch.setattr(planning, "measure_matmul_flops", lambda device, p, side: 1e12)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: float(next(clock)))
    recipe = make_recipe("unet-tiny", *SMALL, "batch=32", f"engine.precision={precision}")
    result = plan(recipe, device="cpu", compare=False)
    # The first step, of 8 images, is long enough; 32 images take four times as long.
    assert result["seconds_per_step"] == pytest.approx(4)
    assert result["images_per_second"] == pytest.approx(8)
    assert result["flops"] == 1e12
    assert "a step of 8 images timed here: 1 s" in " ".join(text(result).split())
    assert "(assumed)" in text(plan(recipe, device="cpu", efficiency=0.1, compare=False))


def test_a_network_too_large_to_time_is_planned_by_the_measured_matrix_product(monkeypatch):
    monkeypatch.setattr(planning, "measure_matmul_flops", lambda device, p, side: 1e9)
    result = plan(make_recipe("unet-tiny"), device="cpu", compare=False)
    assert result["timed"] == "assumed"
    assert (result["flops"], result["efficiency"]) == (1e9, planning.EFFICIENCY)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["unet-tiny", "uvit-tiny", "dimr-tiny", "diffit-tiny"])
def test_the_planned_speed_is_what_training_logs_within_a_factor_of_three(preset, tmp_path):
    recipe = make_recipe(
        preset, "data.source=digits", "images=512", "log_every_images=128", "samples.count=0"
    )
    planned = plan(recipe, device=detect_device() or "h100", compare=False)["images_per_second"]
    lines = (train(recipe, tmp_path, quiet=True) / "log.jsonl").read_text().splitlines()
    logged = max(json.loads(line)["images_per_second"] for line in lines[1:])
    print(f"{preset}: {planned:.1f} images/s planned, {logged:.1f} logged")
    assert 1 / 3 < planned / logged < 3


def text(result):
    console = Console(file=io.StringIO(), width=160)
    console.print(render_plan(result))
    return console.file.getvalue()


def plan_and_measure(preset, batch, precision):
    """Return (planned, measured) bytes of two steps of `mezzotint train`.

    Measured is what torch allocates on a GPU, and on a CPU the growth of the process's peak
    resident memory after a warm-up with the same network on a batch of 2.
    """
    from mezzotint.train.loop import train

    recipe = make_recipe(
        preset,
        "model.num_classes=10",
        "model.channels=1",
        "model.size=64",
        "data.source=digits",
        f"batch={batch}",
        f"images={2 * batch}",
        f"engine.precision={precision}",
        "samples.count=1",
        "samples.steps=1",
    )
    cuda = torch.cuda.is_available()

    def run(changed):
        with tempfile.TemporaryDirectory() as folder:
            train(changed, Path(folder) / "run", quiet=True)

    run(config.override(recipe, ["batch=2", "images=4"]))
    gc.collect()
    if cuda:
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(recipe)
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        base = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run(recipe)
        peak = resident("VmHWM")
    planned = plan(recipe, device="h200" if cuda else "cpu", compare=False)
    return planned["memory"][0]["total"], peak - base


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset through Linux's /proc"
)
@pytest.mark.parametrize(("preset", "batch", "precision"), MEASURED)
def test_planned_memory_is_within_a_tenth_of_the_measured(preset, batch, precision):
    # With a fixed threshold malloc returns freed tensors at once, as the count assumes.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, preset, str(batch), precision],
        capture_output=True, text=True, env=environment, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    planned, measured = json.loads(done.stdout)
    assert planned == pytest.approx(measured, rel=0.1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(plan_and_measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])))


@pytest.mark.parametrize(
    ("most", "memory", "fitting"), [(96, 64, 64), (96, 96, 96), (64, 40, 32), (7, 5, 4), (1, 1, 1)]
)
def test_the_time_of_a_step_is_of_the_images_that_fit(monkeypatch, most, memory, fitting):
    """A device with room for `memory` images; a step takes a second an image."""
    clock = SimpleNamespace(now=0.0)

    def make_step(model, settings):
        if settings.batch > memory:
            raise torch.OutOfMemoryError("too large")

        def step():
            clock.now += settings.batch

        return step

    monkeypatch.setattr(
        planning, "make_benchmark_model", lambda settings: SimpleNamespace(train=dict)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(planning, "make_training_step", make_step)
    monkeypatch.setattr(planning, "_read_wall_clock", lambda device: clock.now)
    recipe = recipe_for("unet-tiny")
    assert planning.time_step(recipe, "bf16", 1, most, "cuda") == (fitting, fitting)
