"""Discretizations: strictly rising, clean at the end, as in their formulas; errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from mezzotint.process import schedules
from mezzotint.process.samplers import grids


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", grids.registry)
@pytest.mark.parametrize("steps", [1, 2, 5, 250])
def test_grids_rise_and_end_clean(name, steps):
    if name == "consistency":
        steps = min(steps, 4)  # the most it takes
    grid = grids.registry[name](schedules.linear_ddpm(), steps)
    assert grid.dtype == torch.float64
    assert grid.shape == (steps + 1,)
    assert (grid[1:] > grid[:-1]).all()
    assert grid[0].isfinite()
    assert grid[-1] == math.inf


@pytest.mark.parametrize("name", grids.registry)
@pytest.mark.parametrize("table", [True, False])
def test_grids_are_on_the_cpu_whatever_the_default_device(name, table):
    if name == "respaced" and not table:
        pytest.skip("it is of a table alone")
    with torch.device("meta"):
        schedule = schedules.linear_ddpm() if table else schedules.cosine()
        grid = grids.registry[name](schedule, 4)
    assert grid.device.type == "cpu"
    assert_close(
        grid, grids.registry[name](schedules.linear_ddpm() if table else schedules.cosine(), 4)
    )


@pytest.mark.parametrize("name", grids.registry)
@pytest.mark.parametrize("steps", [0, -3])
def test_too_few_steps(name, steps):
    with pytest.raises(ValueError, match=f"{steps} steps"):
        grids.registry[name](schedules.linear_ddpm(), steps)


def test_even_is_even_in_u():
    schedule = schedules.cosine(256, 32)
    grid = grids.even(schedule, 512)
    assert_close(
        schedules.invert(schedule, grid[:-1]),
        torch.arange(512, 0, -1).double() / 512,
        rtol=0,
        atol=1e-12,
    )
    trimmed = grids.even(schedules.linear_vp(), 50, end=1e-3, clean=False)
    assert_close(
        schedules.invert(schedules.linear_vp(), trimmed),
        torch.linspace(1, 1e-3, 51).double(),
        rtol=0,
        atol=1e-7,
    )


def test_even_on_a_table_meets_its_entries():
    table = schedules.scaled_linear()
    assert_close(grids.even(table, 1000)[:-1], table.logsnr.flip(0), rtol=0, atol=1e-9)
    assert_close(grids.even(table, 250)[:-1], table.logsnr.flip(0)[::4], rtol=0, atol=1e-9)


def test_even_logsnr_and_karras_by_formula():
    assert_close(
        grids.even_logsnr(schedules.cosine(), 4, logsnr_min=-6.0, logsnr_max=3.0),
        float64(-6, -3, 0, 3, math.inf),
    )
    assert_close(grids.even_logsnr(schedules.cosine(), 3, clean=False), float64(-15, -5, 5, 15))
    # EDM eq. 5
    i = torch.arange(18, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert_close(
        torch.exp(-grids.karras(schedules.lognormal(), 18)[:-1] / 2), sigmas, rtol=1e-12, atol=0
    )
    within = grids.karras(schedules.scaled_linear(), 18)
    assert_close(within[0], schedules.scaled_linear().logsnr[-1])
    assert_close(within[-2], schedules.scaled_linear().logsnr[0])


def kept_indices(steps, table=None):
    """The indices of a respaced grid, cleanest first."""
    table = table or schedules.linear_ddpm()
    return table.index(grids.respaced(table, steps)[:-1]).flip(0).tolist()


def adm_indices(steps, entries=1000):
    """ADM's respacing: a running sum of the stride, rounded (arXiv 2105.05233, released code)."""
    indices, position = [], 0.0
    for _ in range(steps):
        indices.append(round(position))
        position += (entries - 1) / max(steps - 1, 1)
    return indices


def test_respaced_indices():
    assert kept_indices(4) == [0, 333, 666, 999]
    assert kept_indices(250) == [round(i * 999 / 249) for i in range(250)]
    assert kept_indices(1000) == list(range(1000))
    assert kept_indices(1) == [0]


@pytest.mark.parametrize("steps", [2, 3, 21, 23, 31, 35, 50, 100, 333, 667, 999])
def test_respaced_indices_are_adms(steps):
    assert kept_indices(steps) == adm_indices(steps)
    table = schedules.linear_ddpm(4000)
    assert kept_indices(steps, table) == adm_indices(steps, 4000)


def test_a_running_sum_rounds_differently_for_278_step_counts():
    direct = {n: [round(i * (999 / (n - 1))) for i in range(n)] for n in range(2, 1001)}
    assert sum(adm_indices(n) != indices for n, indices in direct.items()) == 278
    assert kept_indices(21) != direct[21]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: grids.even(schedules.scaled_linear(), 1001), "1001 .* 1000"),
        (lambda: grids.respaced(schedules.scaled_linear(), 1001), "1001 .* 1000"),
        (lambda: grids.respaced(schedules.cosine(), 10), "table"),
        (lambda: grids.even(schedules.registry["flow"](), 10), "cannot start"),
        (lambda: grids.even(schedules.cosine(), 10, start=0.2, end=0.5), "start 0.2"),
        (lambda: grids.even(schedules.cosine(), 10, start=1.5), "start 1.5"),
        (lambda: grids.quadratic(schedules.cosine(), 10, end=0.0), "end 0.0"),
        (lambda: grids.even_logsnr_singlestep(schedules.cosine(), 10, order=4), "order 4"),
        (lambda: grids.even_logsnr_singlestep(schedules.cosine(), 9, plan="fixed"), "try 10"),
        (lambda: grids.even_logsnr(schedules.lognormal(), 10), "finite logsnr_min"),
        (
            lambda: grids.even_logsnr(schedules.cosine(), 10, logsnr_min=4.0, logsnr_max=-4.0),
            "rise",
        ),
        (lambda: grids.karras(schedules.cosine(), 10, sigma_min=3.0, sigma_max=1.0), "sigma_min"),
        (lambda: grids.karras(schedules.cosine(), 10, rho=0.0), "rho"),
    ],
)
def test_bad_grid_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_quadratic_is_even_in_the_root_of_u():
    """time_quadratic of DPM-Solver, from 1 to 1e-3; the DDIM paper's tau = c i^2 is its middle."""
    schedule = schedules.linear_vp()
    u = torch.linspace(1, math.sqrt(1e-3), 9, dtype=torch.float64) ** 2
    assert_close(grids.quadratic(schedule, 8, clean=False), schedule(u))
    grid = grids.quadratic(schedule, 9)
    assert_close(grid[:-1], schedule(u))
    assert grid[-1] == math.inf


def test_the_steps_of_a_singlestep_solver_are_even_in_logsnr():
    """12 calls are steps of order 3, 3, 3, 2 and 1, of two units of log-SNR each."""
    ends = {"logsnr_min": -6.0, "logsnr_max": 4.0}
    grid = grids.even_logsnr_singlestep(schedules.cosine(), 12, **ends, clean=False)
    thirds = [at + 2 * j / 3 for at in (-6, -4, -2) for j in range(3)]
    assert_close(grid, float64(*thirds, 0, 1, 2, 4), rtol=0, atol=1e-12)
    # To a clean end the last step is one of order 1, which leaves five: 3, 3, 3, 2 and then +inf.
    grid = grids.even_logsnr_singlestep(schedules.cosine(), 12, **ends)
    thirds = [at + 2.5 * j / 3 for at in (-6, -3.5, -1) for j in range(3)]
    assert_close(grid, float64(*thirds, 1.5, 2.75, 4, math.inf), rtol=0, atol=1e-12)
    fixed = grids.even_logsnr_singlestep(
        schedules.cosine(), 6, **ends, clean=False, order=2, plan="fixed"
    )
    assert_close(fixed, torch.linspace(-6, 4, 7, dtype=torch.float64))
