"""DiMR's loss (specs/dimr.md section 5): every branch regresses the noise at its own resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from mezzotint.core.fields import Range
from mezzotint.process.denoiser import Cond, Image, Model, PerImage
from mezzotint.process.logsnr import diffuse
from mezzotint.process.objectives import Objective, objective
from mezzotint.process.objectives.regression import (
    BIAS,
    bias_at,
    determinant,
    mean_square,
    sigmoid_weight,
)
from mezzotint.process.prediction import eps as eps_row
from mezzotint.process.prediction import target


def _pool(image: Tensor, ratio: int) -> Tensor:
    """Return block sums divided by ratio, not ratio²: white noise keeps its unit variance."""
    # target_i = rho_i avgpool_{rho_i}(eps)
    return ratio * avg_pool2d(image, ratio) if ratio > 1 else image


def pyramid_targets(eps: Image, levels: int) -> list[Tensor]:
    """Return variance-preserving targets of `levels` branches, coarse to fine by factors of 2.

    Args:
        eps: (b, c, h, w).

    Returns:
        (b, c, h / 2^(levels - 1), w / 2^(levels - 1)), ..., (b, c, h, w): sums over blocks of side
        rho, divided by rho.

    Errors: ValueError unless h and w are multiples of 2^(levels - 1).
    """
    if levels < 1:
        raise ValueError(f"levels {levels} must be at least 1")
    coarsest = 2 ** (levels - 1)
    if any(side % coarsest for side in eps.shape[2:]):
        raise ValueError(
            f"{eps.shape[2]}x{eps.shape[3]} has no pyramid of {levels} levels: sides must be "
            f"multiples of {coarsest}"
        )
    return [_pool(eps, 2**i) for i in reversed(range(levels))]


def pyramid_loss(
    outputs: Sequence[Tensor], truth: Image, coefficients: Sequence[float] | None = None
) -> PerImage:
    """Return the sum over branches of c_i times the mean squared error, at the branch's size.

    Args:
        outputs: coarse to fine, (b, c, h_i, w_i), each h_i dividing truth's h.
        truth: the full-resolution target, (b, c, h, w); it is pooled to each branch's size.
        coefficients: c_i; by default the paper's rule 1 / rho_i² with rho_i = h / h_i.

    Errors: ValueError for a wrong number of coefficients or a size that does not divide.
    """
    ratios = [truth.shape[2] // out.shape[2] for out in outputs]
    for out, ratio in zip(outputs, ratios, strict=True):
        if (out.shape[2] * ratio, out.shape[3] * ratio) != tuple(truth.shape[2:]):
            raise ValueError(
                f"an output of {tuple(out.shape)} is no coarser version of a target of "
                f"{tuple(truth.shape)}"
            )
    if coefficients is None:
        coefficients = [1 / ratio**2 for ratio in ratios]
    if len(coefficients) != len(outputs):
        raise ValueError(
            f"{len(coefficients)} coefficients for {len(outputs)} branches; give one each, "
            "coarse to fine"
        )
    # L = sum_i c_i mean (out_i - target_i)^2
    losses = [
        c * mean_square(out.to(torch.promote_types(out.dtype, torch.float32)) - _pool(truth, ratio))
        for c, out, ratio in zip(coefficients, outputs, ratios, strict=True)
    ]
    return torch.stack(losses).sum(0)


@objective("pyramid")
def pyramid(coefficients: tuple[Annotated[float, Range(0, 1e6)], ...] | None = None) -> Objective:
    """Return DiMR's loss over all branches, in the network's row (eps in the paper).

    Args:
        coefficients: one per branch, coarse to fine; by default 1 / rho²: (1/4, 1) for two
            branches, (1/16, 1/4, 1) for three.
    """

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        if model.parameterisation.learned_variance:
            raise ValueError(
                "the pyramid objective does not train a learned variance; choose 'hybrid'"
            )
        outputs = model.raw(diffuse(x, eps, logsnr), logsnr, cond)
        return pyramid_loss(
            outputs, target(model.parameterisation.kind, x, eps, logsnr), coefficients
        )

    return loss


@objective("sigmoid_pyramid")
def sigmoid_pyramid(bias: BIAS = None) -> Objective:
    """Return DiMR's loss over all branches with SiD2's weight, in eps; our choice for small sizes.

    It is an integral over log-SNR, as `sigmoid`. Pooling is linear, so an error of the network's
    row is one of eps times the same ratio in every branch.

    Args:
        bias: as in `sigmoid`.
    """
    unweighted = pyramid()

    def loss(model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond) -> PerImage:
        # deps = ratio d of the network's own row
        ratio = determinant(eps_row, logsnr) / determinant(model.parameterisation.kind, logsnr)
        factor = ratio.square() * sigmoid_weight(logsnr, bias_at(x, bias))
        error = unweighted(model, x, eps, logsnr, cond)
        return error * factor.to(error.dtype)

    return loss
