"""The order of convergence of every deterministic sampler, against an answer known to 1e-10."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from helpers.closed_forms import gaussian, gaussian_flow, linear_guidance, mixture, runge_kutta
from mezzotint.process import schedules
from mezzotint.process.denoiser import Cond
from mezzotint.process.samplers import grids, registry

# Steps leave no remainder in order 2 and a step of order 2 in order 3: a last step of order 1 would
# be a second-order error of its own.
STEPS = [80, 158, 320]
START, END = -4.0, 4.0

ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_3m", {"lower_order_final": False}, 3),
    ("dpmpp_3m", {}, 2),  # the last step, of order 1, is a second-order error
    ("dpmpp_singlestep", {"order": 1}, 1),
    ("dpmpp_singlestep", {"order": 2}, 2),
    ("dpmpp_singlestep", {"order": 3}, 3),
    ("unipc", {"order": 1}, 2),  # UniPC: the corrector adds one to the predictor's order
    ("unipc", {"order": 2, "lower_order_final": False}, 3),
    ("unipc", {"order": 3, "lower_order_final": False}, 4),
    ("unipc", {"order": 3}, 2),
    ("unipc", {"order": 2, "lower_order_final": False, "variant": "bh1"}, 3),
]
# A sampler without an order here must converge; stochastic ones are in test_samplers.py.
UNCLAIMED = [
    name
    for name in registry
    if name not in {claimed for claimed, _, _ in ORDERS}
    and "noise" not in inspect.signature(registry[name]).parameters
]

TWO = mixture([-0.7, 0.6], 0.3, [0.4, 0.6])
WEAK = mixture([-0.5, 0.8], 0.5, [0.5, 0.5])
DATA = {
    "gaussian": gaussian(0.3, 0.5),
    "mixture": TWO,
    "guided gaussian": linear_guidance(gaussian(0.3, 0.5), gaussian(0.1, 0.7), 0.5),
    "guided mixture": linear_guidance(TWO, WEAK, 0.5),
}


@pytest.fixture(scope="module")
def start():
    return torch.randn(32, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exact(start):
    return {name: runge_kutta(denoise, start, START, END) for name, denoise in DATA.items()}


def test_the_reference_itself(start, exact):
    torch.testing.assert_close(
        exact["gaussian"], gaussian_flow(start, START, END, 0.3, 0.5), rtol=0, atol=1e-10
    )


def measured(name, options, data, start, exact):
    errors: list[float] = []
    for steps in STEPS:
        grid = torch.linspace(START, END, steps + 1, dtype=torch.float64)
        image = registry[name](DATA[data], start, grid, Cond(), **options)
        errors.append(float((image - exact[data]).square().mean().sqrt()))
    return math.log(errors[0] / errors[-1]) / math.log(STEPS[-1] / STEPS[0])


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("name", "options", "order"), ORDERS, ids=lambda v: str(v))
def test_order(name, options, order, data, start, exact):
    assert measured(name, options, data, start, exact) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", UNCLAIMED)
def test_any_other_sampler_converges(name, start, exact):
    assert measured(name, {}, "guided mixture", start, exact) > 0.7


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_singlestep", "unipc"])
def test_higher_orders_are_more_accurate(name, start, exact):
    """At 20 intervals each of the better solvers is at least five times closer than DDIM."""
    grid = torch.linspace(START, END, 21, dtype=torch.float64)

    def error(sampler):
        return float(
            (registry[sampler](TWO, start, grid, Cond()) - exact["mixture"]).square().mean().sqrt()
        )

    assert error(name) < error("ddim") / 5


# ---- few steps on a grid that stops at a finite clean end, DPM-Solver's: u = 1 ... 1e-3 ----------

FEW = [5, 8, 12, 15, 20]
# Errors of each form, measured to be below these bounds and above: root mean square over 32 values.
LOWERED = {5: 0.3, 8: 0.16, 12: 0.09, 15: 0.075, 20: 0.075}


@pytest.fixture(scope="module")
def vp_exact(start):
    """Return the ends of DiMR's and DPM-Solver's grid, and the exact answers at its clean end."""
    grid = grids.even(schedules.linear_vp(), 1, end=1e-3, clean=False)
    return {
        name: runge_kutta(DATA[name], start, float(grid[0]), float(grid[1]), 400)
        for name in ("mixture", "guided mixture")
    }


@pytest.mark.parametrize("data", ["mixture", "guided mixture"])
@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc"])
@pytest.mark.parametrize("steps", FEW)
def test_lower_orders_at_the_end_of_few_steps(name, data, steps, start, vp_exact):
    grid = grids.even(schedules.linear_vp(), steps, end=1e-3, clean=False)

    def error(**options):
        image = registry[name](DATA[data], start, grid, Cond(), **options)
        return float((image - vp_exact[data]).square().mean().sqrt())

    assert error() < LOWERED[steps]
    assert error() < error(lower_order_final=False) / 4


@pytest.mark.parametrize("name", ["dpmpp_3m", "unipc"])
def test_a_clean_end_lowers_nothing_else(name, start):
    grid = grids.even(schedules.linear_vp(), 8)
    images = [
        registry[name](TWO, start, grid, Cond(), lower_order_final=lower) for lower in (True, False)
    ]
    assert torch.equal(*images)
