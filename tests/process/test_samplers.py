"""Samplers: identities, exact ends, moments of the stochastic ones, errors, adding a file."""

from __future__ import annotations

import inspect
import itertools
import math
import textwrap

import pytest
import torch
from torch.testing import assert_close

import mezzotint.process.samplers as samplers
from helpers.closed_forms import answer, gaussian, gaussian_flow, mixture
from mezzotint.process import schedules
from mezzotint.process.denoiser import Cond, Denoised
from mezzotint.process.logsnr import alpha, sigma
from mezzotint.process.samplers import grids, registry
from mezzotint.process.samplers.ancestral import mean_and_bounds
from mezzotint.process.samplers.dpmpp_singlestep import fast_plan, step

TWO = mixture([-0.7, 0.6], 0.3, [0.4, 0.6])


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def state(count=6, dtype=torch.float64):
    return torch.randn(count, 3, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(3))


def silent(i, z):
    return torch.zeros_like(z)


def recorded(denoise):
    """Return the denoiser, and a list to which each call adds its log-SNR."""
    calls: list[float] = []

    def recording(z, logsnr, cond):
        assert logsnr.shape == (len(z),)
        calls.append(float(logsnr[0]))
        return denoise(z, logsnr, cond)

    return recording, calls


# ---- every sampler -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_a_clean_grid_ends_in_the_denoised_image(name, steps):
    last: list[torch.Tensor] = []

    def denoise(z, logsnr, cond):
        out = TWO(z, logsnr, cond)
        last.append(out.x)
        return out

    grid = grids.even(schedules.cosine(), steps)
    image = registry[name](denoise, state(), grid, Cond())
    assert image.isfinite().all()
    assert_close(image, last[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", registry)
def test_a_constant_denoiser_gives_its_image_exactly(name):
    """If the denoiser always returns one image, any grid ends in it to the last digit."""
    only = state(dtype=torch.float64).tanh()

    def denoise(z, logsnr, cond):
        return answer(z, only, logsnr)

    image = registry[name](denoise, state(), grids.even(schedules.cosine(), 9), Cond())
    assert_close(image, only, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", registry)
def test_dtype_and_input_do_not_change(name):
    z = state(dtype=torch.float32)
    before = z.clone()
    image = registry[name](gaussian(0.1, 0.5), z, grids.even(schedules.cosine(), 4), Cond())
    assert image.dtype == torch.float32
    assert image.shape == z.shape
    assert torch.equal(z, before)


@pytest.mark.parametrize("name", registry)
@pytest.mark.parametrize("clean", [True, False])
def test_calls(name, clean):
    """One call per step, EDM's Heun two but one to a clean end, JiT's two but one in the last.

    Never at the grid's end, and all rising.
    """
    denoise, calls = recorded(TWO)
    grid = grids.even_logsnr(schedules.cosine(), 11, clean=clean)
    registry[name](denoise, state(), grid, Cond())
    expected = {"heun": 2 * 11 - clean, "flow_heun": 2 * 11 - 1}
    assert len(calls) == expected.get(name, 11)
    assert calls == sorted(calls)
    assert calls[0] == grid[0]
    if name not in expected:
        assert calls == grid[:-1].tolist()


@pytest.mark.parametrize("name", registry)
def test_images_do_not_depend_on_the_batch(name):
    z = state()
    grid = grids.even(schedules.cosine(), 5)
    noise = {"noise": lambda i, z: torch.full_like(z, 0.3 + i)}
    options = noise if "noise" in inspect.signature(registry[name]).parameters else {}
    together = registry[name](TWO, z, grid, Cond(), **options)
    alone = torch.cat([registry[name](TWO, row[None], grid, Cond(), **options) for row in z])
    assert_close(together, alone, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", registry)
@pytest.mark.parametrize(
    "bad",
    [
        [],
        [1.0],
        [1.0, 1.0],
        [2.0, 1.0],
        [-math.inf, 0.0],
        [0.0, math.inf, math.inf],
        [0.0, math.nan],
    ],
)
def test_bad_grids(name, bad):
    with pytest.raises(ValueError, match="grid"):
        registry[name](TWO, state(), torch.tensor(bad), Cond())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"eta": -0.1}),
        ("ddim", {"eta": 1.5}),
        ("ancestral", {"variance": "large"}),
        ("ancestral", {"variance": 1.1}),
        ("ancestral", {"last": "median"}),
        ("ancestral", {"variance": "learned"}),  # of a denoiser that predicts none
        ("heun", {"s_churn": -1.0}),
        ("heun", {"s_min": 2.0, "s_max": 1.0}),
        ("dpmpp_singlestep", {"order": 4}),
        ("dpmpp_singlestep", {"plan": "slow"}),
        ("dpmpp_singlestep", {"plan": "fixed", "order": 2}),  # 4 steps, one of them to +inf
        ("sde_dpmpp_3m", {"eta": -1.0}),
        ("unipc", {"order": 0}),
        ("unipc", {"variant": "bh3"}),
    ],
)
def test_bad_options(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        registry[name](TWO, state(), grids.even(schedules.cosine(), 4), Cond(), **options)


def test_a_new_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "jump_for_the_test.py").write_text(
        textwrap.dedent("""
            from mezzotint.process.samplers import grids, intervals, level, sampler

            @sampler("jump_for_the_test")
            def jump(denoise, z, grid, cond):
                t, _ = next(iter(intervals(grid)))
                return denoise(z, level(t, z), cond).x

            @grids.grid("grid_for_the_test")
            def two(schedule, steps):
                return grids.even(schedule, steps)[-2:]
            """)
    )
    monkeypatch.setattr(samplers, "__path__", [*samplers.__path__, str(tmp_path)])
    for found in (registry, grids.registry):
        monkeypatch.setattr(found, "_entries", dict(found._entries))
        monkeypatch.setattr(found, "_scanned", False)
    jump = registry["jump_for_the_test"]
    z = state()
    assert_close(
        jump(TWO, z, float64(-3, 5), Cond()), TWO(z, torch.full((6,), -3.0).double(), Cond()).x
    )
    assert "grid_for_the_test" in grids.registry


# ---- identities ----------------------------------------------------------------------------------


def test_first_order_solvers_agree():
    """DDIM, Euler on the straight line, and DPM-Solver++ of order 1 are the same step."""
    grid = grids.even(schedules.cosine(), 8, end=0.05, clean=False)
    expected = registry["ddim"](TWO, state(), grid, Cond())
    assert_close(registry["euler"](TWO, state(), grid, Cond()), expected, rtol=0, atol=1e-12)
    assert_close(
        registry["dpmpp_singlestep"](TWO, state(), grid, Cond(), order=1),
        expected,
        rtol=0,
        atol=1e-12,
    )


def test_ddim_with_eta_one_is_ancestral():
    grid = grids.even(schedules.cosine(), 8)

    def noise(i, z):
        return torch.sin(torch.arange(z.numel(), dtype=z.dtype) + i).reshape(z.shape)

    expected = registry["ancestral"](TWO, state(), grid, Cond(), noise=noise)
    assert_close(
        registry["ddim"](TWO, state(), grid, Cond(), eta=1.0, noise=noise),
        expected,
        rtol=0,
        atol=1e-12,
    )


def test_edm_step_by_hand():
    """One churned Heun step written out in EDM's own symbols."""
    t, s = float64(-3.0)[0], float64(-1.0)[0]
    z = state()
    drawn = state(12)[6:]
    now, then = torch.exp(-t / 2), torch.exp(-s / 2)
    hat = now * (1 + min(0.8 / 1, math.sqrt(2) - 1))

    def denoised(y, sd):
        level = (-2 * sd.log()).expand(len(y))
        return TWO(y * alpha(level[0]), level, Cond()).x

    y = z / alpha(t) + (hat**2 - now**2).sqrt() * 1.007 * drawn
    d = (y - denoised(y, hat)) / hat
    guess = y + (then - hat) * d
    y = y + (then - hat) * (d + (guess - denoised(guess, then)) / then) / 2
    image = registry["heun"](
        TWO,
        z,
        float64(-3, -1),
        Cond(),
        s_churn=0.8,
        s_min=0.1,
        s_max=50.0,
        s_noise=1.007,
        noise=lambda i, z: drawn,
    )
    assert_close(image, alpha(s) * y, rtol=0, atol=1e-12)


def test_churn_acts_between_its_bounds():
    grid = grids.karras(schedules.cosine(), 6)
    plain = registry["heun"](TWO, state(), grid, Cond())
    outside = registry["heun"](TWO, state(), grid, Cond(), s_churn=3.0, s_min=100.0)
    inside = registry["heun"](TWO, state(), grid, Cond(), s_churn=3.0, s_min=0.05, s_max=50.0)
    assert torch.equal(plain, outside)
    assert not torch.allclose(plain, inside)


@pytest.mark.parametrize(
    ("calls", "order", "plan"),
    [
        (250, 3, [3] * 83 + [1]),
        (12, 3, [3, 3, 3, 2, 1]),
        (11, 3, [3, 3, 3, 2]),
        (1, 3, [1]),
        (2, 3, [2]),
        (3, 3, [2, 1]),
        (7, 2, [2, 2, 2, 1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_fast_plan(calls, order, plan):
    assert fast_plan(calls, order) == plan
    assert sum(plan) == calls


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_fixed_plan(order):
    """Steps of one order; DPM-Solver's singlestep_fixed is the same as its fast plan at 1 and 2."""
    grid = torch.linspace(-4, 4, 13, dtype=torch.float64)
    run = registry["dpmpp_singlestep"]
    fixed = run(TWO, state(), grid, Cond(), order=order, plan="fixed")
    assert torch.equal(fixed, run(TWO, state(), grid, Cond(), order=order)) == (order < 3)
    by_hand = state()
    for start in range(0, 12, order):
        at = list(grid[start : start + order + 1].unbind())
        by_hand = step(TWO, by_hand, at, Cond())
    assert torch.equal(fixed, by_hand)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("clean", [True, False])
def test_sde_dpmpp_3m_without_noise_is_dpmpp_3m(clean, lower):
    grid = grids.even_logsnr(schedules.cosine(), 8, logsnr_min=-6.0, logsnr_max=6.0, clean=clean)
    options = {"lower_order_final": lower}
    still = registry["sde_dpmpp_3m"](TWO, state(), grid, Cond(), eta=0.0, **options)
    assert torch.equal(still, registry["dpmpp_3m"](TWO, state(), grid, Cond(), **options))
    noisy = registry["sde_dpmpp_3m"](TWO, state(), grid, Cond(), **options)
    assert not torch.allclose(still, noisy, atol=1e-2)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("variance", ["posterior", "upper", 0.3])
def test_ancestral_can_end_with_the_mean_of_its_last_step(steps, variance):
    """lucidrains' continuous-time DDPM: the step to the finite clean end draws nothing."""
    grid, drawn = grids.even(schedules.cosine(logsnr_max=10.0), steps, clean=False), []

    def noise(i, z):
        drawn.append(i)
        return torch.full_like(z, 0.5)

    z = registry["ancestral"](
        TWO, state(), grid, Cond(), variance=variance, last="mean", noise=noise
    )
    assert drawn == list(range(steps - 1))
    # The same steps, each mean written as lucidrains does, from x and c alone.
    expected, mix = state(), {"posterior": 0.0, "upper": 1.0}.get(variance, variance)
    for i, (t, s) in enumerate(itertools.pairwise(grid)):
        x, c = TWO(expected, t.expand(6), Cond()).x, -torch.expm1(t - s)
        expected = alpha(s) * (expected * (1 - c) / alpha(t) + c * x)
        if i < steps - 1:
            small, large = sigma(s) ** 2 * c, sigma(t) ** 2 * c
            expected = expected + 0.5 * (small ** (1 - mix) * large**mix).sqrt()
    assert_close(z, expected)


def test_ancestral_step_is_the_posterior():
    """Mean and bounds against Bayes' rule for q(z_s | z_t, x), and against DDPM's beta."""
    t, s = float64(-2.0)[0], float64(0.5)[0]
    z, x = state()[:3], state()[3:]
    a = alpha(t) / alpha(s)
    step = sigma(t) ** 2 - a**2 * sigma(s) ** 2  # variance of q(z_t | z_s)
    precision = 1 / sigma(s) ** 2 + a**2 / step
    mean = (alpha(s) * x / sigma(s) ** 2 + a * z / step) / precision
    got, low, high = mean_and_bounds(z, x, t, s)
    assert_close(got, mean, rtol=0, atol=1e-14)
    assert_close(low.exp(), 1 / precision, rtol=1e-13, atol=0)
    assert_close(high.exp(), step, rtol=1e-13, atol=0)


def test_variances_mix_in_log():
    """Posterior, upper and 0.25 between; a learned answer of -1, 1 and -0.5 is the same three."""
    t, s = -2.0, 0.5
    z = state()

    def noise_std(variance, var=None):
        def denoise(z, logsnr, cond):
            out = TWO(z, logsnr, cond)
            return Denoised(out.x, out.eps, None if var is None else torch.full_like(z, var))

        def run(noise):
            return registry["ancestral"](
                denoise, z, float64(t, s), Cond(), variance=variance, noise=noise
            )

        return (run(lambda i, z: torch.ones_like(z)) - run(silent)).mean()

    _, low, high = mean_and_bounds(z, z, float64(t)[0], float64(s)[0])
    for name, mix, var in (("posterior", 0.0, -1.0), ("upper", 1.0, 1.0), (0.25, 0.25, -0.5)):
        expected = torch.exp((mix * high + (1 - mix) * low) / 2)
        for std in (noise_std(name), noise_std(mix), noise_std("learned", var)):
            assert_close(std, expected, rtol=1e-12, atol=0)


# ---- moments of the stochastic samplers: on a Gaussian they are linear, so the moments come
# without chance

MEAN, STD = 0.3, 0.5


def moments(name, steps, **options):
    """Return mean and variance of a sampler's result for z ~ N(0, 1).

    From its response to the start and to each draw alone.
    """
    grid = torch.linspace(-8.0, 6.0, steps + 1, dtype=torch.float64)
    rows = torch.eye(steps + 1, dtype=torch.float64)

    def noise(i, z):
        return rows[:, i + 1].reshape(-1, 1, 1, 1)

    start = rows[:, 0].reshape(-1, 1, 1, 1) * sigma(grid[0])
    image = registry[name](gaussian(0.0, STD), start, grid, Cond(), noise=noise, **options)
    alone = start[:1] * 0 + alpha(grid[0]) * MEAN
    mean = registry[name](gaussian(MEAN, STD), alone, grid, Cond(), noise=silent, **options)
    # The start holds data too: N(alpha mean, alpha^2 std^2 + sigma^2).
    image[0] *= (1 + (alpha(grid[0]) * STD / sigma(grid[0])) ** 2).sqrt()
    return float(mean), float(image.square().sum()), grid[-1]


STOCHASTIC = [
    ("ancestral", {"variance": "posterior"}, 1),
    ("ancestral", {"variance": "upper"}, 1),
    ("ancestral", {"variance": 0.5}, 1),
    ("ddim", {"eta": 1.0}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("heun", {"s_churn": 10.0}, 2),
    ("sde_dpmpp_2m", {}, 2),
    ("sde_dpmpp_3m", {"lower_order_final": False}, 2),
    ("sde_dpmpp_3m", {"eta": 0.5, "lower_order_final": False}, 2),
]


@pytest.mark.parametrize(("name", "options", "order"), STOCHASTIC, ids=lambda v: str(v))
def test_moments(name, options, order):
    errors = []
    for steps in (100, 400):
        mean, variance, end = moments(name, steps, **options)
        assert mean == pytest.approx(float(alpha(end)) * MEAN, abs=0.3 / steps)
        errors.append(abs(variance - float(alpha(end) ** 2 * STD**2 + sigma(end) ** 2)))
    assert errors[1] < 1e-2
    assert math.log(errors[0] / errors[1], 4) > order - 0.3


def test_moments_of_the_mixture():
    """The share of each half, its mean and its spread, from 5,000 draws of 400 steps."""
    generator = torch.Generator().manual_seed(11)
    z = torch.randn(5000, 1, 1, 1, generator=generator)

    def noise(i, z):
        return torch.randn(z.shape, generator=generator)

    grid = grids.even(schedules.cosine(), 400)
    for name in ("ancestral", "sde_dpmpp_2m", "sde_dpmpp_3m"):
        image = registry[name](TWO, z, grid, Cond(), noise=noise).flatten()
        right = image[image > 0]
        assert len(right) / len(image) == pytest.approx(0.6, abs=0.02)
        assert right.mean() == pytest.approx(0.6, abs=0.02)
        assert right.std() == pytest.approx(0.3, abs=0.02)


def test_flow_of_a_gaussian():
    """A full run against the closed form, on a usual grid."""
    grid = grids.even(schedules.cosine(), 200, start=0.98, end=0.02, clean=False)
    expected = gaussian_flow(state(), grid[0], grid[-1], MEAN, STD)
    for name in ("heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_singlestep", "unipc"):
        assert_close(
            registry[name](gaussian(MEAN, STD), state(), grid, Cond()), expected, rtol=0, atol=2e-3
        )
