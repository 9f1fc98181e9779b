"""Our samplers against diffusers' schedulers, on the same table, points and denoiser.

diffusers keeps its coefficients in float32, so agreement is to about 1e-5. Where a method differs,
the test says why.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from helpers.closed_forms import linear_guidance, mixture, runge_kutta
from mezzotint.process import prediction, schedules
from mezzotint.process.denoiser import Cond, Denoised
from mezzotint.process.logsnr import alpha
from mezzotint.process.samplers import grids, registry

diffusers = pytest.importorskip(
    "diffusers", reason="diffusers (the latent extra) is the oracle here"
)

# numpy 2 tells diffusers off for np.array(tensor).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DENOISE = linear_guidance(
    mixture([-0.7, 0.6], 0.3, [0.4, 0.6]), mixture([-0.5, 0.8], 0.5, [0.5, 0.5]), 0.5
)
TABLE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}


def start():
    return torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def draws(dtype=torch.float64):
    """Return a noise function that repeats a scheduler's draws of the same seed."""
    generator = torch.Generator().manual_seed(9)
    return lambda i, z: torch.randn(z.shape, dtype=dtype, generator=generator)


def close(image, expected, atol=2e-5):
    assert_close(image, expected.to(image), rtol=0, atol=atol)


def at(sigmas):
    """Return a scheduler's sigma / alpha as our grid."""
    return -2 * sigmas.double().log()


def run_on_sigmas(scheduler, z):
    """Run a sigma-based scheduler on variance-preserving states."""
    generator = torch.Generator().manual_seed(9)
    takes_generator = "sde" in getattr(scheduler.config, "algorithm_type", "")
    for i, t in enumerate(scheduler.timesteps):
        level = at(scheduler.sigmas[i]).expand(len(z))
        eps = DENOISE(z, level, Cond()).eps
        extra = {"generator": generator} if takes_generator else {}
        z = scheduler.step(eps, t, z, **extra).prev_sample
    return z


# ---- steps of a table ----------------------------------------------------------------------------


def run_on_table(scheduler, z, table, variance=None, **options):
    generator = torch.Generator().manual_seed(9)
    for t in scheduler.timesteps:
        out = DENOISE(z, table.logsnr[t].expand(len(z)), Cond()).eps
        if variance is not None:
            out = torch.cat([out, variance(z)], dim=1)
        z = scheduler.step(out, t, z, generator=generator, **options).prev_sample
    return z


def clean(table, timesteps):
    return torch.cat([table.logsnr[timesteps], torch.tensor([math.inf], dtype=torch.float64)])


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(eta):
    scheduler = diffusers.DDIMScheduler(**TABLE, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(25)
    table = schedules.scaled_linear()
    grid = clean(table, scheduler.timesteps)
    assert_close(grid, grids.even(table, 25), rtol=0, atol=1e-8)  # "trailing" is our even grid
    image = registry["ddim"](DENOISE, start(), grid, Cond(), eta=eta, noise=draws())
    close(image, run_on_table(scheduler, start(), table, eta=eta))


@pytest.mark.parametrize(
    ("theirs", "ours"), [("fixed_small", "posterior"), ("fixed_large", "upper")]
)
def test_ddpm(theirs, ours):
    """Leading steps: diffusers leaves out the last draw only if the last step is step 0."""
    scheduler = diffusers.DDPMScheduler(
        **TABLE, clip_sample=False, variance_type=theirs, timestep_spacing="leading"
    )
    scheduler.set_timesteps(50)
    table = schedules.scaled_linear()
    grid = clean(table, scheduler.timesteps)
    image = registry["ancestral"](DENOISE, start(), grid, Cond(), variance=ours, noise=draws())
    close(image, run_on_table(scheduler, start(), table))


def test_ddpm_with_learned_variance():
    scheduler = diffusers.DDPMScheduler(**TABLE, clip_sample=False, variance_type="learned_range")
    scheduler.set_timesteps(50)
    table = schedules.scaled_linear()

    def variance(z):
        return torch.sin(3 * z)

    def denoise(z, logsnr, cond):
        x, eps, _ = DENOISE(z, logsnr, cond)
        return Denoised(x, eps, variance(z))

    grid = clean(table, scheduler.timesteps)
    image = registry["ancestral"](denoise, start(), grid, Cond(), variance="learned", noise=draws())
    close(image, run_on_table(scheduler, start(), table, variance))


# ---- DPM-Solver++ and UniPC ----------------------------------------------------------------------


def multistep(**options):
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, lower_order_final=False, **options)
    scheduler.set_timesteps(20)
    return scheduler


# Not Karras' points down to sigma_min: diffusers repeats the last of them.
@pytest.mark.parametrize(("end", "karras"), [("zero", False), ("zero", True), ("sigma_min", False)])
def test_dpmpp_2m(end, karras):
    scheduler = multistep(final_sigmas_type=end, use_karras_sigmas=karras)
    image = registry["dpmpp_2m"](DENOISE, start(), at(scheduler.sigmas), Cond())
    close(image, run_on_sigmas(scheduler, start()))


def test_sde_dpmpp_2m():
    scheduler = multistep(final_sigmas_type="zero", algorithm_type="sde-dpmsolver++")
    image = registry["sde_dpmpp_2m"](
        DENOISE, start(), at(scheduler.sigmas), Cond(), noise=draws(torch.float32)
    )
    close(image, run_on_sigmas(scheduler, start()))


def test_dpmpp_3m_is_of_higher_order_than_theirs():
    """diffusers and the authors' code give the parabola half its weight, and so have order 2.

    Both are held to the exact flow on steps even in log-SNR, half as long in the second run.
    """
    exact = runge_kutta(DENOISE, start(), -5.0, 4.0, 400)
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for steps in (60, 120):
        grid = torch.linspace(-5, 4, steps + 1, dtype=torch.float64)
        scheduler = multistep(solver_order=3, solver_type="heun", final_sigmas_type="sigma_min")
        scheduler.set_timesteps(timesteps=list(range(990, 990 - steps, -1)))
        scheduler.sigmas = torch.exp(-grid / 2)
        theirs = run_on_sigmas(scheduler, start())
        ours = registry["dpmpp_3m"](DENOISE, start(), grid, Cond(), lower_order_final=False)
        for name, image in (("ours", ours), ("theirs", theirs)):
            errors[name].append(float((image - exact).square().mean().sqrt()))
    order = {name: math.log2(a / b) for name, (a, b) in errors.items()}
    assert order["ours"] > 2.7
    assert order["theirs"] < 2.3
    assert errors["ours"][1] < errors["theirs"][1] / 5


# Not order 2 in 12 steps down to sigma_min: diffusers ends that in two first-order steps.
@pytest.mark.parametrize(
    ("order", "steps", "end"),
    [(1, 12, "zero"), (1, 12, "sigma_min"), (2, 12, "zero"), (2, 11, "zero"), (2, 11, "sigma_min")]
    + [(3, steps, end) for steps in (11, 12, 13) for end in ("zero", "sigma_min")],
)
def test_dpmpp_singlestep(order, steps, end):
    """At order 3 the second inner point differs: a midpoint weight there, the exact integral here.

    Both are third order; they differ in the fourth power of the step.
    """
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **TABLE, solver_order=order, final_sigmas_type=end, lower_order_final=True
    )
    scheduler.set_timesteps(steps)
    image = registry["dpmpp_singlestep"](
        DENOISE, start(), at(scheduler.sigmas), Cond(), order=order
    )
    close(image, run_on_sigmas(scheduler, start()), atol=5e-3 if order == 3 else 2e-5)


@pytest.mark.parametrize("steps", [3, 6, 20])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, lower, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        **TABLE,
        solver_order=order,
        solver_type=variant,
        lower_order_final=lower,
        final_sigmas_type="sigma_min",
    )
    scheduler.set_timesteps(steps)
    options = {"order": order, "variant": variant, "lower_order_final": lower}
    image = registry["unipc"](DENOISE, start(), at(scheduler.sigmas), Cond(), **options)
    close(image, run_on_sigmas(scheduler, start()))


# ---- EDM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("karras", [False, True])
def test_heun(karras):
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE, use_karras_sigmas=karras)
    scheduler.set_timesteps(15)
    grid = at(torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1::2]]))
    y = start() / alpha(grid[0])
    for t in scheduler.timesteps:
        level = at(scheduler.sigmas[scheduler.step_index or 0])
        eps = DENOISE(y * alpha(level), level.expand(len(y)), Cond()).eps
        y = scheduler.step(eps, t, y).prev_sample
    close(registry["heun"](DENOISE, start(), grid, Cond()), y)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_edm(name):
    """EDM's networks: Euler in sigma is DDIM, the grid is our Karras grid, F is the edm row."""
    build = {
        "ddim": diffusers.EDMEulerScheduler,
        "dpmpp_2m": diffusers.EDMDPMSolverMultistepScheduler,
    }[name]
    scheduler = build(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(20)
    grid = grids.karras(schedules.lognormal(), 20)
    assert_close(at(scheduler.sigmas), grid, rtol=0, atol=1e-5)
    row = prediction.edm(0.5)
    y = start() / alpha(grid[0])
    for level, t in zip(grid[:-1], scheduler.timesteps, strict=True):
        x, eps, _ = DENOISE(y * alpha(level), level.expand(len(y)), Cond())
        out = prediction.target(row, x, eps, level.expand(len(y)))
        y = scheduler.step(out, t, y).prev_sample
    close(registry[name](DENOISE, start(), grid, Cond()), y)
