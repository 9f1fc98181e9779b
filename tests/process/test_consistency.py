"""Consistency tuning and its sampler: closed forms on a Gaussian, pairs of levels, both passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from helpers.closed_forms import answer
from helpers.tiny_models import tiny
from mezzotint.core.registry import Spec, build
from mezzotint.models import load_model, save_model
from mezzotint.process import objectives, prediction, samplers, schedules
from mezzotint.process.denoiser import Cond, Model, Parameterisation
from mezzotint.process.logsnr import alpha, append_dims, diffuse, sigma
from mezzotint.process.objectives.consistency import consistency_loss, sigma_ratio
from mezzotint.process.samplers import grids
from mezzotint.sampling.sample import count_network_calls, generate, make_logsnr_steps
from mezzotint.sampling.settings import SamplingSettings

STD = 0.5  # c of the Gaussian data
BOUND, UNBOUND = ("v", "flow", "edm"), ("x", "eps")


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def logsnr_of(*sigmas):
    return -2 * float64(*sigmas).log()


class Gains(nn.Module):
    """A backbone of the v row whose denoised image is g y, with one gain g per noise level."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels  # log-SNRs
        self.gain = nn.Parameter(torch.ones(len(levels), dtype=torch.float64))

    def forward(self, z, noise, cond):
        i = (self.levels - noise[:, None]).abs().argmin(1)
        a, s, g = (append_dims(t, z) for t in (alpha(noise), sigma(noise), self.gain[i]))
        return [(a * z - g * z / a) / s]  # x = a z - s v


def uncorrelated():
    """Return an image x ~ N(0, STD^2) and its noise, whose second moments are exact."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(48, 2, dtype=torch.float64, generator=g)
    x, eps = (torch.linalg.qr(rows).Q * math.sqrt(48)).T.reshape(2, 1, 3, 4, 4)
    return STD * x, eps


def fit_gains(ratio):
    """Return noise levels a factor `ratio` apart and their gains, fitted from the cleanest up."""
    count = math.ceil(math.log(80 / 0.1) / -math.log(ratio))
    sigmas = 80 * ratio ** torch.arange(count, -1, -1, dtype=torch.float64)
    model = Model(Gains(-2 * sigmas.log()), Parameterisation(kind=prediction.v, noise=lambda l: l))
    gain = model.backbone.gain
    x, eps = uncorrelated()
    for i, level in enumerate(model.backbone.levels):
        lower = float64(ratio if i else 0.0)
        with torch.no_grad():
            gain[i] = gain[i - 1] if i else 1.0
        for _ in range(4):  # Newton's method on the gain of this level
            loss = consistency_loss(model, x, eps, level[None], lower, Cond(), huber=10.0).sum()
            (slope,) = torch.autograd.grad(loss, gain, create_graph=True)
            (curvature,) = torch.autograd.grad(slope[i], gain)
            with torch.no_grad():
                gain[i] -= slope[i] / curvature[i]
    return sigmas, gain.detach()


def test_fitted_gains_of_a_gaussian_approach_the_map_of_its_flow():
    """For N(0, c^2) the map is c y / sqrt(c^2 + sigma^2). One gain per level has the closed form
    g_t = g_r (c^2 + t r) / (c^2 + t^2), which tends to it with t - r."""
    errors = []
    for ratio in (0.5, 0.5**0.5):
        t, gain = fit_gains(ratio)
        r = torch.cat([t.new_zeros(1), t[:-1]])
        product = ((STD**2 + t * r) / (STD**2 + t**2)).cumprod(0)
        assert_close(gain, product, rtol=1e-5, atol=0)
        errors.append(float((gain / (STD / (STD**2 + t**2).sqrt()))[-1].log().abs()))
    # of first order in log(t / r)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("row", BOUND)
def test_at_r_0_it_is_the_denoising_loss(row):
    model = tiny(prediction=row)
    x, eps = torch.randn(2, 5, 3, 8, 8)
    logsnr = torch.linspace(-8, 8, 5)
    guess = model(diffuse(x, eps, logsnr), logsnr, Cond()).x
    expected = (guess - x).square().sum((1, 2, 3)).sqrt() / torch.exp(-logsnr / 2)
    zero = torch.zeros(5)
    assert_close(consistency_loss(model, x, eps, logsnr, zero, Cond()), expected)
    # The first stages have no r > 0 at low noise.
    whole = build(objectives.registry, Spec("consistency"))
    low = torch.full((5,), 4.0)
    assert_close(
        whole(model, x, eps, low, Cond()), consistency_loss(model, x, eps, low, zero, Cond())
    )


@pytest.mark.parametrize("huber", [0.0, 0.03])
def test_at_r_t_dropout_cancels(huber):
    """The same mask in both passes: the difference is zero, in every image, and so its gradient."""
    model = tiny(dropout=0.5).train().requires_grad_(True)
    x, eps = torch.randn(2, 5, 3, 8, 8)
    logsnr = torch.linspace(-8, 8, 5)
    z = diffuse(x, eps, logsnr)
    assert not torch.equal(model(z, logsnr, Cond()).x, model(z, logsnr, Cond()).x)
    loss = consistency_loss(model, x, eps, logsnr, torch.ones(5), Cond(), huber)
    assert torch.equal(loss, torch.zeros(5))
    loss.sum().backward()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_the_order_of_the_passes_does_not_matter():
    model = tiny(dropout=0.5).train().requires_grad_(True)
    x, eps = torch.randn(2, 5, 3, 8, 8)
    logsnr, ratio = torch.linspace(-8, 8, 5), torch.tensor([0.1, 0.5, 0.9, 0.99, 0.999])
    cond = Cond(label=torch.arange(5))
    torch.manual_seed(3)
    loss = consistency_loss(model, x, eps, logsnr, ratio, cond)
    after = torch.rand(1)
    loss.sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    lower = logsnr - 2 * ratio.log()
    torch.manual_seed(3)
    with torch.no_grad():
        target = model(diffuse(x, eps, lower), lower, cond).x
    torch.manual_seed(3)
    guess = model(diffuse(x, eps, logsnr), logsnr, cond).x
    assert torch.equal(torch.rand(1), after)  # the next microbatch draws another mask
    distance = torch.linalg.vector_norm(guess - target, dim=(1, 2, 3))
    other = distance / (torch.exp(-logsnr / 2) * (1 - ratio))
    assert torch.equal(loss, other)
    other.sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(ours, model.parameters(), strict=True))


def test_bf16_autocast_leaves_the_gradient_to_every_weight():
    """Autocast keeps the weights that it has cast: those of the target's pass have no gradient."""
    model = tiny().requires_grad_(True)
    x, eps = torch.randn(2, 3, 3, 8, 8)
    logsnr = torch.linspace(-3, 3, 3)
    cond = Cond(label=torch.arange(3))
    gradients = []
    for low in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = consistency_loss(model, x, eps, logsnr, torch.full((3,), 0.5), cond)
        assert loss.dtype == torch.float32
        loss.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_the_gap_between_levels():
    """ECT: r/t = 1 - (1 + k sigmoid(-b t)) / q^(stage + 1), not below zero."""
    t = float64(1e-6, 1.0, 80.0)
    assert_close(sigma_ratio(t, 0), float64(0, 0, 0.5), rtol=0, atol=1e-12)
    assert_close(sigma_ratio(t, 3), 1 - (1 + 8 * torch.sigmoid(-t)) / 16)
    assert_close(sigma_ratio(t, 7, k=0), float64(*[255 / 256] * 3))
    assert_close(sigma_ratio(t, 0, q=256, k=2, b=0.5), 1 - (1 + 2 * torch.sigmoid(-t / 2)) / 256)
    assert torch.equal(sigma_ratio(t, 10**6), torch.ones(3).double())  # beyond every float


def test_the_stage_grows_by_images():
    model = tiny()
    x, eps = torch.randn(2, 2, 3, 8, 8)
    logsnr = torch.tensor([-4.0, 1.0])
    growing = build(objectives.registry, Spec("consistency", {"stage_images": 100}))
    for images, stage in ((0, 0), (99, 0), (100, 1), (350, 3)):
        ratio = sigma_ratio(torch.exp(-logsnr / 2), stage)
        expected = consistency_loss(model, x, eps, logsnr, ratio, Cond())
        loss = objectives.at_images(growing, images)(model, x, eps, logsnr, Cond())
        assert_close(loss, expected)
    fixed = build(objectives.registry, Spec("consistency", {"q": 256.0}))
    early, late = (
        objectives.at_images(fixed, n)(model, x, eps, logsnr, Cond()) for n in (0, 10**9)
    )
    assert torch.equal(early, late)
    plain = build(objectives.registry, Spec("eps_mse"))
    assert objectives.at_images(plain, 100) is plain


def test_the_pseudo_huber_norm():
    model = tiny()
    x, eps = torch.randn(2, 2, 3, 8, 8)
    logsnr, ratio = torch.tensor([-4.0, 1.0]), torch.tensor([0.5, 0.9])
    gap = torch.exp(-logsnr / 2) * (1 - ratio)
    norm = gap * consistency_loss(model, x, eps, logsnr, ratio, Cond())
    for c in (0.03, 3.0):
        loss = consistency_loss(model, x, eps, logsnr, ratio, Cond(), huber=c)
        assert_close(loss, ((norm**2 + c**2).sqrt() - c) / gap)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": 1.0}, "q 1.0 must be above 1"),
        ({"stage_images": 0}, "stage_images 0"),
        ({"huber": -1.0}, "huber"),
        ({"stages": 8}, "stage_images"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(objectives.registry, Spec("consistency", options))


# ---- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", BOUND + UNBOUND)
def test_rows_whose_image_is_bound_at_both_ends(row):
    """Any output of v, flow and edm gives z / alpha at the clean end, and a bounded image at 80."""
    z, out = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    clean, noisy = logsnr_of(1e-7), logsnr_of(80.0)
    kind = prediction.named(row)
    bound = torch.allclose(prediction.solve(kind, z, out, clean)[0], z / alpha(clean), atol=1e-5)
    bounded = prediction.solve(kind, z, out, noisy)[0].abs().max() < 10
    assert bound == (row != "x")
    assert bounded == (row != "eps")
    if row in BOUND:
        prediction.check_consistency_row(kind, "it")
    else:
        with pytest.raises(ValueError, match=f"v, flow or edm; this network predicts {row}"):
            prediction.check_consistency_row(kind, "it")


@pytest.mark.parametrize("row", UNBOUND)
def test_training_and_sampling_refuse_the_others(row):
    model = tiny(prediction=row)
    loss = build(objectives.registry, Spec("consistency"))
    with pytest.raises(ValueError, match=f"objective consistency needs .* predicts {row}"):
        loss(model, *torch.randn(2, 1, 3, 8, 8), torch.zeros(1), Cond())
    settings = SamplingSettings(sampler=Spec("consistency"), steps=2)
    for use in (
        lambda: generate(model, [0], Cond(label=torch.tensor([0])), settings),
        lambda: count_network_calls(model, settings),
    ):
        with pytest.raises(ValueError, match=f"sampler consistency needs .* predicts {row}"):
            use()


# ---- the sampler ---------------------------------------------------------------------------------


def test_the_levels_of_1_2_and_4_steps():
    def sigmas(steps):
        levels = grids.registry["consistency"](schedules.cosine(), steps)
        assert levels[-1] == math.inf
        return torch.exp(-levels[:-1] / 2)

    assert_close(sigmas(1), float64(80))
    assert_close(sigmas(2), float64(80, 0.821))
    assert len(sigmas(4)) == 4
    assert sigmas(4)[0] == pytest.approx(80)
    for steps in (0, 3, 50):
        with pytest.raises(ValueError, match=f"{steps} steps .* 1, 2 or 4"):
            sigmas(steps)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_denoise_and_add_fresh_noise(steps):
    """x = f(80 n, 80), then x = f(x + sigma n, sigma) at each later level."""

    def f(y, s):
        return torch.tanh(y / (1 + s)) + 0.1 * s

    def denoise(z, logsnr, cond):
        level = append_dims(logsnr, z)
        return answer(z, f(z / alpha(level), torch.exp(-level / 2)), logsnr)

    def noise(i, z):
        return torch.cos(z + i)

    levels = grids.registry["consistency"](schedules.cosine(), steps)
    n = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    first, *later = torch.exp(-levels[:-1] / 2)
    x = f(first * n, first)
    z = sigma(levels[0]) * n
    for i, s in enumerate(later):
        fresh = torch.cos(z + i)
        x, z = f(x + s * fresh, s), alpha(levels[i + 1]) * x + sigma(levels[i + 1]) * fresh
    run = samplers.registry["consistency"]
    start = sigma(levels[0]) * n
    assert_close(run(denoise, start, levels, Cond(), noise=noise), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_map_of_a_gaussian_gives_its_variance(steps):
    def denoise(z, logsnr, cond):
        level = append_dims(logsnr, z)
        s = torch.exp(-level / 2)
        return answer(z, STD * z / alpha(level) / (STD**2 + s**2).sqrt(), logsnr)

    g = torch.Generator().manual_seed(1)
    z = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=g)
    levels = grids.registry["consistency"](schedules.cosine(), steps)
    x = samplers.registry["consistency"](
        denoise, z, levels, Cond(), noise=lambda i, z: torch.randn(z.shape, generator=g).to(z)
    )
    assert float(x.std()) == pytest.approx(STD, rel=0.01)


def test_a_saved_model_samples_the_same_in_any_batch(tmp_path):
    model = tiny()
    save_model(model, tmp_path / "model")
    settings = SamplingSettings(sampler=Spec("consistency"), steps=4)
    cond = Cond(label=torch.arange(6))
    images = generate(model, range(6), cond, settings)
    assert count_network_calls(model, settings) == 4
    assert make_logsnr_steps(model, settings)[0] == pytest.approx(-2 * math.log(80))
    again = load_model(tmp_path / "model").eval().requires_grad_(False)
    assert torch.equal(generate(again, range(6), cond, settings), images)
    alone = generate(again, [4], Cond(label=torch.tensor([4])), settings)
    assert torch.equal(alone[0], images[4])
