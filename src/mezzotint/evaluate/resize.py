"""From uint8 images to what a feature network reads: resizes whose differences move FID more than most papers' gains.

Parmar et al. 2022 (clean-fid) measured that; so the rule is part of every feature set's card.
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
    """`images` as uint8, after looking at them: uint8 passes, floats in [0, 1] are rounded to the nearest of 0...255.

    Errors: ValueError for other dtypes, ranges or numbers of channels, and for NaN. (Model output in [-1, 1] has a rule
    of its own, `mezzotint.data.transforms.to_uint8`, which goes on the card.)
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
            f"images have {images.shape[1]} channels, the feature network reads {channels}{grey}"
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
            f"float images lie in [{low:.4g}, {high:.4g}], outside [0, 1]; convert model output in [-1, 1] with "
            f"mezzotint.data.transforms.to_uint8 first"
        )
    return (images * 255).round().to(torch.uint8)


def tf1_resize(
    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"], size: int
) -> Float[Tensor, "b c s s"]:
    """TensorFlow 1's bilinear resize: neither aligned corners nor half-pixel centres, and no antialiasing.

    Output pixel i lies at i * (input / output) of the input; its right neighbour is clamped to the last pixel.
    Positions and weights in float32, as in the graph.
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
    """As inside the 2015 graph, hence in ADM's, EDM's and TTUR's FID: `tf1_resize`, then (v - 128) / 128."""
    return (tf1_resize(images, INCEPTION_SIZE) - 128) / 128


def inception_clean(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    """As clean-fid: Pillow's antialiased bicubic per channel in float32, clipped to 0...255, then (v - 128) / 128."""
    from PIL import Image

    def resized(channel: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(channel.astype(np.float32))
        return np.array(picture.resize((INCEPTION_SIZE, INCEPTION_SIZE), Image.Resampling.BICUBIC))

    flat = images.reshape(-1, *images.shape[2:]).cpu().numpy()
    stacked = torch.from_numpy(np.stack([resized(channel) for channel in flat])).clamp(0, 255)
    return (stacked.reshape(-1, 3, INCEPTION_SIZE, INCEPTION_SIZE).to(images.device) - 128) / 128


def inception_pytorch(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 299 299"]:
    """As pytorch-fid: half-pixel bilinear without antialiasing on [0, 1], then 2v - 1."""
    scaled = images.to(torch.float32) / 255
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return 2 * F.interpolate(scaled, size=size, mode="bilinear", align_corners=False) - 1


# suffix of a feature set's name -> (words for its card, function)
INCEPTION_RULES: dict[str, tuple[str, Prepare]] = {
    "": ("299 px, TensorFlow 1 bilinear, (v - 128) / 128", inception_tf1),
    "clean": ("299 px, clean-fid: Pillow bicubic in float32, (v - 128) / 128", inception_clean),
    "pytorch": ("299 px, pytorch-fid: half-pixel bilinear, 2v / 255 - 1", inception_pytorch),
}


def normalised(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Prepare:
    """Antialiased bicubic to (size, size) on [0, 1], then (v - mean) / std per channel."""

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
