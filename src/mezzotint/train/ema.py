"""Exponential and power-function moving averages (EMA) of the weights; half-lives are in images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.config import Ema
from mezzotint.train.parallel import local_tensor

Weights = dict[str, Tensor]


def exponential_beta(ema: Ema, images: int, batch: int) -> float:
    """Return the decay of the average in the step of `batch` images that ends at `images` seen.

    EDM training_loop: beta = 0.5^(batch / half_life), where half_life is at most rampup times the
    images before the step.
    """
    half_life = ema.half_life_images
    if ema.rampup is not None:
        half_life = min(half_life, ema.rampup * (images - batch))
    return 0.5 ** (batch / max(half_life, 1e-8))


def horizon_event(ema: Ema, images: int) -> dict[str, Any] | None:
    """Return an event for events.jsonl if the half-life exceeds the images seen, else None.

    Then 0.5^(images / half_life) of the average is still the initial weights. With a rampup the
    half-life never exceeds a fraction of the images seen.
    """
    half_life = ema.half_life_images
    if ema.rampup is not None:
        half_life = min(half_life, ema.rampup * images)
    if half_life <= images:
        return None
    why = (
        f"the average's half-life of {half_life:,.0f} images exceeds the images seen: "
        f"{0.5 ** (images / half_life):.0%} of the averaged weights are still the initial ones, "
        "which sample grids and model/ show; set ema.rampup=0.05 to shorten the average early on"
    )
    return {"images": images, "event": "ema", "why": why}


def power_gamma(std: float) -> float:
    """Return the exponent gamma of a power-function average of relative width `std`.

    EDM2 section 3.1 and appendix C: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls
    with gamma.

    Errors: ValueError for std outside (0, 0.2887), the width of gamma = 0.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"EMA width {std} is outside (0, {12**-0.5:.4f}); EDM2 uses 0.05 and 0.10")
    low, high = 0.0, 1.0
    variance = lambda g: (g + 1) / ((g + 2) ** 2 * (g + 3))  # noqa: E731
    # Bisection: double the upper end until it is beyond the root, then halve the interval.
    while variance(high) > std**2:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if variance(middle) > std**2 else (low, middle)
    return (low + high) / 2


def power_beta(std: float, images: int, batch: int) -> float:
    """Return beta = (1 - batch / images)^(gamma + 1), EDM2 section 3.1; 0 at the first step."""
    return math.pow(max(0.0, 1 - batch / images), power_gamma(std) + 1)


def weights_of(module: nn.Module) -> Weights:
    """Return the parameters by name, not copied, detached."""
    return {name: p.detach() for name, p in module.named_parameters()}


def copy_weights(weights: Weights) -> Weights:
    """Return a detached copy in float32, the start of an average."""
    return {name: w.detach().to(torch.float32).clone() for name, w in weights.items()}


@torch.no_grad()
def update(average: Weights, weights: Weights, beta: float) -> None:
    """Set average to beta average + (1 - beta) weights, in place."""
    # Each rank its shards: as a whole, a sharded tensor costs the host time at every operation.
    own = [local_tensor(tensor) for tensor in average.values()]
    torch._foreach_lerp_(own, [local_tensor(weights[k].detach()) for k in average], 1 - beta)
