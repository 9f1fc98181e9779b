"""Objectives: functions (model, x, eps, logsnr, cond) -> loss per image. One file adds one.

x are images (or latents) in [-1, 1], eps is standard normal of the same shape, and logsnr (b,) is
each image's noise level. The loss is a mean over an image's elements, but for `consistency`, which
is a norm; in float32 or wider. The registry holds builders, from keyword options to an objective,
so that a recipe can name one. One that changes along the run takes `images`, the images seen before
the step (`at_images`). The caller chooses the distribution of log-SNR: an objective that is an
integral over log-SNR (`sigmoid`) is multiplied by -1/2 dlogsnr/du where u was drawn.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

from torch import Tensor

from mezzotint.core.registry import Registry
from mezzotint.process.denoiser import Cond, Image, Model, PerImage

Objective = Callable[[Model, Image, Image, PerImage, Cond], PerImage]
Weight = Callable[[Tensor], Tensor]  # log-SNR -> factor on a squared error, same shape

registry: Registry[Callable[..., Objective]] = Registry("objective", __name__)
objective = registry.register
# Forward passes without a gradient that an objective adds to those of an image.
EXTRA_PASSES = {"consistency": 1}


def at_images(objective: Objective, images: int) -> Objective:
    """Return the objective as it is after `images` images of a run; most do not change."""
    changing: Callable[..., PerImage] = objective
    if "images" not in inspect.signature(changing).parameters:
        return objective
    return functools.partial(changing, images=images)


# Public names, below what their files import from here. The scan does not need these lines.
from mezzotint.process.objectives.multiscale import multiscale_mse  # noqa: E402
from mezzotint.process.objectives.pyramid import pyramid_loss, pyramid_targets  # noqa: E402
from mezzotint.process.objectives.regression import (  # noqa: E402
    min_snr_weight,
    residual,
    sigmoid_weight,
    weighted,
)
from mezzotint.process.objectives.variational import variational_bound  # noqa: E402

__all__ = [
    "EXTRA_PASSES",
    "Objective",
    "Weight",
    "at_images",
    "min_snr_weight",
    "multiscale_mse",
    "objective",
    "pyramid_loss",
    "pyramid_targets",
    "registry",
    "residual",
    "sigmoid_weight",
    "variational_bound",
    "weighted",
]
