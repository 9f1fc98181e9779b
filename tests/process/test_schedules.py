"""Schedules: closed forms, quantiles, tables, inverse and slope, errors, adding a file."""

from __future__ import annotations

import inspect
import math
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from mezzotint.core import rng
from mezzotint.process import schedules
from mezzotint.process.schedules import Table, continuous, invert, registry, slope
from mezzotint.process.schedules.linear_vp import linear_vp_time

# Every registered schedule that can be built without being told anything; `ddpm` needs its betas.
NAMES = [
    name
    for name in registry
    if all(p.default is not p.empty for p in inspect.signature(registry[name]).parameters.values())
]
U = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:-1]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- every schedule ------------------------------------------------------------------------------


def test_public_names():
    for name in (
        "cosine",
        "cosine_interpolated",
        "lognormal",
        "linear_vp",
        "ddpm",
        "scaled_linear",
    ):
        assert getattr(schedules, name) is registry[name]


@pytest.mark.parametrize("name", NAMES)
def test_decreasing(name):
    curve = continuous(registry[name]())
    assert (curve(U).diff() < 0).all()
    assert (registry[name]()(U).diff() <= 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shape_and_dtype(name, shape):
    schedule = registry[name]()
    u = torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05
    exact = schedule(u)
    assert exact.shape == shape
    assert exact.dtype == torch.float64
    for dtype in (torch.float32, torch.bfloat16):
        single = schedule(u.to(dtype))
        assert single.dtype == torch.float32
        # Computed in float64 from the u given: only the rounding of the answer remains.
        assert_close(single.double(), schedule(u.to(dtype).double()), rtol=1e-6, atol=1e-6)


TABLES = [name for name in NAMES if isinstance(registry[name](), Table)]


@pytest.mark.parametrize("name", NAMES)
def test_inverse(name):
    schedule = registry[name]()
    curve = continuous(schedule)
    assert_close(invert(schedule, curve(U)), U, rtol=0, atol=1e-12)
    beyond = invert(schedule, float64(math.inf, -math.inf))
    assert_close(beyond, float64(0, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_the_derivative(name):
    schedule = registry[name]()
    curve = continuous(schedule)
    # Off the knots of a table, where the curve has a corner.
    u = (torch.arange(1, 99, dtype=torch.float64) + 0.0043) / 100
    h = 1e-6
    assert_close(slope(schedule, u), (curve(u + h) - curve(u - h)) / (2 * h), rtol=1e-5, atol=0)
    with torch.inference_mode():
        assert_close(slope(schedule, u), slope(schedule, u.clone()))


def test_a_new_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "straight_for_the_test.py").write_text(
        textwrap.dedent("""
            from mezzotint.process.schedules import schedule

            @schedule("straight_for_the_test")
            def straight(end=10.0):
                return lambda u: end * (1 - 2 * u)
            """)
    )
    monkeypatch.setattr(schedules, "__path__", [*schedules.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_scanned", False)
    assert_close(registry["straight_for_the_test"]()(float64(0, 0.5, 1)), float64(10, 0, -10))


# ---- closed forms --------------------------------------------------------------------------------


def test_cosine_is_the_cosine():
    """Without bounds alpha = cos(pi t / 2); with them the ends are met and the middle is zero."""
    wide = schedules.cosine(logsnr_min=-60.0, logsnr_max=60.0)
    assert_close(torch.sigmoid(wide(U)).sqrt(), torch.cos(math.pi / 2 * U), rtol=1e-10, atol=0)
    assert_close(schedules.cosine()(float64(0, 0.5, 1)), float64(15, 0, -15), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("image_d", "noise_d", "shift"),
    [
        (128, 64, -1.386294),
        (256, 64, -2.772589),
        (512, 64, -4.158883),
        (128, 32, -2.772589),
        (512, 32, -5.545177),
    ],
)
def test_shift_comes_after_the_bounds(image_d, noise_d, shift):
    shifted = schedules.cosine(image_d, noise_d)
    assert_close(shifted(U) - schedules.cosine()(U), torch.full_like(U, shift), rtol=0, atol=1e-6)
    assert_close(shifted(float64(0, 1)), float64(15 + shift, -15 + shift), rtol=0, atol=1e-6)


def test_interpolated_order():
    """The noisy end of the low reference, the clean end of the high (order A of the spec)."""
    mixed = schedules.cosine_interpolated(512, 32, 256, -15.0, 15.0)
    low, high = schedules.cosine(512, 32), schedules.cosine(512, 256)
    assert_close(mixed(float64(0, 1)), torch.cat([high(float64(0)), low(float64(1))]))
    assert_close(mixed(float64(0.5)), (low(float64(0.5)) + high(float64(0.5))) / 2)
    assert_close(mixed(float64(0.95, 0.05)), float64(-10.4, 3.5), rtol=0, atol=0.06)
    assert_close(
        schedules.cosine_interpolated(256, 64, 64, -15.0, 15.0)(U), schedules.cosine(256, 64)(U)
    )


def test_lognormal_quantiles():
    """Uniform u gives normal log sigma with EDM's mean and standard deviation."""
    schedule = schedules.lognormal(-1.2, 1.2)
    log_sigma = -schedule(rng.uniform("time", 0, list(range(4000)))) / 2
    assert log_sigma.mean() == pytest.approx(-1.2, abs=4 * 1.2 / 4000**0.5)
    assert log_sigma.std() == pytest.approx(1.2, abs=4 * 1.2 / 8000**0.5)
    assert_close(schedule(float64(0.5)), float64(2.4))
    # One standard deviation above the mean is the quantile 0.841...
    assert_close(schedule(float64(0.8413447460685429)), float64(0.0), rtol=0, atol=1e-12)


def test_linear_vp_by_quadrature():
    """alpha^2 = exp(-integral of beta), by the trapezium rule, exact for a line."""
    schedule = schedules.linear_vp(0.1, 20.0)
    for t in (1e-4, 0.2, 0.7, 1.0):
        integral = t * (0.1 + (0.1 + t * 19.9)) / 2
        assert_close(
            torch.sigmoid(schedule(float64(t))), float64(math.exp(-integral)), rtol=1e-12, atol=0
        )
    assert schedule(float64(0)) == math.inf


@given(t=st.floats(1e-9, 1.0), low=st.floats(1e-3, 1.0), rise=st.floats(0.0, 30.0))
def test_linear_vp_time_is_the_inverse(t, low, rise):
    logsnr = schedules.linear_vp(low, low + rise)(float64(t))
    assert_close(linear_vp_time(logsnr, low, low + rise), float64(t), rtol=1e-9, atol=0)


def test_flow():
    """alpha / sigma = (1 - t) / t, moved by the shift as simple diffusion's is."""
    flow = registry["flow"]
    assert_close(torch.exp(flow()(U) / 2), (1 - U) / U)
    moved = 3 * U / (1 + 2 * U)
    assert_close(flow(shift=3.0)(U), flow()(moved))


# ---- tables --------------------------------------------------------------------------------------


def test_table_of_given_betas():
    table = schedules.ddpm([0.1, 0.2, 0.5])
    alpha2 = float64(0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.5)
    assert_close(table.logsnr, torch.log(alpha2 / (1 - alpha2)))
    assert_close(
        table(float64(0.01, 1 / 3, 0.34, 2 / 3, 0.67, 1.0)), table.logsnr[[0, 0, 1, 1, 2, 2]]
    )
    assert_close(schedules.ddpm(float64(0.1, 0.2, 0.5)).logsnr, table.logsnr)


@pytest.mark.parametrize("name", TABLES)
def test_uniform_u_draws_each_entry_equally(name):
    """A look-up: each entry owns exactly 1/N of u."""
    table = registry[name]()
    u = (torch.arange(10 * len(table), dtype=torch.float64) + 0.5) / (10 * len(table))
    found, counts = table(u).unique(return_counts=True)
    assert torch.equal(found, table.logsnr.flip(0))
    assert (counts == 10).all()
    n = torch.arange(1, len(table) + 1)
    for u in (n / len(table), n.double() / len(table), (n / len(table)).double()):
        assert_close(table(u).double(), table.logsnr, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_index(name):
    """Integers at the entries, exactly, in either precision; the inverse curve between them."""
    table = registry[name]()
    whole = torch.arange(len(table))
    assert torch.equal(table.index(table.logsnr), whole.double())
    assert torch.equal(table.index(table.logsnr.float()), whole.float())
    t = rng.uniform("time", 1, list(range(2000)))
    held = (t * len(table) - 1).clamp(0)
    assert_close(table.index(table.interpolated(t)), held, rtol=0, atol=1e-6)
    assert table.index(float64(math.inf, 80.0, -80.0, -math.inf)).tolist() == [
        0,
        0,
        len(table) - 1,
        len(table) - 1,
    ]
    assert table.index(torch.zeros(2, 3)).shape == (2, 3)


@pytest.mark.parametrize("name", TABLES)
def test_interpolated_meets_the_entries(name):
    table = registry[name]()
    n = torch.arange(1, len(table) + 1, dtype=torch.float64)
    assert_close(table.interpolated(n / len(table)), table.logsnr, rtol=0, atol=1e-8)
    assert table.interpolated(float64(0)) == math.inf
    # Halfway between two entries log alpha is their mean.
    log_alpha = torch.nn.functional.logsigmoid(table.logsnr) / 2
    half = torch.nn.functional.logsigmoid(table.interpolated((n[:-1] + 0.5) / len(table))) / 2
    assert_close(half, (log_alpha[1:] + log_alpha[:-1]) / 2, rtol=1e-9, atol=0)


def test_published_ends():
    """alpha^2 ends at 4.0358e-5 (DDPM) and 4.6601e-3 (Stable Diffusion); cosine betas at 0.999."""
    assert torch.sigmoid(schedules.linear_ddpm().logsnr[-1]) == pytest.approx(
        4.03582977e-5, rel=1e-8
    )
    assert torch.sigmoid(schedules.scaled_linear().logsnr[-1]) == pytest.approx(
        0.004660098513, rel=1e-9
    )
    cosine = torch.sigmoid(registry["cosine_ddpm"]().logsnr)
    assert 1 - cosine[-1] / cosine[-2] == pytest.approx(0.999, rel=1e-9)
    curve = torch.sigmoid(registry["cosine_vp"]()(torch.arange(1, 900, dtype=torch.float64) / 1000))
    assert_close(cosine[:899], curve, rtol=1e-9, atol=0)
    assert registry["cosine_vp"]()(torch.ones(())) == -torch.inf  # pure noise, and nothing else
    assert registry["cosine_vp"]()(torch.zeros(())) == torch.inf


def test_bounds_that_overflow():
    for low in (-61.0, -2000.0):
        with pytest.raises(ValueError, match=r"-60\.\.\.1000"):
            schedules.cosine(logsnr_min=low)
    ends = schedules.cosine(logsnr_min=-60.0, logsnr_max=1000.0)(torch.tensor([1.0, 0.0]).double())
    torch.testing.assert_close(ends, torch.tensor([-60.0, 1000.0]).double(), rtol=0, atol=1e-3)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"image_d": 0}, "image_d 0"),
        ("cosine", {"logsnr_min": 5.0, "logsnr_max": -5.0}, "logsnr_min 5.0"),
        ("cosine_interpolated", {"noise_d_low": 256, "noise_d_high": 32}, "exchanged"),
        ("lognormal", {"std": 0.0}, "std 0.0"),
        ("linear_vp", {"beta_min": 20.0, "beta_max": 0.1}, "beta_min 20.0"),
        ("ddpm", {"betas": []}, "betas"),
        ("ddpm", {"betas": [0.1, 1.0]}, "beta 1 is not in"),
        ("linear_ddpm", {"steps": 0}, "0 steps"),
        ("linear_ddpm", {"steps": 20, "scaled": True}, "more than 20 steps"),
        ("linear_ddpm", {"beta_min": -0.1}, "beta -0.1 is not in"),
        ("scaled_linear", {"steps": 0}, "0 steps"),
        ("scaled_linear", {"beta_min": -0.1}, "beta_min -0.1"),
        ("cosine_ddpm", {"s": 0.0}, "offset s"),
        ("flow", {"shift": -1.0}, "shift -1.0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        registry[name](**options)


@pytest.mark.parametrize("steps", [21, 50, 250, 1000, 4000])
def test_linear_betas_scaled_to_the_number_of_steps(steps):
    """ADM and DiT: numpy.linspace(scale 0.0001, scale 0.02, steps), scale = 1000 / steps."""
    betas = np.linspace(0.1 / steps, 20 / steps, steps, dtype=np.float64)
    product = np.cumprod(1 - betas)
    logsnr = torch.from_numpy(np.log(product) - np.log1p(-product))
    assert_close(schedules.linear_ddpm(steps, scaled=True).logsnr, logsnr, rtol=1e-9, atol=1e-9)
