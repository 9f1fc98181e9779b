"""Likelihood: the three terms of the variational bound, and the density of the probability flow.

The bound is that of VDM (arXiv 2107.00630; specs/likelihood.md), between two log-SNRs l0 < l1, the
noisy and the clean end. Any denoiser gives one, a better denoiser a lower one. Terms are in nats,
one per image: a sum over its elements, in float64 where the device has it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import log_softmax

from mezzotint.process.denoiser import Cond, Denoiser, Image, PerImage
from mezzotint.process.logsnr import alpha, append_dims, diffuse, to_device_of, widest_float

CHUNK = 1 << 16  # elements whose probabilities of every code are computed at once, 64 MB


def _sum(image: Image) -> PerImage:
    """Return the sum over each image, in float64; in float32 on MPS, which has no other."""
    return image.flatten(1).sum(1, dtype=widest_float(image.device))


def reconstruction_term(
    codes: UInt8[Tensor, "b c h w"], eps: Image, l1: float, values: Float[Tensor, " k"]
) -> PerImage:
    """Return -log p(codes | z1), the decoder's term.

    Args:
        codes: numbers of the images' values.
        eps: noise of z1 = alpha1 x + sigma1 eps, x = values[codes].
        values: x of every code.
    """
    x, levels = values.to(eps)[codes.long()].flatten(), values.to(eps)
    terms: list[Tensor] = []
    for part in range(0, x.numel(), CHUNK):
        rows = slice(part, part + CHUNK)
        # VDM: p(x_k | z1) is proportional to exp(-1/2 e^l1 (z1 / alpha1 - x_k)^2). Written as
        # (x - x_k) e^(l1 / 2) + eps, since the difference to the true code cancels exactly.
        apart = (x[rows, None] - levels) * math.exp(l1 / 2) + eps.flatten()[rows, None]
        log_p = log_softmax(-apart.square() / 2, dim=1)
        terms.append(-log_p.gather(1, codes.flatten()[rows, None].long()).squeeze(1))
    return _sum(torch.cat(terms).reshape(eps.shape))


def prior_term(x: Image, l0: float) -> PerImage:
    """Return the divergence of q(z0 | x) from a standard normal distribution."""
    alpha2, sigma2 = 1 / (1 + math.exp(-l0)), 1 / (1 + math.exp(l0))
    # VDM: KL of N(alpha0 x, sigma0^2) and N(0, 1): ln sigma0^2 = log1p(-alpha0^2)
    constant = sigma2 - 1 - math.log1p(-alpha2)
    return _sum((alpha2 * x.square() + constant) / 2)


def diffusion_levels(
    u: Tensor, l0: float, l1: float, steps: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return log-SNRs drawn with uniform u in (0, 1), and the measure of `diffusion_term` for each.

    Args:
        u: float64 of any shape.
        steps: of an ancestral sampler, even in log-SNR; None for infinitely many.
    """
    if steps is None:
        # VDM, continuous time: the integral over l, drawn evenly
        return l0 + (l1 - l0) * u, torch.full_like(u, l1 - l0)
    # VDM, discrete time: one of `steps` terms, at the noisier level of its step
    h = (l1 - l0) / steps
    noisier = l0 + h * (u * steps).floor().clamp(max=steps - 1)
    return noisier, torch.full_like(u, steps * math.expm1(h))


def diffusion_term(
    denoise: Denoiser, x: Image, eps: Image, logsnr: PerImage, measure: Tensor, cond: Cond
) -> PerImage:
    """Return an unbiased estimate of the diffusion term, one draw of log-SNR and noise per image.

    Args:
        logsnr: drawn from any density between the ends.
        measure: (b,), one over that density. For a schedule of uniform u it is -dlogsnr/du; see
            also `diffusion_levels`.
    """
    logsnr = to_device_of(logsnr, x)
    error = eps - denoise(diffuse(x, eps, logsnr), logsnr, cond).eps
    # VDM: 1/2 integral ||eps - eps_hat||^2 dl
    squared = _sum(error.square())
    return to_device_of(measure, x).to(squared) * squared / 2


def flow_log_density(
    denoise: Denoiser, x: Image, probes: Image, logsnr_steps: Float[Tensor, " n"], cond: Cond
) -> PerImage:
    """Return an estimate of log p(x) in nats under the probability flow, of no bound.

    The flow is integrated from x, taken as the state at the clean end, to a standard normal, by
    Heun's method in s = sigma / alpha. The trace is Hutchinson's (arXiv 2011.13456, appendix D.2).

    Args:
        probes: of independent elements with mean 0 and variance 1, e.g. -1 and 1.
        logsnr_steps: falling log-SNRs, at least two.
    """
    y, log_det = x, torch.zeros(len(x), dtype=_sum(x).dtype, device=x.device)

    def slope(y: Image, level: Tensor) -> tuple[Image, PerImage]:
        """Return dy / ds = eps_hat (EDM eq. 3 with y = z / alpha), and its divergence."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            z = float(alpha(level)) * y
            drift = denoise(z, level.expand(len(y)), cond).eps
            (product,) = torch.autograd.grad(drift, y, probes)
        return drift.detach(), _sum(product * probes)

    for a, b in pairwise(logsnr_steps):
        s_a, s_b = float(torch.exp(-a / 2)), float(torch.exp(-b / 2))
        drift_a, trace_a = slope(y, a)
        drift_b, trace_b = slope(y + (s_b - s_a) * drift_a, b)
        y = y + (s_b - s_a) / 2 * (drift_a + drift_b)
        # In ln s, where the trace is nearly constant at high noise: trace ds = (s trace) d ln s.
        log_det = log_det + float(a - b) / 4 * (s_a * trace_a + s_b * trace_b)
    # Instantaneous change of variables (appendix D.2): log p(x) = log p(y) + integral of the
    # divergence over s; z = alpha y is standard normal.
    noisiest = alpha(logsnr_steps[-1])
    z = append_dims(noisiest.expand(len(y)), y).to(y) * y
    log_prior = _sum(-(z.square() + math.log(2 * math.pi)) / 2)
    return log_prior + y[0].numel() * float(noisiest.log()) + log_det
