"""Benchmarks: order of contenders, peak memory, counts, and the switches of benchmarks/speed.py."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from helpers.launch import run_here
from mezzotint.core.registry import Spec
from mezzotint.data.text_encoder import MAX_TOKENS
from mezzotint.models import create_model
from mezzotint.tools import benchmark, summary

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_contenders_run_in_turn_after_a_warm_up(monkeypatch):
    ran = []
    ticks = iter([0.0, 3.0, 10.0, 11.0, 20.0, 25.0, 30.0, 31.0, 40.0, 44.0, 50.0, 51.0])
    monkeypatch.setattr(benchmark, "read_clock", lambda device: next(ticks))
    works = {"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}
    assert benchmark.time_interleaved(works, "cpu", rounds=3) == {"a": 4.0, "b": 1.0}
    assert ran == ["a", "b"] * 4


def test_peak_bytes_of_known_allocations():
    def work():
        a = torch.ones(1_000_000)  # 4 MB
        b = torch.ones(500_000)  # 2 MB
        del a
        return torch.ones(250_000), b  # 1 MB

    assert benchmark.measure_peak_bytes(work, "cpu") == pytest.approx(6e6, rel=0.01)


def test_matmul_rate_is_operations_over_seconds(monkeypatch):
    ticks = iter([float(t) for t in range(16)])  # every product takes one second
    monkeypatch.setattr(benchmark, "read_clock", lambda device: next(ticks))
    assert benchmark.measure_matmul_flops("cpu", "float32", side=10) == 2000.0


@pytest.mark.parametrize("mode", ["train", "sample"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_benchmark_of_a_preset(mode, precision, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_matmul_flops", lambda device, precision: 1e12)
    settings = benchmark.BenchmarkSettings(
        preset="dimr-tiny",
        overrides={"size": 16},
        batch=2,
        rounds=1,
        precision=precision,
        objective=Spec("pyramid"),
    )
    row = benchmark.run_benchmark(settings, mode)
    assert json.loads(json.dumps(row)) == row
    full = summary.read_summary("dimr-tiny")["gmac"]
    assert row["gmac"] == pytest.approx(full / 4, rel=0.05)  # a quarter of the cells
    assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
    passes = 3 if mode == "train" else 2
    assert row["achieved_flops"] == pytest.approx(2e9 * row["gmac"] * passes * 2 / row["seconds"])
    assert row["fraction"] == row["achieved_flops"] / 1e12
    assert (row["latency_seconds"] is None) == (mode == "train")
    assert row["peak_bytes"] > 0
    assert benchmark.render_benchmark([row])


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        (["size=64"], {"size": 64}),
        (["model.size=64"], {"size": 64}),
        (["model.size=64", "num_classes=3"], {"size": 64, "num_classes": 3}),
    ],
)
def test_fields_of_a_model_are_named_with_and_without_it(fields, changed, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "run_benchmark", lambda *given: asked.append(given) or {})
    run_here("bench", "unet-tiny", *fields, "--json")
    assert [mode for _, mode in asked] == ["train", "sample"]
    for settings, _ in asked:
        assert {name: settings.overrides.get(name) for name in changed} == changed


def test_checkpointing_lowers_the_peak():
    peaks = []
    for checkpointing in ("none", "full"):
        settings = benchmark.BenchmarkSettings(
            preset="dimr-tiny",
            batch=8,
            checkpointing=checkpointing,
            objective=Spec("pyramid"),
            rounds=1,
        )
        model = benchmark.make_benchmark_model(settings)
        model.train()
        step = benchmark.make_training_step(model, settings)
        step()
        peaks.append(benchmark.measure_peak_bytes(step, "cpu"))
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"batch": 0}, "batch 0"),
        ({"rounds": 0}, "rounds 0"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"graphs": True}, "graphs"),
    ],
)
def test_invalid_settings(options, value):
    with pytest.raises(ValueError, match=value):
        benchmark.BenchmarkSettings(preset="uvit-tiny", **options)


@pytest.fixture
def benchmark_module(monkeypatch):
    """Return a function that imports a module of benchmarks/, which is not a package."""
    if not BENCHMARKS.exists():
        pytest.skip(f"{BENCHMARKS} is absent")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("common", "speed", "scaling") or name.split(".")[0] == "plain":
            del sys.modules[name]


@pytest.fixture
def speed(benchmark_module):
    return benchmark_module("speed")


def test_switches_keep_the_gradients(speed):
    """Each optimised form and the plain one that replaces it give the same gradients."""
    pairs = {
        name: speed.make(*speed.networks(small=True)[name], "cpu") for name in ("dimr-2r", "diffit")
    }
    for family, name, swap in speed.forms.SWITCHES:
        pair = pairs["dimr-2r" if family == "dimr" else family]
        gradients = []
        for context in (None, swap()):
            step = pair.train("ours", False)
            if context is None:
                step()
            else:
                with context:
                    step()
            gradients.append(
                torch.cat([p.grad.flatten() for p in pair.ours.parameters() if p.grad is not None])
            )
        difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
        assert difference < 1e-5, (name, float(difference))


def test_pairs_hold_the_same_weights(speed):
    for family, config, batch in speed.networks(small=True).values():
        pair = speed.make(family, config, batch, "cpu")
        with torch.no_grad():
            ours = pair.ours.raw(pair.x, pair.logsnr, pair.cond)[-1]
            theirs = pair.plain.raw(pair.x, pair.logsnr, pair.cond)[-1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fitted_exponent(benchmark_module):
    exponent = benchmark_module("scaling").exponent
    assert exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_text_networks_are_timed_with_captions():
    """As many tokens as training pads captions to, all of them read."""
    model = create_model("uvit-text-tiny")
    _, _, cond = benchmark.random_inputs(model, 3, "cpu")
    width = model.info.config.text_dim
    assert cond.text is not None
    assert cond.text.shape == (3, MAX_TOKENS, width)
    assert cond.text_mask is not None
    assert cond.text_mask.all()
    _, _, plain = benchmark.random_inputs(create_model("uvit-tiny"), 3, "cpu")
    assert plain.text is None
