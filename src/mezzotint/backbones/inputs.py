"""Checks of a network's input: sides, channels, labels, input transforms."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sides(height: int, width: int, factor: int) -> None:
    """ValueError with the nearest valid sizes unless both sides are positive multiples of `factor`."""
    if height > 0 and width > 0 and height % factor == 0 and width % factor == 0:
        return

    def near(side: int) -> list[int]:
        low = side // factor * factor
        return [side] if low == side > 0 else [s for s in (low, low + factor) if s > 0]

    valid = [f"{h}x{w}" for h in near(height) for w in near(width)]
    raise ValueError(
        f"an input of {height}x{width} does not fit: both sides must be multiples of {factor}; "
        f"nearest: {', '.join(valid)}"
    )


def label_index(label: Tensor | None, num_classes: int, batch: int, device: torch.device) -> Tensor:
    """Rows of a label embedding with num_classes + 1 rows: `label`, or the null label num_classes where it is None.

    Errors: ValueError for a label outside 0...num_classes or a wrong count. Values are read on the CPU alone, since
    reading them elsewhere would stop the host until the device has caught up; there the embedding itself fails.
    """
    if label is None:
        return torch.full((batch,), num_classes, device=device)
    if num_classes == 0:
        raise ValueError(
            "a label was given to an unconditional network (num_classes 0); pass no label"
        )
    if label.shape[0] != batch:
        raise ValueError(f"{label.shape[0]} labels for a batch of {batch}")
    readable = label.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and bool(((label < 0) | (label > num_classes)).any()):
        raise ValueError(
            f"labels {int(label.min())}...{int(label.max())} are out of range: 0...{num_classes - 1} are classes, "
            f"{num_classes} is the null label"
        )
    return label.to(device)


def wavelet_levels(transform: str, patch: int) -> int:
    """Levels of the wavelet that `transform` and `patch` mean; 0 for the other transforms. ValueError for a misfit."""
    if (transform == "none" and patch == 1) or (transform == "conv" and patch >= 1):
        return 0
    if transform == "dwt" and patch in (2, 4):
        return patch.bit_length() - 1
    raise ValueError(
        f"input transform {transform!r} with patch {patch} does not exist; "
        "choose 'none' with patch 1, 'dwt' with patch 2 or 4 (levels 1 or 2), or 'conv' with any patch"
    )


def check_input(z: Tensor, channels: int, factor: int) -> None:
    """ValueError where z (b, c, h, w) has other channels or a side that is no multiple of `factor`."""
    if z.shape[1] != channels:
        raise ValueError(f"an input of {z.shape[1]} channels was given to a network of {channels}")
    check_sides(z.shape[2], z.shape[3], factor)


def checked_factor(size: int, transform: str, patch: int, halvings: int) -> int:
    """What both sides of an input must be multiples of; ValueError where the native `size` is none."""
    wavelet_levels(transform, patch)  # refuses a patch of 0 and other misfits
    factor = patch * 2**halvings
    check_sides(size, size, factor)
    return factor
