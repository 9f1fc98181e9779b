"""Losses against their definitions in float64, and against recorded numbers."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import avg_pool2d

from mezzotint.core.registry import Spec, build
from mezzotint.process import objectives, prediction
from mezzotint.process.denoiser import Cond, Model, Parameterisation
from mezzotint.process.logsnr import alpha, append_dims, diffuse, sigma
from mezzotint.process.objectives.variational import hybrid_loss
from mezzotint.process.schedules.ddpm import linear_ddpm

ROWS = ["eps", "x", "v", "flow", "edm"]


class Stub(nn.Module):
    """A backbone whose outputs are a fixed function of z; `doubled` adds variance channels."""

    def __init__(self, doubled=False, branches=1):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.doubled = doubled
        self.branches = branches

    def forward(self, z, noise, cond):
        out = torch.tanh(self.gain * z + 0.1 * append_dims(noise, z))
        if self.doubled:
            out = torch.cat([out, torch.sin(3 * z)], 1)
        return [avg_pool2d(out, 2**i) for i in reversed(range(self.branches))]


class Ones(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, z, noise, cond):
        return [self.one.expand_as(z)]


def stub(row="v", data_std=0.5, **options):
    kind = prediction.named(row, data_std)
    doubled = options.get("doubled", False)
    return Model(
        Stub(**options), Parameterisation(kind=kind, noise=lambda l: l, learned_variance=doubled)
    )


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 6, 3, 8, 8, dtype=torch.float64, generator=g)
    return x.clamp(-1, 1), eps, torch.linspace(-5, 5, 6, dtype=torch.float64), Cond()


def loss_of(name, model, data, **options):
    return build(objectives.registry, Spec(name, options))(model, *data)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("own", ROWS)
def test_regression_in_any_row_equals_the_converted_outputs(own, row, data):
    x, eps, logsnr, cond = data
    model = stub(own)
    guess = model(diffuse(x, eps, logsnr), logsnr, cond)  # through solve
    a, b = (append_dims(c, x) for c in prediction.named(row)(logsnr))
    expected = (a * (guess.x - x) + b * (guess.eps - eps)).square().mean((1, 2, 3))
    torch.testing.assert_close(
        loss_of("regression", model, data, row=row), expected, rtol=1e-10, atol=0
    )


def test_regression_in_the_own_row_is_the_plain_loss(data):
    x, eps, logsnr, cond = data
    model = stub("flow")
    out = model.raw(diffuse(x, eps, logsnr), logsnr, cond)[-1]
    torch.testing.assert_close(
        loss_of("regression", model, data), (out - (eps - x)).square().mean((1, 2, 3))
    )


def test_eps_mse_of_a_v_network_is_alpha_squared_v_mse(data):
    model = stub("v")
    expected = alpha(data[2]) ** 2 * loss_of("regression", model, data)
    torch.testing.assert_close(loss_of("eps_mse", model, data), expected)


def test_sigmoid_both_forms_of_the_paper(data):
    x, eps, logsnr, cond = data
    model = stub("v")
    error = (model(diffuse(x, eps, logsnr), logsnr, cond).x - x).square().mean((1, 2, 3))
    for bias in (0.0, -1.0, -3.0):
        # e^b sigmoid(l - b) on the image's error, as in code; e^l sigmoid(b - l), as in the paper
        loss = loss_of("sigmoid", model, data, bias=bias)
        torch.testing.assert_close(loss, math.exp(bias) * torch.sigmoid(logsnr - bias) * error)
        torch.testing.assert_close(
            loss, logsnr.exp() * objectives.sigmoid_weight(logsnr, bias) * error
        )


@pytest.mark.parametrize(
    ("height", "width", "published"),
    [(128, 128, 0), (256, 256, -1), (512, 512, -3), (256, 1024, -3)],
)
def test_the_bias_of_a_size_is_sid2s_to_the_nearest_integer(height, width, published, data):
    # A network whose error is 1 everywhere, so that the loss is the weight.
    _, _, logsnr, cond = data
    eps = torch.zeros(6, 1, height, width, dtype=torch.float64)
    model = Model(Ones(), Parameterisation(kind=prediction.eps, noise=lambda logsnr: logsnr))
    loss = loss_of("sigmoid", model, (eps, eps, logsnr, cond), bias=None)
    bias = (torch.log(loss / (1 - loss)) + logsnr)[0].item()
    assert bias == pytest.approx(2 * math.log(128 / math.sqrt(height * width)))
    assert round(bias) == published


def test_min_snr_is_the_clamped_weight_on_the_image(data):
    x, eps, logsnr, cond = data
    model = stub("eps")
    error = (model(diffuse(x, eps, logsnr), logsnr, cond).x - x).square().mean((1, 2, 3))
    for gamma in (1.0, 5.0):
        expected = logsnr.exp().clamp(max=gamma) * error
        torch.testing.assert_close(loss_of("min_snr", model, data, gamma=gamma), expected)


def test_edm_weight_on_the_denoised_image(data):
    x, eps, logsnr, cond = data
    s, d = torch.exp(-logsnr / 2), 0.4
    for own in ("edm", "v"):
        model = stub(own, d)
        error = (model(diffuse(x, eps, logsnr), logsnr, cond).x - x).square().mean((1, 2, 3))
        expected = (s**2 + d**2) / (s * d) ** 2 * error
        torch.testing.assert_close(loss_of("edm", model, data, data_std=d), expected)


def test_low_precision_outputs_give_float32_losses(data):
    model = stub("v").to(torch.bfloat16)
    x, eps, logsnr, cond = data
    low = (x.float(), eps.float(), logsnr.float(), cond)
    for name in ("regression", "eps_mse", "multiscale", "pyramid", "sigmoid", "sigmoid_pyramid"):
        loss = loss_of(name, model, low)
        assert loss.dtype == torch.float32
        assert loss.shape == (6,)


def test_multiscale_is_the_sum_of_its_definition():
    target, output = torch.randn(2, 3, 3, 64, 64, dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for s in (16, 32, 64):
        pooled = [
            image.unflatten(3, (s, 64 // s)).unflatten(2, (s, 64 // s)).mean((3, 5))
            for image in (target, output)
        ]
        expected += (pooled[0] - pooled[1]).square().sum((1, 2, 3)) / (3 * s**2) / s
    torch.testing.assert_close(objectives.multiscale_mse(target, output, smallest=16), expected)
    one = (target - output).square().mean((1, 2, 3)) / 64
    torch.testing.assert_close(objectives.multiscale_mse(target, output, smallest=64), one)
    torch.testing.assert_close(objectives.multiscale_mse(target, output, smallest=100), one)
    with pytest.raises(ValueError, match="smallest"):
        objectives.multiscale_mse(target, output, smallest=0)


def test_multiscale_of_wide_images_stops_at_the_shorter_side():
    target, output = torch.randn(2, 1, 3, 32, 80)
    error = output - target
    expected = (
        error.square().mean((1, 2, 3)) / 32 + avg_pool2d(error, 2).square().mean((1, 2, 3)) / 16
    )
    torch.testing.assert_close(objectives.multiscale_mse(target, output, smallest=16), expected)


def test_multiscale_objective_pools_the_eps_residual(data):
    x, eps, logsnr, cond = data
    model = stub("v")
    guess = model(diffuse(x, eps, logsnr), logsnr, cond).eps
    expected = objectives.multiscale_mse(eps, guess, 2)
    torch.testing.assert_close(loss_of("multiscale", model, data, smallest=2), expected)


def test_pyramid_targets_keep_unit_variance_and_are_coarse_to_fine():
    eps = torch.randn(
        64, 4, 32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    targets = objectives.pyramid_targets(eps, 3)
    assert [tuple(t.shape[2:]) for t in targets] == [(8, 4), (16, 8), (32, 16)]
    for t in targets:
        assert abs(float(t.var()) - 1) < 0.05
    torch.testing.assert_close(targets[0][:, :, 0, 0], eps[:, :, :4, :4].sum((2, 3)) / 4)
    for levels, message in ((0, "at least 1"), (6, "multiples of 32")):
        with pytest.raises(ValueError, match=message):
            objectives.pyramid_targets(eps, levels)


def test_pyramid_loss_weights_branches(data):
    x, eps, logsnr, cond = data
    model = stub("eps", branches=3)
    outputs = model.raw(diffuse(x, eps, logsnr), logsnr, cond)
    parts = [
        (o - t).square().mean((1, 2, 3))
        for o, t in zip(outputs, objectives.pyramid_targets(eps, 3), strict=True)
    ]
    expected = parts[0] / 16 + parts[1] / 4 + parts[2]
    torch.testing.assert_close(loss_of("pyramid", model, data), expected)
    given = parts[0] / 4 + parts[1] / 2 + parts[2]
    torch.testing.assert_close(
        loss_of("pyramid", model, data, coefficients=(0.25, 0.5, 1.0)), given
    )
    with pytest.raises(ValueError, match="2 coefficients"):
        loss_of("pyramid", model, data, coefficients=(1.0, 1.0))
    with pytest.raises(ValueError, match="learned variance"):
        loss_of("pyramid", stub("eps", doubled=True), data)


@pytest.mark.parametrize("kind", ["eps", "x", "v", "edm"])
@pytest.mark.parametrize("bias", [None, 1.4, 1000.0])
def test_the_sigmoid_pyramid_weighs_the_error_of_eps_in_every_branch(data, kind, bias):
    x, eps, logsnr, cond = data
    model = stub(kind, branches=2)
    coarse, fine = model.raw(diffuse(x, eps, logsnr), logsnr, cond)
    truth = prediction.target(model.parameterisation.kind, x, eps, logsnr)
    a2, s2 = logsnr.sigmoid(), (-logsnr).sigmoid()
    # z is known, so an error d of v is one of a d in eps; EDM's row is x's error over
    # s a / 2 / sqrt(s^2 + a^2 / 4), at a standard deviation of 1/2.
    ratio = {"eps": 1, "v": a2, "x": a2 / s2, "edm": a2 / (4 * s2 + a2)}[kind]
    parts = (fine - truth).square().mean((1, 2, 3))
    parts = parts + (coarse - 2 * avg_pool2d(truth, 2)).square().mean((1, 2, 3)) / 4
    weight = (2 * math.log(128 / 8) if bias is None else bias) - logsnr  # at 8x8 pixels
    torch.testing.assert_close(
        loss_of("sigmoid_pyramid", model, data, bias=bias), parts * ratio * weight.sigmoid()
    )


@pytest.mark.parametrize("name", ["mini2r", "latent2r"])
def test_golden_pyramid_loss(shared, name):
    io = load_file(shared(f"golden/dimr/{name}.io.safetensors"))
    targets = objectives.pyramid_targets(io["loss.eps"], 2)
    for i, target in enumerate(targets):
        torch.testing.assert_close(target, io[f"loss.target{i}"], rtol=0, atol=1e-6)
    outputs = [io["loss.pred0"], io["loss.pred1"]]
    loss = objectives.pyramid_loss(outputs, io["loss.eps"])
    torch.testing.assert_close(loss, io["loss.per_sample"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        loss, objectives.pyramid_loss(outputs, io["loss.eps"], io["loss.coeffs"].tolist())
    )
    torch.testing.assert_close(loss.mean(), io["loss.mean"], rtol=1e-5, atol=0)


def test_golden_pyramid_targets(shared):
    golden = load_file(shared("golden/dimr/schedule.safetensors"))
    for target in objectives.pyramid_targets(golden["target_eps"], 3):
        width = target.shape[3]
        torch.testing.assert_close(target, golden[f"target_corr1_w{width}"], rtol=0, atol=1e-6)
        plain = target / (golden["target_eps"].shape[3] // width)
        torch.testing.assert_close(plain, golden[f"target_corr0_w{width}"], rtol=0, atol=1e-6)


class Recorded(nn.Module):
    """A backbone that returns one recorded output."""

    def __init__(self, out):
        super().__init__()
        self.out = nn.Parameter(out)

    def forward(self, z, noise, cond):
        return [self.out]


def test_golden_hybrid_loss(shared):
    with np.load(shared("golden/diffit/diffusion.npz")) as file:
        golden = {name: torch.from_numpy(file[name]) for name in file if name.startswith("loss_")}
    eps_row = Parameterisation(kind=prediction.eps, noise=lambda l: l, learned_variance=True)
    model = Model(Recorded(golden["loss_model_out"].float()), eps_row)
    logsnr = linear_ddpm(1000).logsnr[golden["loss_t"]]
    x, eps = golden["loss_x0"].float(), golden["loss_noise"].float()
    torch.testing.assert_close(
        diffuse(x, eps, logsnr), golden["loss_xt"].float(), rtol=0, atol=2e-6
    )
    for levels in (logsnr, logsnr.float()):
        simple = loss_of("regression", model, (x, eps, levels, Cond()))
        torch.testing.assert_close(simple, golden["loss_mse"].float(), rtol=1e-5, atol=0)
        total = loss_of("hybrid", model, (x, eps, levels, Cond()))
        torch.testing.assert_close(total, golden["loss_total"].float(), rtol=1e-5, atol=0)


def test_variational_bound_is_the_kl_of_two_normals(data):
    x, eps, _, _ = data
    table = linear_ddpm(100)
    n = torch.tensor([1, 2, 10, 50, 98, 99])
    t, s = table.logsnr[n], table.logsnr[n - 1]
    z = diffuse(x, eps, t)
    x_hat, var = torch.tanh(z), torch.sin(z)
    loss = objectives.variational_bound(x, x_hat, var, t, s, smallest=-9.0)

    # DDPM eq. 6, 7 with beta = 1 - alpha_t^2 / alpha_s^2
    beta = append_dims(1 - alpha(t) ** 2 / alpha(s) ** 2, x)
    a_t, a_s, s_t, s_s = (append_dims(f(l), x) for f in (alpha, sigma) for l in (t, s))
    mean = {
        k: (a_s * beta * v + a_t / a_s * s_s**2 * z) / s_t**2
        for k, v in {"q": x, "p": x_hat}.items()
    }
    posterior = torch.distributions.Normal(mean["q"], (beta * s_s**2 / s_t**2).sqrt())
    log_var = (var + 1) / 2 * beta.log() + (1 - var) / 2 * (beta * s_s**2 / s_t**2).log()
    model = torch.distributions.Normal(mean["p"], (log_var / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, model).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)


def test_first_step_is_a_distribution_over_256_values():
    x = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(256, 1, 1, 1)
    mean, var = torch.full_like(x, 0.3), torch.full_like(x, 0.5)
    t, s = (
        torch.full((256,), 3.0, dtype=torch.float64),
        torch.full((256,), torch.inf, dtype=torch.float64),
    )
    bits = objectives.variational_bound(x, mean, var, t, s, smallest=-6.0)
    assert abs(float((2**-bits).sum()) - 1) < 1e-9


def test_hybrid_trains_the_mean_by_regression_alone(data):
    x, eps, _, cond = data
    table = linear_ddpm(1000)
    logsnr = table.logsnr[[0, 1, 10, 300, 700, 999]]
    eps_row = Parameterisation(kind=prediction.eps, noise=lambda l: l, learned_variance=True)
    out = 0.5 * torch.randn(
        6, 6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    model = Model(Recorded(out), eps_row)
    gradients = []
    for loss in (hybrid_loss(table), build(objectives.registry, Spec("regression"))):
        model.zero_grad()
        loss(model, x, eps, logsnr, cond).sum().backward()
        gradients.append(model.backbone.out.grad.clone())
    torch.testing.assert_close(gradients[0][:, :3], gradients[1][:, :3], rtol=0, atol=0)
    assert gradients[0].isfinite().all()
    assert gradients[0][:, 3:].abs().amin((1, 2, 3)).gt(0).all()
    assert not gradients[1][:, 3:].any()


def test_errors(data):
    with pytest.raises(ValueError, match="regression"):
        loss_of("hybrid", stub("eps"), data)
    with pytest.raises(ValueError, match="did you mean eps_mse"):
        loss_of("eps_mes", stub(), data)
    with pytest.raises(ValueError, match="prediction"):
        loss_of("regression", stub(), data, row="nosie")
    with pytest.raises(ValueError, match="gamma"):
        loss_of("min_snr", stub(), data, gamma=0.0)
    with pytest.raises(ValueError, match="one step"):
        loss_of("hybrid", stub("eps", doubled=True), data, steps=1)


def test_data_std_belongs_to_the_edm_row():
    with pytest.raises(ValueError, match="row is eps"):
        objectives.registry["regression"](row="eps", data_std=0.5)
    objectives.registry["regression"](row="edm", data_std=0.3)
