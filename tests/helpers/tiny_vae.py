"""A tiny AutoencoderKL, saved by diffusers."""

from __future__ import annotations

from pathlib import Path

import torch


def saved_vae(folder: Path, seed: int, **changes) -> Path:
    """Write an autoencoder of factor 2, 4 channels, scale 0.7, shift 0.1."""
    import diffusers

    torch.manual_seed(seed)
    options = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "scaling_factor": 0.7,
        "shift_factor": 0.1,
        "layers_per_block": 1,
    }  # fmt: skip
    diffusers.AutoencoderKL(**{**options, **changes}).save_pretrained(folder)
    return folder
