"""`mezzotint.tools.memory` and `mezzotint.plan` against networks that are counted by hand, run for real, and measured."""

from __future__ import annotations

import ctypes
import gc
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

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
from mezzotint.tools.memory import LiveBytes, StepMemoryEstimator
from mezzotint.tools.plan import (
    ACCELERATORS,
    AHEAD,
    Accelerator,
    detect_device,
    gathered_bytes,
    optimiser_bytes,
    plan,
    render,
)
from mezzotint.train.step import prefetch

MIB = 2**20
# Heavy in activations, so that an interpreter's own few MiB do not matter; digits, whose pixels are few.
MEASURED = [("unet-tiny", 128, "bf16"), ("dimr-tiny", 48, "float32"), ("diffit-tiny", 32, "bf16")]


# The smallest network with every kind of layer of its family.
SMALL = ["model.size=16", "model.width=8", "model.emb_dim=16", "model.multipliers=[1,2]", "model.blocks=[1,1]",
         "model.attention=[false,true]", "model.heads=1"]  # fmt: skip


def recipe(preset, *overrides):
    return config.override(recipe_for(preset), [*overrides])


def on_meta(chosen):
    with torch.device("meta"):
        return build_model(preset_info(chosen.preset, **chosen.model))


def player(chosen, *, bf16=False, checkpointing="none", gradients_leave=True):
    return StepMemoryEstimator(
        on_meta(chosen),
        build(objectives.registry, chosen.objective),
        weights=torch.float32,
        bf16=bf16,
        checkpointing=checkpointing,
        gradients_leave=gradients_leave,
    )


def test_live_counts_each_storage_while_it_lives():
    weight = torch.ones(8)
    with LiveBytes([weight]) as live:
        a = torch.ones(16)  # 64 bytes
        b = a.view(4, 4)  # the same storage
        c = a * 2 + weight.repeat(
            2
        )  # two temporaries of 64 beside the result, then only the result
        assert live.now == 128
        assert live.peak == 256
        del a, b
        assert live.now == 64
        weight.mul_(2)
        assert live.now == 64
    del c
    assert live.now == 0


def test_live_counts_what_autograd_keeps():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with LiveBytes([*net.parameters()]) as live:
        x = torch.ones(5, 8)
        y = net(x)
        assert live.now == 3 * 160  # input, hidden, output
        y.sum().backward()
        assert live.now == 2 * 160 + 2 * (64 + 8) * 4  # hidden is gone, gradients are there


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_played_step_holds_what_a_real_one_does(bf16, checkpointing):
    chosen = recipe("unet-tiny", *SMALL)
    model = build_model(preset_info(chosen.preset, **chosen.model)).train()
    model.backbone.checkpointing = checkpointing
    objective = build(objectives.registry, chosen.objective)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        x = torch.randn(4, 3, 16, 16)
        eps, logsnr = torch.randn_like(x), torch.zeros(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective(model, x, eps, logsnr, Cond())
        loss.sum().backward()
    played = player(chosen, bf16=bf16, checkpointing=checkpointing, gradients_leave=False).peak(4)
    assert played == pytest.approx(live.peak, rel=0.03)  # kernels may be chosen by device


def test_checkpointing_and_leaving_gradients_hold_less():
    chosen = recipe("unet-tiny", *SMALL, "model.emb_dim=512")
    plain = player(chosen).peak(8)
    selective, full = (player(chosen, checkpointing=how).peak(8) for how in ("selective", "full"))
    assert full < 0.8 * selective
    assert selective < 0.8 * plain
    staying = player(chosen, gradients_leave=False, checkpointing="full")
    assert staying.peak(1) > 1.5 * player(chosen, checkpointing="full").peak(1)


def test_the_largest_batch_fits_and_one_a_little_larger_does_not():
    played = player(recipe("unet-tiny", *SMALL), checkpointing="full")
    for room, near in ((4 * MIB, 64), (100 * MIB, 1)):
        most = played.largest(room, near)
        assert played.peak(most) <= 1.02 * room
        assert played.peak(most + max(1, most // 20)) > room
    assert played.largest(1000, 4) == 0


def test_what_the_ranks_share():
    chosen = recipe("unet-tiny", *SMALL, "engine.precision=float32", "ema.power_stds=[0.05]")
    model = on_meta(chosen)
    count = sum(p.numel() for p in model.parameters())
    answer = json.loads(json.dumps(plan(chosen, gpus=4, device="a100")))
    ddp, _, _, fsdp, _, _ = answer["memory"]
    assert [(c["strategy"], c["checkpointing"]) for c in answer["memory"]] == [
        (way, again) for way in ("ddp", "fsdp") for again in ("none", "selective", "full")
    ]
    assert answer["params"] == count
    assert ddp["gradients"] == 4 * count
    assert ddp["optimiser"] == 8 * count
    assert ddp["averages"] == 2 * 4 * count  # the exponential one and one power function
    for key in ("weights", "gradients", "optimiser", "averages"):
        assert fsdp[key] == ddp[key] // 4
    assert (
        ddp["batches"] == 4 * 16 * 2 * 4 * 3 * 16**2
    )  # four ahead, 16 images a rank, with their noise
    assert inspect.signature(prefetch).parameters["most"].default == AHEAD
    assert ddp["gathered"] == 0 < fsdp["gathered"] == gathered_bytes(model, 4)
    for c in answer["memory"]:
        assert c["total"] == sum(v for k, v in c.items() if k in (
            "weights", "gradients", "optimiser", "averages", "batches", "gathered", "activations"))  # fmt: skip
        assert c["fits"]
    assert "ddp fits" in answer["advice"][0]
    printed = text(answer)
    assert "fsdp, full checkpointing" in " ".join(printed.split())
    assert "a100" in printed


def test_time_is_arithmetic_that_is_stated():
    chosen = recipe("unet-tiny", "images=1e6", "batch=64", "engine.precision=bf16", *SMALL)
    a, b = (
        plan(chosen, device="h200", compare=False),
        plan(chosen, device="h200", efficiency=0.7, compare=False),
    )
    assert a["flop"] == pytest.approx(6 * a["gmac"] * 1e9 * 1e6)
    assert a["seconds_per_step"] == pytest.approx(64 * 6 * a["gmac"] * 1e9 / (0.35 * 790e12))
    assert a["days"] * 86400 * a["images_per_second"] == pytest.approx(1e6)
    assert b["days"] == pytest.approx(a["days"] / 2)
    again = plan(
        config.override(chosen, ["engine.checkpointing=full"]), device="h200", compare=False
    )
    assert again["seconds_per_step"] == pytest.approx(a["seconds_per_step"] * 4 / 3)
    assert again["flop"] == a["flop"]


def test_a_step_that_does_not_fit_says_what_would(monkeypatch):
    monkeypatch.setitem(
        ACCELERATORS, "thimble", Accelerator(memory=24e6, bf16=1e12, float32=1e12, source="-")
    )
    answer = plan(recipe("unet-tiny", *SMALL, "batch=256"), device="thimble", compare=False)
    most = answer["memory"][0]["largest_microbatch"]
    assert not answer["memory"][0]["fits"]
    assert 0 < most < 256
    even = int(re.search(r"engine.microbatch=(\d+)", " ".join(answer["advice"]))[1])
    assert 256 % even == 0
    assert even <= most
    parted = recipe("unet-tiny", *SMALL, "batch=256", f"engine.microbatch={even}")
    fitting = plan(parted, device="thimble", compare=False)
    assert fitting["memory"][0]["gradients"] > 0  # they stay from one microbatch to the next
    assert fitting["memory"][0]["fits"]


def test_muon_keeps_one_moment_of_its_matrices():
    adam, muon = (recipe("uvit-tiny", f"optim.name={name}") for name in ("adamw", "muon"))
    model = on_meta(adam)
    count = sum(p.numel() for p in model.parameters())
    assert optimiser_bytes(adam, model) == 8 * count
    assert 4 * count < optimiser_bytes(muon, model) < 8 * count


def test_errors_say_what_to_try():
    chosen = recipe("unet-tiny")
    with pytest.raises(ValueError, match="did you mean"):
        plan(chosen, device="h20")
    with pytest.raises(ValueError, match="try batch=63"):
        plan(chosen, gpus=3)
    for gpus in (0, -8):
        with pytest.raises(ValueError, match=f"gpus {gpus} must be at least 1"):
            plan(chosen, gpus=gpus)
    for efficiency in (0, 35):
        with pytest.raises(ValueError, match=f"efficiency {efficiency} "):
            plan(chosen, efficiency=efficiency)
    with pytest.raises(ValueError, match="size 1000000 is beyond what can be counted"):
        plan(recipe("unet-tiny", "model.size=1000000"))


@pytest.mark.parametrize(
    ("gpu", "memory", "row"),
    [
        ("NVIDIA H200", 150e9, "h200"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "a100"),
        ("NVIDIA A100-PCIE-40GB", 42e9, "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", 25e9, "rtx4090"),
        ("Other X1", 8e9, None),
    ],
)
def test_this_machines_gpu_by_its_name(monkeypatch, gpu, memory, row):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, memory))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert detect_device() == row
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect_device() == "cpu"


def test_commands_print_the_plan(capsys):
    from mezzotint.cli import evaluation, training

    evaluation.plan(
        "unet-tiny", tuple(SMALL), batch=8, device="cpu", checkpointing="full", json=True
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["batch"] == 8
    assert "with full checkpointing fits" in answer["advice"][0]
    with pytest.raises(ValueError, match="efficiency 0"):
        evaluation.plan("unet-tiny", efficiency=0.0)
    training.train("unet-tiny", ("batch=8", *SMALL), dry_run=True)
    printed = capsys.readouterr().out
    assert "difference from the recipe" in printed
    assert "images per forward pass" in printed


def text(answer):
    console = Console(file=io.StringIO(), width=160)
    console.print(render(answer))
    return console.file.getvalue()


def planned_and_measured(preset, batch, precision):
    """(plan's bytes, measured bytes) of two steps of `mezzotint train`: on a GPU what torch allocates, else the
    growth of the process's peak resident memory after a warm-up with the same network on a batch of 2.
    """
    from mezzotint.train.loop import train

    chosen = recipe(
        preset, "model.num_classes=10", "model.channels=1", "model.size=64", "data.source=digits", f"batch={batch}",
        f"images={2 * batch}", f"engine.precision={precision}", "samples.count=1", "samples.steps=1",
    )  # fmt: skip
    cuda = torch.cuda.is_available()

    def run(changed):
        with tempfile.TemporaryDirectory() as folder:
            train(changed, Path(folder) / "run", quiet=True)

    run(config.override(chosen, ["batch=2", "images=4"]))
    gc.collect()
    if cuda:
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(chosen)
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        base = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run(chosen)
        peak = resident("VmHWM")
    return plan(chosen, device="h200" if cuda else "cpu", compare=False)["memory"][0][
        "total"
    ], peak - base


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset through Linux's /proc"
)
@pytest.mark.parametrize(("preset", "batch", "precision"), MEASURED)
def test_memory_is_within_a_tenth_of_what_is_measured(preset, batch, precision):
    # A fixed threshold makes malloc give freed tensors back at once, as the count does; by default it grows.
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
    print(json.dumps(planned_and_measured(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
