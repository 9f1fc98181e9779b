"""alpha, sigma and the forward process as functions of the log-SNR."""

from __future__ import annotations

import torch
from torch import Tensor


def alpha(logsnr: Tensor) -> Tensor:
    """Return the scale of the image in z, in [0, 1]; any shape.

    simple diffusion section 2: alpha^2 = sigmoid(logsnr).
    """
    return torch.sigmoid(logsnr).sqrt()


def sigma(logsnr: Tensor) -> Tensor:
    """Return the scale of the noise in z, in [0, 1]; any shape.

    simple diffusion section 2: sigma^2 = sigmoid(-logsnr).
    """
    return torch.sigmoid(-logsnr).sqrt()


def append_dims(level: Tensor, like: Tensor) -> Tensor:
    """View a (b,) tensor of one number per image as (b, 1, ..., 1), to broadcast against `like`."""
    return level.reshape(-1, *[1] * (like.ndim - 1))


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def to_device_of(level: Tensor, like: Tensor) -> Tensor:
    """Move one number per image to the device of `like`; the host does not wait for the copy."""
    dtype = widest_float(like.device) if level.dtype == torch.float64 else level.dtype
    # CUDA stages pageable memory before the call returns, so `level` may go out of scope. MPS does
    # not promise that.
    return level.to(like.device, dtype, non_blocking=like.device.type == "cuda")


def diffuse(x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """Return z = alpha x + sigma eps (simple diffusion section 2), in float32 or x's wider dtype.

    Args:
        x: images in [-1, 1], (b, ...).
        eps: standard normal noise of the same shape.
        logsnr: (b,) natural log of alpha^2 / sigma^2.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    level = append_dims(logsnr, x)
    return (alpha(level) * x + sigma(level) * eps).to(wide)
