"""Mean squared error in any row, with any weight per log-SNR."""

from __future__ import annotations

import torch
from torch import Tensor

from mezzotint.process import prediction
from mezzotint.process.denoiser import Cond, Image, Model, PerImage
from mezzotint.process.logsnr import alpha, append_dims, diffuse, sigma
from mezzotint.process.objectives import Objective, Weight, objective
from mezzotint.process.prediction import Prediction, target


def mean_square(error: Image) -> PerImage:
    """Mean over an image's elements of error^2; (b, c, h, w) to (b,)."""
    return error.square().mean((1, 2, 3))


def regressed(model: Model, out: Tensor) -> Tensor:
    """The part of a network's output that is a prediction, without the learned variance."""
    return out.chunk(2, 1)[0] if model.parameterisation.learned_variance else out


def determinant(row: Prediction, logsnr: Tensor) -> Tensor:
    """Of the 2x2 system z = alpha x + sigma eps, F = a x + b eps: alpha b - sigma a; shaped like logsnr."""
    a, b = row(logsnr)
    return alpha(logsnr) * b - sigma(logsnr) * a


def residual(
    model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond, row: Prediction | None = None
) -> Image:
    """Prediction minus truth in `row` (the model's own by default) of the finest output; float32 or wider.

    The state z is known, so the errors of x and eps cancel in it: alpha dx + sigma deps = 0. Hence an error in one row
    is the error in another times a ratio of determinants, and no conversion is needed; e.g. deps = alpha dv.
    """
    own = model.parameterisation.kind
    out = regressed(model, model.raw(diffuse(x, eps, logsnr), logsnr, cond)[-1])
    error = out - target(own, x, eps, logsnr)
    if row is None:
        return error
    ratio = determinant(row, logsnr) / determinant(own, logsnr)
    return append_dims(ratio, error).to(error.dtype) * error


def weighted(row: Prediction | None, weight: Weight | None = None) -> Objective:
    """weight(logsnr) times the mean squared error in `row`, or in the model's own row where it is None."""

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        error = mean_square(residual(model, x, eps, logsnr, cond, row))
        return error if weight is None else error * weight(logsnr).to(error.dtype)

    return loss


def sigmoid_weight(logsnr: Tensor, bias: float) -> Tensor:
    """SiD2's weight on the eps-MSE, sigmoid(bias - logsnr); any shape. The factor -1/2 dlogsnr/du is not included.

    Args:
        logsnr: natural logarithm, any shape.
        bias: 0 at 128 pixels, -1 at 256, -3 at 512 (specs/simple-diffusion.md section 9; 0 and -1 single-source).
    """
    # SiD2: w(logsnr) = sigmoid(b - logsnr) on e^logsnr ||x - x_hat||^2 = ||eps - eps_hat||^2
    return torch.sigmoid(bias - logsnr)


def min_snr_weight(logsnr: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma (arXiv 2303.09556) as a weight on the eps-MSE: min(SNR, gamma) / SNR; any shape."""
    return torch.exp(-torch.relu(logsnr - torch.tensor(gamma).log()))


@objective("regression")
def regression(row: str | None = None, data_std: float | None = None) -> Objective:
    """Unweighted mean squared error.

    Args:
        row: eps, x, v, flow or edm; by default what the network predicts.
        data_std: of the edm row alone, 0.5 by default. EDM's weight (s^2 + d^2) / (s d)^2 on the image is 1 in its row.

    Errors: ValueError for data_std with another row.
    """
    if data_std is not None and row != "edm":
        raise ValueError(
            f"data_std {data_std} is of row=edm alone; row is {row or 'that of the network'}"
        )
    return weighted(
        None if row is None else prediction.named(row, 0.5 if data_std is None else data_std)
    )


@objective("eps_mse")
def eps_mse() -> Objective:
    """Unweighted mean squared error of eps whatever the network predicts: simple diffusion's loss (section 2)."""
    return weighted(prediction.eps)


@objective("sigmoid")
def sigmoid(bias: float = 0.0) -> Objective:
    """SiD2's eps-MSE times `sigmoid_weight`; an integral over log-SNR: multiply by -1/2 dlogsnr/du where u is drawn."""
    return weighted(prediction.eps, lambda logsnr: sigmoid_weight(logsnr, bias))


@objective("min_snr")
def min_snr(gamma: float = 5.0) -> Objective:
    """eps-MSE times `min_snr_weight`; gamma is the SNR, alpha^2 / sigma^2, above which the weight falls."""
    if not gamma > 0:
        raise ValueError(f"gamma {gamma} must be positive; the paper uses 5")
    return weighted(prediction.eps, lambda logsnr: min_snr_weight(logsnr, gamma))


@objective("edm")
def edm(data_std: float = 0.5) -> Objective:
    """EDM's loss: the image's squared error times (s^2 + d^2) / (s d)^2, that is 1 in the edm row (EDM eq. 8)."""
    return weighted(prediction.edm(data_std))
