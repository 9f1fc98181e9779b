"""EDM's non-leaky augmentation of training images (arXiv 2206.00364, appendix F.2, table 6).

Eight random numbers a0 ... a7 flip, scale, rotate, stretch and translate an image. Nine numbers
made of them condition the network. These are zero for an image that is not augmented, and in
sampling, so that samples are not augmented.

Flips are exact. All else is one bicubic interpolation with reflected borders, clamped to -1...1;
the authors' code interpolates linearly between two wavelet filters. An image whose nine numbers are
zero keeps every bit.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from mezzotint.core import rng
from mezzotint.data.transforms import flip

# Table 6: A_scale, A_aniso and A_trans. A_prob is `data.augment`.
SCALE, ANISOTROPY, TRANSLATION = 2**0.2, 2**0.2, 1 / 8


def draw_augmentations(
    seed: int, image_numbers: list[int], probability: float
) -> Float64[Tensor, "b 8"]:
    """Draw a0 ... a7 of table 6 for each image number of a run.

    The horizontal flip has probability 1/2. Each other transformation has `probability`, else its
    numbers are zero.
    """
    rows = []
    for n in image_numbers:
        random = rng.philox("augment", seed, n, 1)  # draw 0 is `transforms.draw_flips`
        a0, a1 = random.integers(2, size=2)
        a2, a5, a6, a7 = random.standard_normal(4)
        a3, a4 = random.uniform(-math.pi, math.pi, size=2)
        flip_y, scale, rotate, stretch, move = random.random(5) < probability
        on = [True, flip_y, scale, rotate, stretch, stretch, move, move]
        rows.append(np.where(on, [a0, a1, a2, a3, a4, a5, a6, a7], 0.0))
    return torch.from_numpy(np.stack(rows))


def augmentation_label(a: Float64[Tensor, "b 8"]) -> Float[Tensor, "b 9"]:
    """Return the network's condition, float32 (table 6, last column)."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    label = [a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7]
    return torch.stack(label, 1).float()


def augment(images: Float[Tensor, "b c h w"], a: Float64[Tensor, "b 8"]) -> Tensor:
    """Return images of -1...1, each flipped, then scaled, rotated, stretched and translated.

    Args:
        images: on any device. a: of `draw_augmentations`, on the CPU.
    """
    images = flip(images, a[:, 0] == 1)
    images = flip(images, a[:, 1] == 1, dim=-2)
    rows = (a[:, 2:] != 0).any(1).nonzero()[:, 0]
    if not len(rows):
        return images
    moved = images.index_select(0, rows.to(images.device))
    grid = sampling_grid(a[rows], *images.shape[2:]).to(images.device)
    moved = F.grid_sample(moved, grid, "bicubic", "reflection", align_corners=False)
    return images.index_copy(0, rows.to(images.device), moved.clamp(-1, 1))


def sampling_grid(
    a: Float64[Tensor, "b 8"], height: int, width: int
) -> Float[Tensor, "b {height} {width} 2"]:
    """Return where each pixel comes from, as (x, y) of `grid_sample`: -1...1 from edge to edge."""
    _, _, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    # Table 6: p' = M p + t in pixels from the image's middle, with
    # M = Rotate(a4) Scale(k, 1/k) Rotate(-a4) Rotate(-a3) s, s = A_scale^a2, k = A_aniso^a5 and
    # t = A_trans (a6 width, a7 height).
    s, k = SCALE**a2, ANISOTROPY**a5
    stretch = _rotation(a4) @ torch.diag_embed(torch.stack([1 / k, k], 1)) @ _rotation(-a4)
    inverse = (_rotation(a3) @ stretch / s[:, None, None])[:, None, None]
    size = torch.tensor([width, height], dtype=torch.float64)
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in (height, width))
    target = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    offset = target - (TRANSLATION * torch.stack([a6, a7], 1) * size)[:, None, None]
    # p = M^-1 (p' - t). A sum, not a product of matrices: it rounds alike in every batch.
    source = (inverse * offset[..., None, :]).sum(-1)
    return (source / (size / 2)).float()


def _rotation(angle: Float64[Tensor, " b"]) -> Float64[Tensor, "b 2 2"]:
    """Return [[cos, -sin], [sin, cos]] of each angle."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
