"""Prediction types (eps, x, v, flow, EDM) as rows F = a x + b eps, and conversion between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mezzotint.process.logsnr import alpha, append_dims, sigma

Prediction = Callable[[Tensor], tuple[Tensor, Tensor]]  # log-SNR -> (a, b)


def eps(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """F = eps (DDPM, eq. 14)."""
    return torch.zeros_like(logsnr), torch.ones_like(logsnr)


def x(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """F = x."""
    return torch.ones_like(logsnr), torch.zeros_like(logsnr)


def v(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """F = alpha eps - sigma x (simple diffusion section 2; progressive distillation appendix D)."""
    return -sigma(logsnr), alpha(logsnr)


def flow(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """F = eps - x, the velocity of the straight line from image to noise."""
    return -torch.ones_like(logsnr), torch.ones_like(logsnr)


def edm(data_std: float = 0.5) -> Prediction:
    """Return the row of EDM's preconditioned output (EDM eq. 7 and table 1).

    F = (D - c_skip y) / c_out with y = x + s eps.

    Args:
        data_std: standard deviation of the data, sigma_data of EDM; at 1 the row is exactly -v.
    """
    if not data_std > 0:
        raise ValueError(
            f"data_std {data_std} must be positive; EDM uses 0.5 for images in [-1, 1]"
        )

    def row(logsnr: Tensor) -> tuple[Tensor, Tensor]:
        # (1 - c_skip) / c_out = s / (d sqrt(s^2 + d^2)) and -c_skip s / c_out = -d / sqrt(s^2 +
        # d^2), with s = sigma / alpha; numerator and denominator are multiplied by alpha so that
        # neither end overflows.
        r = (sigma(logsnr) ** 2 + data_std**2 * alpha(logsnr) ** 2).sqrt()
        return sigma(logsnr) / (data_std * r), -data_std * alpha(logsnr) / r

    return row


def named(name: str, data_std: float = 0.5) -> Prediction:
    """Return the row called `name` in configs: eps, x, v, flow, or edm, which uses `data_std`."""
    rows: dict[str, Prediction] = {"eps": eps, "x": x, "v": v, "flow": flow}
    if name == "edm":
        return edm(data_std)
    if name not in rows:
        raise ValueError(f"unknown prediction {name!r}; known: {', '.join(rows)}, edm")
    return rows[name]


def check_consistency_row(row: Prediction, what: str) -> None:
    """Raise ValueError unless the denoised image of `row` can be a consistency map f(z, logsnr).

    Of F = a x + b eps: without b at the clean end f is not z / alpha there, whatever the output;
    without a at the noisy end f multiplies the output's error by sigma / alpha, 80 at the start.

    Args:
        what: the start of the error's sentence.
    """
    (a, _), (_, b) = (
        row(torch.tensor(-torch.inf, device="cpu")),
        row(torch.tensor(torch.inf, device="cpu")),
    )
    if not b:
        reason = "this network predicts x, which is not bound to the image where the noise ends"
    elif not a:
        reason = "this network predicts eps, whose error grows 80-fold in the image at pure noise"
    else:
        return
    raise ValueError(f"{what} needs a network that predicts v, flow or edm; {reason}")


def target(kind: Prediction, x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """Return a x + b eps, the regression target of `kind`; shapes (b, ...), (b, ...), (b,)."""
    a, b = kind(logsnr)
    return (append_dims(a, x) * x + append_dims(b, x) * eps).to(
        torch.promote_types(x.dtype, torch.float32)
    )


def solve(kind: Prediction, z: Tensor, out: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image and the noise that a state and a prediction imply, in float32 or wider.

    The 2x2 system z = alpha x + sigma eps, out = a x + b eps, by Cramer's rule.

    Args:
        kind: the row that `out` predicts.
        z: variance-preserving state, (b, ...).
        out: the network's prediction, same shape.
        logsnr: (b,). Where the two rows are parallel (eps at -inf, x at +inf) the result is not
            finite.

    Returns:
        (x, eps), each shaped like z.
    """
    wide = torch.promote_types(torch.promote_types(z.dtype, out.dtype), torch.float32)
    level = logsnr.to(torch.promote_types(logsnr.dtype, torch.float32))
    a, b = kind(level)
    A, S = alpha(level), sigma(level)
    det = A * b - S * a
    z, out = z.to(wide), out.to(wide)

    def times(coefficient: Tensor, image: Tensor) -> Tensor:
        return append_dims(coefficient, image).to(wide) * image

    x = times(b / det, z) - times(S / det, out)
    eps = times(A / det, out) - times(a / det, z)
    return x, eps
