"""Averages of the weights as functions of images seen, so that neither batch nor world size changes them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.config import Ema

Weights = dict[str, Tensor]


def exponential_beta(ema: Ema, images: int, batch: int) -> float:
    """What the average keeps of itself in the step that ends at `images` and saw `batch` of them.

    EDM training_loop: beta = 0.5^(batch / half_life), half_life = min(half_life, rampup * images before the step).
    """
    half_life = ema.half_life_images
    if ema.rampup is not None:
        half_life = min(half_life, ema.rampup * (images - batch))
    return 0.5 ** (batch / max(half_life, 1e-8))


def horizon_event(ema: Ema, images: int) -> dict[str, Any] | None:
    """For events.jsonl: that the average reaches back beyond the start of the run at `images` seen; None if not so.

    With a ramp the half-life never exceeds a fraction of the images seen; without one, 0.5^(images / half_life) of the
    average is still the initial weights.
    """
    half_life = (
        ema.half_life_images
        if ema.rampup is None
        else min(ema.half_life_images, ema.rampup * images)
    )
    if half_life <= images:
        return None
    why = (
        f"the average's half-life of {half_life:,.0f} images is longer than the run so far: "
        f"{0.5 ** (images / half_life):.0%} of the averaged weights is still the initial ones, which "
        "grids and model/ show; ema.rampup=0.05 shortens the average early in the run"
    )
    return {"images": images, "event": "ema", "why": why}


def power_gamma(std: float) -> float:
    """The exponent gamma of a power-function average of relative width `std`; EDM2 section 3.1 and appendix C.

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), falling in gamma; std lies below 0.2887, where gamma is 0.
    """
    if not 0 < std < 12**-0.5:
        raise ValueError(f"EMA width {std} is outside (0, {12**-0.5:.4f}); EDM2 uses 0.05 and 0.10")
    low, high = 0.0, 1.0
    variance = lambda g: (g + 1) / ((g + 2) ** 2 * (g + 3))  # noqa: E731
    while variance(high) > std**2:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if variance(middle) > std**2 else (low, middle)
    return (low + high) / 2


def power_beta(std: float, images: int, batch: int) -> float:
    """EDM2 section 3.1: beta = (1 - dt / t)^(gamma + 1), t and dt in images; 0 at the first step."""
    return math.pow(max(0.0, 1 - batch / images), power_gamma(std) + 1)


def weights_of(module: nn.Module) -> Weights:
    """The parameters by name, as they are (not copied), without gradient."""
    return {name: p.detach() for name, p in module.named_parameters()}


def snapshot(weights: Weights) -> Weights:
    """A detached copy in float32, the start of an average."""
    return {name: w.detach().to(torch.float32).clone() for name, w in weights.items()}


@torch.no_grad()
def update(average: Weights, weights: Weights, beta: float) -> None:
    """average <- beta average + (1 - beta) weights, in place."""
    torch._foreach_lerp_(list(average.values()), [weights[k].detach() for k in average], 1 - beta)
