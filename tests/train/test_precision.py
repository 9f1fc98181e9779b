"""A run that leaves its precision to the machine computes in the faster one."""

from __future__ import annotations

import time

import pytest
import torch

from helpers.runs import small
from mezzotint import config
from mezzotint.config import Engine
from mezzotint.train import precision
from mezzotint.train.loop import train
from mezzotint.train.precision import choose_precision

AUTO = Engine(precision="auto")


@pytest.fixture
def machine(monkeypatch):
    """Return a function that gives a processor's support for bf16 and seconds of one product."""

    def pretend(float32: float, bf16: float, supported: bool = True) -> None:
        real = torch.mm

        def mm(a, b):
            time.sleep(float32 if a.dtype == torch.float32 else bf16)
            return real(a[:1, :1], b[:1, :1])

        monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: supported)
        monkeypatch.setattr(torch, "mm", mm)
        precision._cpu_gains_from_bf16.cache_clear()

    yield pretend
    precision._cpu_gains_from_bf16.cache_clear()


@pytest.mark.parametrize(
    ("float32", "bf16", "supported", "chosen"),
    [
        (0.04, 0.01, True, "bf16"),
        (0.01, 0.04, True, "float32"),  # AVX512-BF16 whose products take twice as long
        (0.03, 0.03, True, "float32"),
        (0.04, 0.01, False, "float32"),
    ],
)
def test_a_cpu_computes_in_bf16_only_where_its_products_gain(
    float32, bf16, supported, chosen, machine
):
    machine(float32, bf16, supported)
    assert choose_precision(AUTO, "cpu") == chosen


@pytest.mark.parametrize("asked", ["float32", "bf16"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "h200"])
def test_a_given_precision_is_kept(asked, device, machine):
    machine(*((0.01, 0.04) if asked == "bf16" else (0.04, 0.01)))
    assert choose_precision(Engine(precision=asked), device) == asked


def test_a_planned_gpu_computes_in_bf16(machine):
    machine(0.01, 0.04)
    assert choose_precision(AUTO, "h200") == "bf16"


def test_the_measurement_draws_nothing_from_the_global_generator(machine):
    machine(0.001, 0.001)
    before = torch.get_rng_state()
    choose_precision(AUTO, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("first", "later"), [("bf16", "float32"), ("float32", "bf16")])
def test_a_run_that_has_started_keeps_its_precision(first, later, tmp_path, monkeypatch):
    """A second measurement must not change the bits of a run."""
    gains = {"bf16": True, "float32": False}
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    for now, images in ((first, 32), (later, 64)):
        monkeypatch.setattr(precision, "_cpu_gains_from_bf16", lambda now=now: gains[now])
        train(small("engine.precision=auto", f"images={images}"), tmp_path, quiet=True)
        assert config.from_yaml(tmp_path / "recipe.yaml").engine.precision == first


def test_a_run_in_bf16_goes_on_in_float32_where_there_is_no_bf16(tmp_path, monkeypatch):
    train(small("engine.precision=bf16", "images=32"), tmp_path, quiet=True)
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: False)
    precision._cpu_gains_from_bf16.cache_clear()
    train(small("engine.precision=auto", "images=64"), tmp_path, quiet=True)
    precision._cpu_gains_from_bf16.cache_clear()
    assert config.from_yaml(tmp_path / "recipe.yaml").engine.precision == "float32"
