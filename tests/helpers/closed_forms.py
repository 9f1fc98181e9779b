"""Data with a known denoiser, to measure samplers against. Pixels are independent, of any shape."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from mezzotint.process.denoiser import Cond, Denoised
from mezzotint.process.logsnr import alpha, append_dims, sigma


def answer(z, x, logsnr):
    level = append_dims(logsnr, z)
    return Denoised(x.to(z), ((z - alpha(level) * x) / sigma(level)).to(z))


def gaussian(mean, std):
    """Return the exact denoiser of data N(mean, std^2)."""

    def denoise(z, logsnr, cond):
        a, s = alpha(append_dims(logsnr, z)), sigma(append_dims(logsnr, z))
        return answer(z, (a * std**2 * z + s**2 * mean) / (a**2 * std**2 + s**2), logsnr)

    return denoise


def gaussian_flow(z, start, end, mean, std):
    """Return where the probability flow of N(mean, std^2) takes z.

    It keeps the number of standard deviations from the mean.
    """
    start, end = torch.as_tensor(start).double(), torch.as_tensor(end).double()

    def spread(logsnr):
        return (alpha(logsnr) ** 2 * std**2 + sigma(logsnr) ** 2).sqrt()

    return alpha(end) * mean + (z - alpha(start) * mean) * spread(end) / spread(start)


def mixture(means, std, weights):
    """Return the exact denoiser of a mixture of N(mean_k, std^2)."""

    def denoise(z, logsnr, cond):
        a, s = alpha(append_dims(logsnr, z)), sigma(append_dims(logsnr, z))
        variance = a**2 * std**2 + s**2
        log_share = [
            math.log(w) - (z - a * m) ** 2 / (2 * variance)
            for m, w in zip(means, weights, strict=True)
        ]
        share = torch.stack(log_share).softmax(0)
        centres = torch.stack([(a * std**2 * z + s**2 * m) / variance for m in means])
        return answer(z, (share * centres).sum(0), logsnr)

    return denoise


def linear_guidance(strong, weak, w):
    """Return (1 + w) strong - w weak, of image and noise."""

    def denoise(z, logsnr, cond):
        p, q = strong(z, logsnr, cond), weak(z, logsnr, cond)
        return Denoised((1 + w) * p.x - w * q.x, (1 + w) * p.eps - w * q.eps)

    return denoise


def runge_kutta(denoise, z, start, end, steps=600):
    """Integrate the probability flow by the classical fourth-order method.

    In lambda = logsnr / 2: dy / dlambda = -sigma eps.
    """
    nodes = torch.linspace(start, end, steps + 1, dtype=torch.float64) / 2

    def slope(y, at):
        return -torch.exp(-at) * denoise(alpha(2 * at) * y, (2 * at).expand(len(y)), Cond()).eps

    y = z / alpha(2 * nodes[0])
    for a, b in pairwise(nodes):
        h = b - a
        k1 = slope(y, a)
        k2 = slope(y + h / 2 * k1, a + h / 2)
        k3 = slope(y + h / 2 * k2, a + h / 2)
        k4 = slope(y + h * k3, b)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return alpha(2 * nodes[-1]) * y
