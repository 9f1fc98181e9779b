"""The terms of the likelihood against closed forms, on data whose exact denoiser is known."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.closed_forms import gaussian, mixture
from mezzotint.process import likelihood, schedules
from mezzotint.process.denoiser import Cond
from mezzotint.process.likelihood import (
    diffusion_levels,
    diffusion_term,
    flow_log_density,
    prior_term,
    reconstruction_term,
)
from mezzotint.process.schedules import invert, slope

LOW, HIGH = -15.0, 15.0
LIBRARY = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # k / 127.5 - 1
VDM = 2 * (torch.arange(256, dtype=torch.float64) + 0.5) / 256 - 1


def normal(*shape: int, seed: int = 0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def even(count: int):
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def gaussian_diffusion(std: float, low: float, high: float) -> float:
    """diff of N(0, std^2) in nats per dimension: 1/2 [ln(1 + c^2 e^l1) - ln(1 + c^2 e^l0)]."""
    return (math.log1p(std**2 * math.exp(high)) - math.log1p(std**2 * math.exp(low))) / 2


def measured_diffusion(std: float, logsnr, measure, pixels: int = 4_000) -> float:
    """The same by `diffusion_term`, with one draw per level."""
    x, eps = std * normal(len(logsnr), 1, 1, pixels), normal(len(logsnr), 1, 1, pixels, seed=1)
    terms = diffusion_term(gaussian(0.0, std), x, eps, logsnr, measure, Cond())
    return float(terms.mean()) / pixels


@pytest.mark.parametrize("std", [0.5, 0.2, 1.0])
def test_the_diffusion_term_of_a_gaussian_has_its_closed_form(std):
    logsnr, measure = diffusion_levels(even(64), LOW, HIGH)
    expected = gaussian_diffusion(std, LOW, HIGH)
    assert measured_diffusion(std, logsnr, measure) == pytest.approx(expected, rel=0.01)


def test_the_bound_of_a_gaussian_is_its_entropy():
    """With a Gaussian decoder: 1/2 ln(2 pi e c^2), 0.725791 at c = 1/2."""
    c, pixels = 0.5, 10_000
    x = c * normal(1, 1, 1, pixels)
    x *= c / x.square().mean().sqrt()  # the prior and the entropy depend on x by its square alone
    prior = float(prior_term(x, LOW)) / pixels
    exact = (c**2 / (1 + math.exp(15)) + 1 / (1 + math.exp(-15)) - 1) / 2
    exact += math.log1p(math.exp(-15)) / 2
    assert prior == pytest.approx(exact, rel=1e-6)
    decoder = math.log(2 * math.pi * math.e * math.exp(-HIGH)) / 2  # of N(z1 / alpha1, e^-l1)
    total = decoder + prior + gaussian_diffusion(c, LOW, HIGH)
    assert total == pytest.approx(0.725791, abs=2e-6)
    logsnr, measure = diffusion_levels(even(64), LOW, HIGH)
    measured = decoder + prior + measured_diffusion(c, logsnr, measure)
    assert measured == pytest.approx(0.725791, abs=0.05)


@pytest.mark.parametrize("name", ["cosine", "linear_vp", "lognormal", "flow"])
def test_the_diffusion_term_does_not_depend_on_the_schedule(name):
    """u is uniform between the schedule's u of both ends, which are equal for all."""
    options = {"cosine": {"image_d": 32}}.get(name, {})
    schedule = schedules.registry[name](**options)
    low, high = -4.0, 4.0
    first, last = invert(schedule, torch.tensor([high, low])).tolist()
    u = first + (last - first) * even(200)
    measure = -slope(schedule, u) * (last - first)
    expected = gaussian_diffusion(0.5, low, high)
    logsnr = schedule(u)
    assert measured_diffusion(0.5, logsnr, measure, 1000) == pytest.approx(expected, rel=0.03)


def test_the_discrete_term_falls_to_the_continuous_one():
    """With the levels of all steps, and the same noise, in every count."""
    limit = gaussian_diffusion(0.5, -5.0, 13.3)
    values = []
    for steps in (4, 16, 64, 256):
        logsnr, measure = diffusion_levels(even(steps), -5.0, 13.3, steps)
        h = 18.3 / steps
        # Sum over steps of 1/2 expm1(h) E ||eps - eps_hat||^2, whose mean is known.
        mean_error = 0.25 * logsnr.exp() / (1 + 0.25 * logsnr.exp())
        exact = float((math.expm1(h) * mean_error / 2).sum())
        values.append(measured_diffusion(0.5, logsnr, measure, 128_000 // steps))
        assert values[-1] == pytest.approx(exact, rel=0.02)
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(limit, rel=0.05)
    assert values[-1] > limit


def test_draws_of_a_step_are_at_its_noisier_level_and_sum_to_all_steps():
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.9999, 1.0], dtype=torch.float64)
    logsnr, measure = diffusion_levels(u, -2.0, 2.0, 4)
    assert logsnr.tolist() == [-2, -2, -1, 0, 1, 1]
    assert measure.tolist() == [4 * math.expm1(1.0)] * 6
    logsnr, measure = diffusion_levels(u, -2.0, 2.0)
    assert logsnr.tolist() == pytest.approx([-2, -1.0004, -1, 0, 1.9996, 2])
    assert measure.tolist() == [4.0] * 6


@pytest.mark.parametrize("values", [LIBRARY, VDM])
def test_the_decoder_is_a_softmax_over_the_codes(values):
    """Against the formula as it is written, for a clean end at which neighbours overlap."""
    codes = torch.randint(0, 256, (3, 2, 5, 5), generator=torch.Generator().manual_seed(0))
    codes[0, 0, 0, :2] = torch.tensor([0, 255])
    eps, l1 = normal(3, 2, 5, 5), 9.0
    level = torch.tensor(l1, dtype=torch.float64)
    z = torch.sigmoid(level).sqrt() * values[codes] + torch.sigmoid(-level).sqrt() * eps
    logits = -math.exp(l1) / 2 * (z[..., None] / torch.sigmoid(level).sqrt() - values).square()
    expected = -logits.log_softmax(-1).gather(-1, codes[..., None]).flatten(1).sum(1)
    found = reconstruction_term(codes.to(torch.uint8), eps, l1, values)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert found.min() > 1


def test_many_elements_are_decoded_in_parts(monkeypatch):
    codes = torch.arange(66, dtype=torch.uint8).reshape(2, 1, 3, 11)
    eps = normal(2, 1, 3, 11)
    whole = reconstruction_term(codes, eps, 9.0, LIBRARY)
    monkeypatch.setattr(likelihood, "CHUNK", 16)
    assert torch.equal(reconstruction_term(codes, eps, 9.0, LIBRARY), whole)


def test_one_constant_image_costs_nothing():
    codes = torch.full((4, 1, 8, 8), 200, dtype=torch.uint8)
    x, eps = LIBRARY[codes.long()], normal(4, 1, 8, 8)
    logsnr, measure = diffusion_levels(even(4), LOW, HIGH)
    perfect = gaussian(float(LIBRARY[200]), 0.0)
    terms = [
        reconstruction_term(codes, eps, HIGH, LIBRARY),
        prior_term(x, LOW),
        diffusion_term(perfect, x, eps, logsnr, measure, Cond()),
    ]
    assert all(term.abs().max() / 64 < 1e-6 for term in terms)


@pytest.mark.parametrize("p", [0.5, 0.25, 0.1])
def test_a_pixel_of_two_values_costs_its_entropy(p):
    """Exactly a share p of pixels has the first of two neighbouring codes."""
    pixels, levels = 1500, 96
    codes = torch.full((levels, 1, 1, pixels), 101, dtype=torch.uint8)
    codes[..., : int(p * pixels)] = 100
    x = LIBRARY[codes.long()]
    denoise = mixture(LIBRARY[100:102].tolist(), 0.0, [p, 1 - p])
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)

    def bound(high: float, steps: int | None) -> float:
        logsnr, measure = diffusion_levels(even(levels), LOW, high, steps)
        diffusion = diffusion_term(denoise, x, normal(*x.shape, seed=3), logsnr, measure, Cond())
        decoder = reconstruction_term(codes[:4], normal(4, 1, 1, pixels), high, LIBRARY)
        prior = prior_term(x[:1], LOW)
        return float(diffusion.mean() + decoder.mean() + prior.mean()) / pixels

    coarse, finer, continuous = bound(HIGH, 24), bound(HIGH, 96), bound(HIGH, None)
    assert coarse > finer > continuous
    assert continuous == pytest.approx(entropy, rel=0.03)
    assert finer > entropy
    # A noisier end leaves the decoder to choose among all codes, without the mixture's knowledge.
    assert bound(9.0, None) > 1.5 * entropy


def even_steps(count: int, low: float = LOW, high: float = HIGH):
    return torch.linspace(high, low, count + 1, dtype=torch.float64)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.3, 0.2)])
def test_the_flow_of_a_gaussian_has_its_density(mean, std):
    x = mean + std * normal(5, 2, 3, 3)
    probes = normal(5, 2, 3, 3, seed=9).sign()
    found = flow_log_density(gaussian(mean, std), x, probes, even_steps(160), Cond())
    # The state at the clean end has the variance of its noise too.
    variance = std**2 + math.exp(-HIGH)
    log_p = -((x - mean).square() / variance + math.log(2 * math.pi * variance)) / 2
    assert found.tolist() == pytest.approx(log_p.flatten(1).sum(1).tolist(), abs=0.05)


def test_the_flow_is_integrated_to_second_order():
    x, probes = 0.5 * normal(4, 1, 4, 4), normal(4, 1, 4, 4, seed=9).sign()
    log_p = -(x.square() / 0.25 + math.log(2 * math.pi * 0.25)) / 2
    exact = log_p.flatten(1).sum(1)
    errors = [
        float(
            (flow_log_density(gaussian(0.0, 0.5), x, probes, even_steps(n), Cond()) - exact)
            .abs()
            .mean()
        )
        for n in (24, 48, 96)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.3)
