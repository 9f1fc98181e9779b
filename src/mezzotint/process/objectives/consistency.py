"""Consistency tuning (ECT, arXiv 2406.14548; specs/consistency.md) of a trained denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from mezzotint.core.fields import MOST_IMAGES, Range
from mezzotint.process.denoiser import Cond, Image, Model, PerImage
from mezzotint.process.logsnr import append_dims, diffuse
from mezzotint.process.objectives import Objective, objective
from mezzotint.process.prediction import check_consistency_row

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm  # pyright: ignore
SMALLEST_GAP = 1e-12  # of t - r, which divides: where r = t both passes agree, and the loss is 0


def sigma_ratio(
    sigma: PerImage, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0
) -> PerImage:
    """Return r/t, the lower noise level of a pair over the upper one `sigma`; 0 to below 1.

    Args:
        sigma: EDM's, exp(-logsnr / 2). stage: 0, 1, 2, ...; each divides 1 - r/t by q.
    """
    # ECT: r/t = 1 - n(t) / q^(stage + 1), n(t) = 1 + k sigmoid(-b t)
    shrink = math.exp(-(stage + 1) * math.log(q))  # 0 where q^(stage + 1) overflows
    return (1 - (1 + k * torch.sigmoid(-b * sigma)) * shrink).clamp(min=0)


def consistency_loss(
    model: Model,
    x: Image,
    eps: Image,
    logsnr: PerImage,
    ratio: PerImage,
    cond: Cond,
    huber: float = 0.0,
) -> PerImage:
    """Return |f(y_t, t) - f(y_r, r)| / (t - r), (b,): of the same image, noise and dropout mask.

    f is the denoised image. Only f(y_t, t) has a gradient. The norm is over an image's elements,
    neither squared nor a mean.

    Args:
        logsnr: (b,) of the upper level t = exp(-logsnr / 2).
        ratio: r/t, (b,); where it is 0 the target is x.
        huber: c of the pseudo-Huber norm sqrt(|.|^2 + c^2) - c; 0 is the norm itself.
    """
    from_clean = ratio == 0
    lower = logsnr - 2 * torch.where(from_clean, 1, ratio).log()
    devices = [x.device] if x.device.type == "cuda" else []
    # The first pass leaves the generators as it found them: both drop the same units, in either
    # order. The target's is second, because autocast keeps the weights that the first pass casts,
    # and under no_grad those would have no gradient.
    with torch.random.fork_rng(devices):  # pyright: ignore[reportUnknownMemberType]
        guess = model(diffuse(x, eps, logsnr), logsnr, cond).x
    with torch.no_grad():
        target = model(diffuse(x, eps, lower), lower, cond).x
    error = guess - torch.where(append_dims(from_clean, x), x.to(target), target)
    distance: Tensor = vector_norm(error, dim=(1, 2, 3))  # whose gradient is 0 at 0, not nan
    if huber:  # sqrt(|.|^2 + c^2) - c, exact near 0
        distance = distance.square() / ((distance.square() + huber**2).sqrt() + huber)
    gap = torch.exp(-logsnr / 2) * (1 - ratio)
    return distance / gap.to(distance.dtype).clamp(min=SMALLEST_GAP)


@objective("consistency")
def consistency(
    q: Annotated[float, Range(1, 1e6, "ECT uses 2, or 256 without stages", above=True)] = 2.0,
    stage_images: Annotated[int, Range(1, MOST_IMAGES, "images")] | None = None,
    k: Annotated[float, Range(0, 1e6)] = 8.0,
    b: Annotated[float, Range(0, 1e6)] = 1.0,
    huber: Annotated[float, Range(0, 1e6, "0 is the plain norm")] = 0.0,
) -> Objective:
    """Return `consistency_loss` of pairs of noise levels that move together along the run.

    Start from a trained network (--init-from). It must predict v, flow or edm.

    Args:
        q: the distance 1 - r/t of a pair is divided by it at every stage.
        stage_images: length of a stage; None is one stage, for a large q.
        k, b: widen the pairs at low noise, 1 - r/t = (1 + k sigmoid(-b t)) / q^(stage + 1).
        huber: c of the pseudo-Huber norm, e.g. 0.03; 0 is the norm itself.
    """

    def loss(
        model: Model, x: Image, eps: Image, logsnr: PerImage, cond: Cond, *, images: int = 0
    ) -> PerImage:
        check_consistency_row(model.parameterisation.kind, "objective consistency")
        stage = images // stage_images if stage_images else 0
        ratio = sigma_ratio(torch.exp(-logsnr / 2), stage, q, k, b)
        return consistency_loss(model, x, eps, logsnr, ratio, cond, huber)

    return loss
