"""The noise of stochastic samplers: the same numbers, drawn ahead or not."""

import threading

import pytest
import torch

from helpers.tiny_models import tiny
from mezzotint.core import rng
from mezzotint.core.registry import Spec
from mezzotint.process.denoiser import Cond
from mezzotint.sampling import sample as sample_module
from mezzotint.sampling.noise import NoiseAhead
from mezzotint.sampling.sample import generate
from mezzotint.sampling.settings import SamplingSettings

Z = torch.zeros(3, 2, 4, 4)
SEEDS = [5, 0, 2**40]


@pytest.mark.parametrize("asked", [[0, 1, 2, 3, 4], [2, 3, 9, 10, 40], [0]])
def test_every_draw_is_that_of_its_number(asked):
    with NoiseAhead(SEEDS, (2, 4, 4), Z.device, draws_ahead=2) as noise:
        drawn = [noise(i, Z) for i in asked]
    for i, values in zip(asked, drawn, strict=True):
        assert torch.equal(values, rng.normal("sampler", 0, SEEDS, (2, 4, 4), draw=i))


def test_the_next_draws_are_made_by_a_thread_meanwhile(monkeypatch):
    real, drawn, done = rng.normal, [], threading.Event()

    def recorded(*arguments, draw):
        drawn.append((draw, threading.current_thread() is threading.main_thread()))
        if draw == 2:
            done.set()
        return real(*arguments, draw=draw)

    monkeypatch.setattr(rng, "normal", recorded)
    with NoiseAhead(SEEDS, (2, 4, 4), Z.device, draws_ahead=2) as noise:
        noise(0, Z)
        assert done.wait(60)  # without being asked for 1 and 2
    assert drawn == [(0, False), (1, False), (2, False)]


def test_a_cpu_draws_when_asked_and_deterministic_samplers_nowhere():
    with NoiseAhead(SEEDS, (2, 4, 4), torch.device("cpu")) as noise:
        noise(0, Z)
        assert noise.pool is None
    assert NoiseAhead(SEEDS, (2, 4, 4), torch.device("cuda")).draws_ahead == 2


def test_an_error_of_the_thread_reaches_the_sampler(monkeypatch):
    def broken(*arguments, draw):
        raise MemoryError(f"draw {draw}")

    monkeypatch.setattr(rng, "normal", broken)
    with (
        NoiseAhead(SEEDS, (2, 4, 4), Z.device, draws_ahead=2) as noise,
        pytest.raises(MemoryError, match="draw 0"),
    ):
        noise(0, Z)


@pytest.mark.parametrize("sampler", ["ancestral", "sde_dpmpp_3m", "heun"])
def test_samples_are_the_same_with_noise_drawn_ahead(sampler, monkeypatch):
    options = {"s_churn": 40.0} if sampler == "heun" else {}
    model, cond = tiny(), Cond(label=torch.tensor([1, 2]))
    settings = SamplingSettings(sampler=Spec(sampler, options), steps=4)
    plain = generate(model, [3, 4], cond, settings)

    def ahead(seeds, shape, device):
        return NoiseAhead(seeds, shape, device, draws_ahead=2)

    monkeypatch.setattr(sample_module, "NoiseAhead", ahead)
    assert torch.equal(generate(model, [3, 4], cond, settings), plain)
