"""A network's input: checks of sides, channels and labels; input transforms; space to depth."""

from __future__ import annotations

import torch
from torch import Tensor


def check_sides(height: int, width: int, factor: int) -> None:
    """Check that both sides are positive multiples of `factor`.

    Errors: ValueError with the nearest valid sizes.
    """
    if height > 0 and width > 0 and height % factor == 0 and width % factor == 0:
        return

    def nearest(side: int) -> list[int]:
        low = side // factor * factor
        return [side] if low == side > 0 else [s for s in (low, low + factor) if s > 0]

    valid = [f"{h}x{w}" for h in nearest(height) for w in nearest(width)]
    raise ValueError(
        f"an input of {height}x{width} does not fit: both sides must be multiples of {factor}; "
        f"nearest: {', '.join(valid)}"
    )


def label_rows(
    label: Tensor | None, num_classes: int, batch: int, device: torch.device, null: bool = True
) -> Tensor:
    """Return `label`, or the null label num_classes for each image where it is None; int64.

    Values are checked on a CPU only. Reading them from a GPU would make the host wait; there the
    embedding itself fails.

    Args:
        null: whether the network has a null label.

    Errors: ValueError for a label outside 0...num_classes, and for labels that are not one whole
        number per image.
    """
    if label is None:
        if not null:
            raise ValueError(f"this network has no null label: give labels, 0...{num_classes - 1}")
        return torch.full((batch,), num_classes, device=device)
    if num_classes == 0:
        raise ValueError(
            "a label was given to an unconditional network (num_classes 0); pass no label"
        )
    if label.ndim != 1 or label.shape[0] != batch:
        given = f"{label.shape[0]} labels" if label.ndim == 1 else f"labels {tuple(label.shape)}"
        raise ValueError(f"{given} for a batch of {batch}; give one per image, ({batch},)")
    if label.is_floating_point() or label.dtype == torch.bool:
        raise ValueError(f"labels of {label.dtype}; give whole numbers, e.g. torch.tensor([0, 3])")
    readable = label.device.type == "cpu" and not torch.compiler.is_compiling()
    label = label.long()  # a byte cannot be compared with 1000
    last = num_classes if null else num_classes - 1
    if readable and bool(((label < 0) | (label > last)).any()):
        no_class = f", {num_classes} is the null label" if null else ""
        raise ValueError(
            f"labels {int(label.min())}...{int(label.max())} are out of range: "
            f"0...{num_classes - 1} are classes{no_class}"
        )
    return label.to(device)


GRID = 64  # most cells per side of the `-tiny`, `-small` and `-base` presets, whatever the size


def patch_at(size: int, cells: int = GRID) -> int:
    """Return the smallest power of 2 that leaves at most `cells` on a side of `size` pixels.

    simple diffusion (arXiv 2301.11093) keeps its grid, and so its cost, from 128 to 512 pixels.
    """
    return 1 << ((size - 1) // cells).bit_length()


def wavelet_at(size: int, cells: int = GRID) -> dict[str, object]:
    """Return config fields: the patch of `patch_at`, by the wavelet up to a patch of 4.

    simple diffusion uses the wavelet at 256 and 512 pixels.
    """
    patch = patch_at(size, cells)
    return {"transform": "none" if patch == 1 else "dwt" if patch <= 4 else "conv", "patch": patch}


def convolution_at(size: int, cells: int = GRID) -> dict[str, object]:
    """Return config fields: the patch of `patch_at`, by a convolution of that stride.

    SiD2 uses the convolution at 256 and 512 pixels.
    """
    patch = patch_at(size, cells)
    return {"transform": "none" if patch == 1 else "conv", "patch": patch}


def space_to_depth(z: Tensor, patch: int) -> Tensor:
    """Move blocks of pixels to channels: (b, c, h, w) to (b, patch² c, h/patch, w/patch).

    The new channels are in the order row, column, channel.
    """
    if patch == 1:
        return z
    b, c, h, w = z.shape
    cells = z.view(b, c, h // patch, patch, w // patch, patch).permute(0, 3, 5, 1, 2, 4)
    return cells.reshape(b, patch**2 * c, h // patch, w // patch)


def depth_to_space(h: Tensor, patch: int) -> Tensor:
    """Undo `space_to_depth`: (b, patch² c, h/patch, w/patch) to (b, c, h, w)."""
    if patch == 1:
        return h
    b, c, rows, columns = h.shape
    cells = h.view(b, patch, patch, c // patch**2, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return cells.reshape(b, c // patch**2, rows * patch, columns * patch)


def wavelet_levels(transform: str, patch: int) -> int:
    """Return the levels of the wavelet transform; 0 for the other transforms.

    Errors: ValueError for a transform that does not exist with this patch.
    """
    if (transform == "none" and patch == 1) or (transform == "conv" and patch >= 1):
        return 0
    if transform == "dwt" and patch in (2, 4):
        return patch.bit_length() - 1
    raise ValueError(
        f"there is no input transform {transform!r} with patch {patch}; "
        "choose 'none' with patch 1, 'dwt' with patch 2 or 4 (levels 1 or 2), "
        "or 'conv' with any patch"
    )


def check_input(z: Tensor, channels: int, factor: int) -> None:
    """Check that z (b, c, h, w) has the right channels and sides that are multiples of `factor`."""
    if z.ndim != 4:
        raise ValueError(
            f"an input of shape {tuple(z.shape)}; give a batch (b, {channels}, height, width)"
        )
    if z.shape[1] != channels:
        raise ValueError(f"an input of {z.shape[1]} channels was given to a network of {channels}")
    check_sides(z.shape[2], z.shape[3], factor)


def input_factor(size: tuple[int, int], transform: str, patch: int, halvings: int) -> int:
    """Return what both sides of an input must be multiples of.

    Errors: ValueError where the native height and width are no such multiples.
    """
    # Refuses a patch of 0, and a transform that does not exist with this patch.
    wavelet_levels(transform, patch)
    factor = patch * 2**halvings
    check_sides(*size, factor)
    return factor
