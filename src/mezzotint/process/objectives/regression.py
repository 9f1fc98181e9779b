"""Mean squared error in any prediction type, with any weight per log-SNR."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import Range
from mezzotint.process import prediction
from mezzotint.process.denoiser import Cond, Image, Model, PerImage
from mezzotint.process.logsnr import alpha, append_dims, diffuse, sigma
from mezzotint.process.objectives import Objective, Weight, objective
from mezzotint.process.prediction import Prediction, target


def mean_square(error: Image) -> PerImage:
    """Return the mean of error^2 over each image, (b, c, h, w) to (b,)."""
    return error.square().mean((1, 2, 3))


def regressed(model: Model, out: Tensor) -> Tensor:
    """Return the part of a network's output that is a prediction, without the learned variance."""
    return out.chunk(2, 1)[0] if model.parameterisation.learned_variance else out


def determinant(row: Prediction, logsnr: Tensor) -> Tensor:
    """Return alpha b - sigma a of z = alpha x + sigma eps, F = a x + b eps; shaped like logsnr."""
    a, b = row(logsnr)
    return alpha(logsnr) * b - sigma(logsnr) * a


def residual(
    model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond, row: Prediction | None = None
) -> Image:
    """Return prediction minus truth of the finest output in `row`, by default the model's own.

    In float32 or wider. The state z is known, so the errors of x and eps cancel in it: alpha dx +
    sigma deps = 0. Hence an error in one row is the error in another times a ratio of determinants,
    e.g. deps = alpha dv.
    """
    own = model.parameterisation.kind
    out = regressed(model, model.finest(diffuse(x, eps, logsnr), logsnr, cond))
    error = out - target(own, x, eps, logsnr)
    if row is None:
        return error
    ratio = determinant(row, logsnr) / determinant(own, logsnr)
    return append_dims(ratio, error).to(error.dtype) * error


def weighted(row: Prediction | None, weight: Weight | None = None) -> Objective:
    """Return weight(logsnr) times the mean squared error in `row`; None is the model's own row."""

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        error = mean_square(residual(model, x, eps, logsnr, cond, row))
        return error if weight is None else error * weight(logsnr).to(error.dtype)

    return loss


def sigmoid_weight(logsnr: Tensor, bias: float) -> Tensor:
    """Return SiD2's weight on the eps-MSE, sigmoid(bias - logsnr), without -1/2 dlogsnr/du.

    Args:
        logsnr: natural logarithm, any shape.
        bias: 0 at 128 pixels, -1 at 256, -3 at 512 (specs/simple-diffusion.md section 9; one source
            each for 0 and -1).
    """
    # SiD2: w(logsnr) = sigmoid(b - logsnr) on e^logsnr ||x - x_hat||^2 = ||eps - eps_hat||^2
    return torch.sigmoid(bias - logsnr)


def min_snr_weight(logsnr: Tensor, gamma: float = 5.0) -> Tensor:
    """Return Min-SNR-gamma's weight on the eps-MSE, min(SNR, gamma) / SNR (arXiv 2303.09556)."""
    return torch.exp(-torch.relu(logsnr - math.log(gamma)))


@objective("regression")
def regression(
    row: str | None = None,
    data_std: Annotated[float, Range(1e-6, 1000, "a standard deviation")] | None = None,
) -> Objective:
    """Return the unweighted mean squared error.

    Args:
        row: eps, x, v, flow or edm; by default what the network predicts.
        data_std: of the edm row only, 0.5 by default. EDM's weight (s^2 + d^2) / (s d)^2 on the
            image is 1 in its row.

    Errors: ValueError for data_std with another row.
    """
    if data_std is not None and row != "edm":
        raise ValueError(
            f"data_std {data_std} needs row=edm; row is {row or 'that of the network'}"
        )
    return weighted(
        None if row is None else prediction.named(row, 0.5 if data_std is None else data_std)
    )


@objective("eps_mse")
def eps_mse() -> Objective:
    """Return simple diffusion's loss (section 2): the mean squared error of eps, unweighted."""
    return weighted(prediction.eps)


BIAS = Annotated[float, Range(-1000, 1000, "a log-SNR")] | None


def bias_at(x: Image, bias: float | None) -> float:
    """Return `bias`, or for None 2 ln(128 / side) for the side of a square of x's pixels."""
    return 2 * math.log(128 / math.sqrt(x.shape[-2] * x.shape[-1])) if bias is None else bias


@objective("sigmoid")
def sigmoid(bias: BIAS = 0.0) -> Objective:
    """Return SiD2's eps-MSE times `sigmoid_weight`.

    It is an integral over log-SNR: multiply by -1/2 dlogsnr/du where u is drawn.

    Args:
        bias: None is 2 ln(128 / side) for pixels of any size, our choice: as the noise schedule
            shifts (simple diffusion, section 2). To the nearest integer it is SiD2's 0, -1 and -3.
    """

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        shift = bias_at(x, bias)
        square = weighted(prediction.eps, lambda logsnr: sigmoid_weight(logsnr, shift))
        return square(model, x, eps, logsnr, cond)

    return loss


@objective("min_snr")
def min_snr(
    gamma: Annotated[float, Range(0, 1e9, "the paper uses 5", above=True)] = 5.0,
) -> Objective:
    """Return the eps-MSE times `min_snr_weight`; above an SNR of `gamma` the weight falls."""
    if not gamma > 0:
        raise ValueError(f"gamma {gamma} must be positive; the paper uses 5")
    return weighted(prediction.eps, lambda logsnr: min_snr_weight(logsnr, gamma))


@objective("edm")
def edm(data_std: Annotated[float, Range(1e-6, 1000, "a standard deviation")] = 0.5) -> Objective:
    """Return EDM's loss (EDM eq. 8).

    Its weight (s^2 + d^2) / (s d)^2 on the image's squared error is 1 in the edm row.
    """
    return weighted(prediction.edm(data_std))
