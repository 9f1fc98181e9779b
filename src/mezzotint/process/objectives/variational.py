"""The loss of a learned variance: regression plus a variational term.

Improved DDPM section 3.1; DiffiT [M].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from mezzotint.process.denoiser import Cond, Image, Model, PerImage
from mezzotint.process.logsnr import alpha, append_dims, diffuse, to_device_of
from mezzotint.process.objectives import Objective, objective
from mezzotint.process.objectives.regression import mean_square, regressed
from mezzotint.process.prediction import target
from mezzotint.process.schedules import Table
from mezzotint.process.schedules.ddpm import Beta, TableSteps, linear_ddpm


def _normal_cdf(x: Tensor) -> Tensor:
    """Return the standard normal's CDF, by ADM's tanh approximation, within 3e-4."""
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def _log_bin(x: Image, mean: Image, log_var: Image) -> Image:
    """Return the log-probability of x's 8-bit bin (width 2/255, open at -1 and 1).

    Under N(mean, exp(log_var)).
    """
    # DDPM eq. 13
    inv_std = torch.exp(-log_var / 2)
    upper = _normal_cdf((x - mean + 1 / 255) * inv_std)
    lower = _normal_cdf((x - mean - 1 / 255) * inv_std)
    upper = torch.where(x > 0.999, 1.0, upper)
    lower = torch.where(x < -0.999, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


def variational_bound(
    x: Image, x_hat: Image, var: Image, logsnr_t: PerImage, logsnr_s: PerImage, smallest: float
) -> PerImage:
    """Return bits per element of one ancestral step t -> s.

    Where s is clean it is the negative log-likelihood of x.

    Args:
        x: the true image.
        x_hat: the predicted one, same shape; detach it to leave the mean untouched.
        var: -1...1, between the logs of the smallest and the largest variance of the step
            (`Denoised.var`).
        logsnr_t, logsnr_s: (b,), t noisier; s = +inf is the clean end.
        smallest: log-variance used at the clean end, where the posterior's is zero: the posterior's
            of the table's second step.

    Returns:
        (b,), mean over elements, in bits.
    """
    level = torch.promote_types(logsnr_t.dtype, torch.float32)
    t, s = logsnr_t.to(level), logsnr_s.to(level)
    clean = s.isinf()
    # c = 1 - exp(l_t - l_s); the step's variance lies between c sigma_s^2 and c sigma_t^2.
    c = -torch.expm1(t - s)
    log_small = torch.where(clean, smallest, c.log() + logsigmoid(-s))
    log_large = c.log() + logsigmoid(-t)

    def wide(coefficient: Tensor) -> Tensor:
        return append_dims(coefficient, x).to(torch.promote_types(x.dtype, torch.float32))

    # Improved DDPM eq. 15, with (var + 1) / 2 for their v
    log_var = wide(log_small) + (var + 1) / 2 * wide(log_large - log_small)
    # The means of posterior and model differ by alpha_s c (x - x_hat).
    gap = wide(alpha(s) * c) * (x - x_hat)
    # KL of two Gaussians
    log_ratio = wide(log_small) - log_var
    kl = (log_ratio.exp() - 1 - log_ratio + gap.square() * torch.exp(-log_var)) / 2
    nats = torch.where(append_dims(clean, x), -_log_bin(x, x_hat, log_var), kl)
    return nats.mean((1, 2, 3)) / math.log(2)


def hybrid_loss(table: Table) -> Objective:
    """Return regression in the model's own row plus `variational_bound` of the table's step.

    The second term does not move the mean.

    Log-SNRs must be entries of the table. The two terms are added as they are: ADM's and DiT's
    L_hybrid without Improved DDPM's factor 1/1000.
    """
    entries = table.logsnr
    if len(entries) < 2:
        raise ValueError(
            "a table of one step has no posterior variance to learn; use 2 steps or more"
        )
    cleaner = torch.cat([torch.full_like(entries[:1], torch.inf), entries[:-1]])
    # c sigma_s^2 at the second step
    smallest = float(torch.log(-torch.expm1(entries[1] - entries[0])) + logsigmoid(-entries[0]))

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        if not model.parameterisation.learned_variance:
            raise ValueError(
                "the hybrid objective needs a network that learns the variance; choose 'regression'"
            )
        z = diffuse(x, eps, logsnr)
        out = model.finest(z, logsnr, cond)
        simple = mean_square(
            regressed(model, out) - target(model.parameterisation.kind, x, eps, logsnr)
        )
        denoised = model.interpret(z, out, logsnr)
        assert denoised.var is not None, "learned_variance gives one"
        n = table.index(logsnr).round().long()
        t, s = (to_device_of(levels, logsnr).to(logsnr.dtype)[n] for levels in (entries, cleaner))
        return simple + variational_bound(x, denoised.x.detach(), denoised.var, t, s, smallest)

    return loss


@objective("hybrid")
def hybrid(
    steps: TableSteps = 1000,
    beta_min: Beta = 1e-4,
    beta_max: Beta = 0.02,
    scaled: bool = False,
) -> Objective:
    """Return `hybrid_loss` on the table `linear_ddpm`, as latent DiffiT trains."""
    table = linear_ddpm(steps, beta_min, beta_max, scaled)
    assert isinstance(table, Table), "linear_ddpm returns one"
    return hybrid_loss(table)
