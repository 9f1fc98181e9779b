"""Resizing and normalisation for feature networks.

Different resizes change FID by more than most papers improve it (Parmar et al. 2022, clean-fid).
The rule is therefore part of every feature set's metadata.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

INCEPTION_SIZE = 299
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Prepare = Callable[[UInt8[Tensor, "b c h w"]], Tensor]


def as_uint8(images: Tensor, channels: int) -> UInt8[Tensor, "b c h w"]:
    """Return images as uint8; floats in [0, 1] are rounded to the nearest of 0...255.

    Model output in [-1, 1] is not accepted: `mezzotint.data.transforms.to_uint8` converts it by a
    rule that is part of the protocol.

    Errors: ValueError for other dtypes, ranges or numbers of channels, and for NaN.
    """
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; expected (images, channels, height, width)"
        )
    if images.shape[1] != channels:
        grey = (
            "; repeat the grey channel three times if that is meant" if images.shape[1] == 1 else ""
        )
        raise ValueError(
            f"images have {images.shape[1]} channels, the feature network needs {channels}{grey}"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give uint8 in 0...255 or floats in [0, 1]")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinity")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise ValueError(
            f"float images are in [{low:.4g}, {high:.4g}], outside [0, 1]; convert model output in "
            "[-1, 1] with mezzotint.data.transforms.to_uint8 first"
        )
    return (images * 255).round().to(torch.uint8)


def tf1_resize(
    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"], size: int
) -> Float[Tensor, "b c s s"]:
    """Resize as TensorFlow 1: bilinear, no aligned corners, no half-pixel centres, no antialiasing.

    Output pixel i is at i * (input size / output size) of the input. Its right neighbour is clamped
    to the last pixel. Positions and weights are float32, as in the graph.
    """
    images = images.to(torch.float32)
    for dim in (2, 3):
        length = images.shape[dim]
        step = torch.tensor(length / size, dtype=torch.float32, device=images.device)
        at = torch.arange(size, dtype=torch.float32, device=images.device) * step
        low = at.long().clamp_max(length - 1)
        high = (low + 1).clamp_max(length - 1)
        weight = (at - low).reshape(-1, *[1] * (3 - dim))
        left, right = images.index_select(dim, low), images.index_select(dim, high)
        images = left + (right - left) * weight
    return images


def inception_tf1(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    """Prepare as the 2015 graph does, used by TTUR, ADM and EDM: `tf1_resize`, (v - 128) / 128."""
    return (tf1_resize(images, INCEPTION_SIZE) - 128) / 128


def inception_clean(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    """Prepare as clean-fid: Pillow's bicubic in float32, clipped to 0...255, (v - 128) / 128."""
    from PIL import Image

    size = (INCEPTION_SIZE, INCEPTION_SIZE)

    def resize_channel(channel: np.ndarray) -> np.ndarray:
        image = Image.fromarray(channel.astype(np.float32))
        return np.array(image.resize(size, Image.Resampling.BICUBIC))

    flat = images.reshape(-1, *images.shape[2:]).cpu().numpy()
    resized = torch.from_numpy(np.stack([resize_channel(c) for c in flat])).clamp(0, 255)
    return (resized.reshape(-1, 3, *size).to(images.device) - 128) / 128


def inception_pytorch(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    """Prepare as pytorch-fid: half-pixel bilinear without antialiasing on [0, 1], then 2v - 1."""
    scaled = images.to(torch.float32) / 255
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return 2 * F.interpolate(scaled, size=size, mode="bilinear", align_corners=False) - 1


# Suffix of a feature set's name -> (description for its metadata, function).
INCEPTION_RULES: dict[str, tuple[str, Prepare]] = {
    "": ("299 px, TensorFlow 1 bilinear, (v - 128) / 128", inception_tf1),
    "clean": ("299 px, clean-fid: Pillow bicubic in float32, (v - 128) / 128", inception_clean),
    "pytorch": ("299 px, pytorch-fid: half-pixel bilinear, 2v / 255 - 1", inception_pytorch),
}


def make_prepare(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Prepare:
    """Return a function: antialiased bicubic to `size` on [0, 1], then (v - mean) / std."""

    def prepare(images: UInt8[Tensor, "b c h w"]) -> Tensor:
        scaled = images.to(torch.float32) / 255
        if images.shape[2:] != (size, size):
            scaled = F.interpolate(
                scaled, size=(size, size), mode="bicubic", antialias=True, align_corners=False
            )
        return (scaled - scaled.new_tensor(mean).view(-1, 1, 1)) / scaled.new_tensor(std).view(
            -1, 1, 1
        )

    return prepare
