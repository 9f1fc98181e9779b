"""Tables, grids, plans and solver runs recorded from other implementations (DiMR, DiffiT)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from helpers.closed_forms import gaussian
from mezzotint.convert.official.load import load_official
from mezzotint.process import schedules
from mezzotint.process.denoiser import Cond, Denoised
from mezzotint.process.guidance import classifier_free, null_label, power_cosine
from mezzotint.process.logsnr import alpha, append_dims, sigma
from mezzotint.process.samplers import grids, registry
from mezzotint.process.samplers.ancestral import mean_and_bounds
from mezzotint.process.samplers.dpmpp_singlestep import fast_plan


@pytest.fixture
def dimr(shared):
    return load_file(shared("golden/dimr/schedule.safetensors"))


@pytest.fixture
def diffit(shared):
    return {
        k: torch.from_numpy(v) for k, v in np.load(shared("golden/diffit/diffusion.npz")).items()
    }


# ---- DiMR: Stable Diffusion's table, DPM-Solver's interpolation of it, its grids and plans -------


def test_scaled_linear_table(dimr):
    alpha2 = torch.sigmoid(schedules.scaled_linear().logsnr)
    assert_close(alpha2, dimr["cum_alphas"][1:], rtol=1e-12, atol=0)
    assert_close(
        torch.sigmoid(-schedules.scaled_linear().logsnr), dimr["cum_betas"][1:], rtol=1e-11, atol=0
    )
    assert_close(1 - alpha2[1:] / alpha2[:-1], dimr["betas"][1:], rtol=1e-11, atol=0)
    assert_close(
        schedules.ddpm(dimr["betas"]).logsnr, schedules.scaled_linear().logsnr, rtol=0, atol=1e-12
    )


def test_noise_level_of_the_network(dimr):
    table = schedules.scaled_linear()
    told = 8 * (table.index(table.logsnr) + 1) / 1000 - 4
    assert_close(told.float(), dimr["log_snr_of_n"], rtol=0, atol=1e-6)


def test_interpolated_table(dimr):
    """The tolerance is the rounding of the recorded float32 sum at the clean end."""
    table = schedules.scaled_linear()
    logsnr = table.interpolated(dimr["vp_t"].double())
    assert_close(logsnr / 2, dimr["vp_lambda"].double(), rtol=0, atol=3e-5)
    assert_close(alpha(logsnr), dimr["vp_alpha"].double(), rtol=0, atol=1e-6)
    assert_close(sigma(logsnr), dimr["vp_sigma"].double(), rtol=0, atol=2e-6)
    time = (table.index(2 * dimr["vp_lam_in"].double()) + 1) / 1000
    assert_close(time, dimr["vp_inverse_lambda"].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("calls", [10, 11, 12, 50, 250])
def test_fast_grid_and_plan(dimr, calls):
    table = schedules.scaled_linear()
    grid = grids.even(table, calls, end=1e-3, clean=False)
    assert_close(
        (table.index(grid) + 1) / 1000, dimr[f"timesteps_{calls}"].double(), rtol=0, atol=1e-7
    )
    assert fast_plan(calls, 3) == dimr[f"orders_{calls}"].tolist()


@pytest.mark.parametrize("calls", [10, 11, 12, 50])
def test_solver_on_an_analytic_model(dimr, calls):
    """The recorded runs are of data N(0, 0.7^2), which we fitted to the runs of all lengths."""
    grid = grids.even(schedules.scaled_linear(), calls, end=1e-3, clean=False)
    image = registry["dpmpp_singlestep"](gaussian(0.0, 0.7), dimr["analytic_z"], grid, Cond())
    expected = dimr[f"analytic_out_{calls}"]
    assert (image - expected).abs().max() / expected.abs().max() < 2e-6


@pytest.mark.parametrize(("name", "key"), [("linear_vp", "vpsde"), ("cosine_vp", "cosine")])
def test_continuous_schedules(dimr, name, key):
    """They compute 1 - alpha^2 in float32, so the log-SNR is imprecise at the clean end."""
    logsnr = schedules.registry[name]()(dimr[f"{key}_t"].double())
    assert_close(torch.sigmoid(logsnr), dimr[f"{key}_cum_alpha"].double(), rtol=1e-4, atol=2e-7)
    assert_close(torch.sigmoid(-logsnr), dimr[f"{key}_cum_beta"].double(), rtol=0, atol=2e-7)
    assert_close(logsnr[1:], dimr[f"{key}_log_snr"][1:].double(), rtol=0, atol=3e-4)


# ---- DiffiT: DDPM's table, respacing, ancestral updates with learned variance --------------------


def test_linear_table(diffit):
    table = schedules.linear_ddpm()
    assert_close(torch.sigmoid(table.logsnr), diffit["alphas_cumprod_1000"], rtol=1e-12, atol=0)
    assert_close(schedules.ddpm(diffit["betas_1000"]).logsnr, table.logsnr, rtol=0, atol=1e-11)


@pytest.mark.parametrize("steps", [4, 250])
def test_respaced_steps(diffit, steps):
    table = schedules.linear_ddpm()
    grid = grids.respaced(table, steps)
    assert (
        table.index(grid[:-1]).long().flip(0).tolist() == diffit[f"timestep_map_{steps}"].tolist()
    )


def test_respaced_variances(diffit):
    """Beta and the posterior's variance of each respaced step bound the ancestral step."""
    grid = grids.respaced(schedules.linear_ddpm(), 250)
    image = torch.zeros(1, 1, 1, 1)
    bounds = [mean_and_bounds(image, image, t, s)[1:] for t, s in pairwise(grid)][::-1]
    low, high = torch.stack([b[0] for b in bounds]), torch.stack([b[1] for b in bounds])
    assert_close(high[1:].exp(), diffit["betas_250"][1:], rtol=1e-10, atol=0)
    # The step to the image has no variance; the recording puts its neighbour's there.
    assert_close(low[1:], diffit["posterior_log_variance_clipped_250"][1:], rtol=1e-10, atol=0)


def test_ancestral_update_with_learned_variance(diffit):
    """One step per recorded index: the mean without noise, the variance with noise of ones."""
    grid = grids.respaced(schedules.linear_ddpm(), 250).flip(
        0
    )  # position k + 1 is index k, position 0 is clean
    eps, var = diffit["loss_model_out"].chunk(2, dim=1)
    for row, index in enumerate(diffit["pmv_t"].tolist()):
        z = diffit["loss_x0"][row : row + 1]  # the recording feeds this as the state at every index
        guess_eps, guess_var = eps[row : row + 1], var[row : row + 1]

        def denoise(z, logsnr, cond, eps=guess_eps, var=guess_var):
            level = append_dims(logsnr, z)
            return Denoised(((z - sigma(level) * eps) / alpha(level)).to(z), eps, var)

        def step(noise, z=z, index=index, denoise=denoise):
            pair = grid[[index + 1, index]]
            return registry["ancestral"](
                denoise,
                z,
                pair,
                Cond(),
                variance="learned",
                noise=lambda i, z: torch.full_like(z, noise),
            )

        mean = step(0.0)
        assert_close(mean[0], diffit["pmv_mean"][row], rtol=1e-5, atol=1e-6)
        if index > 0:  # the last step draws nothing
            log_variance = 2 * (step(1.0) - mean)[0].log()
            assert_close(log_variance, diffit["pmv_logvar"][row], rtol=0, atol=5e-4)


def test_guided_sampling(shared, diffit):
    """Four respaced steps of the recorded network, learned variance, guided at 4.4 with power 4.

    The recording stacks conditional on unconditional rows and keeps the first half.
    """
    named = load_file(shared("golden/diffit/A_in8_p2.safetensors"))
    model = load_official(
        {k.removeprefix("sd/"): v for k, v in named.items() if k.startswith("sd/")}
    ).eval()
    table = schedules.linear_ddpm()
    kept = len(diffit["sample_z"]) // 2
    scale = power_cosine(4.4, 4.0, lambda logsnr: table.index(logsnr) / 1000)
    with torch.no_grad():
        image = registry["ancestral"](
            classifier_free(model, null_label(model.info.config.num_classes), scale, channels=3),
            diffit["sample_z"][:kept],
            grids.respaced(table, 4),
            Cond(label=diffit["sample_y"][:kept]),
            variance="learned",
            noise=lambda i, z: diffit["sample_noises"][i, :kept],
        )
    expected = diffit["sample_out"][:kept]
    assert (image - expected).abs().max() / expected.abs().max() < 2e-6
