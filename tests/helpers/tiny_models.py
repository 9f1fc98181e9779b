"""Small networks whose output is not zero."""

from __future__ import annotations

import torch

import mezzotint as mz

SMALL = {
    "unet-tiny": {"size": 8, "width": 8, "emb_dim": 16, "multipliers": (1, 1), "blocks": (1, 1),
                  "attention": (False, True)},
    "dimr-tiny": {"size": 8, "dims": (32, 16, 16), "hidden_dims": (32, 16, 16),
                  "depths": (3, 1, 1)},
    "diffit-latent-tiny": {"size": 8, "width": 64, "depth": 2},
}  # fmt: skip

# Networks of another preset's family that read captions instead of labels.
READERS = {
    f"{preset}+text": (preset, {"text_dim": 16, "num_classes": 0})
    for preset in ("jit-tiny", "sid2-tiny")
}


def create_tiny(name: str, **overrides) -> mz.Model:
    """Return a new network of a preset, or of one of `READERS`."""
    preset, fields = READERS.get(name, (name, {}))
    return mz.create_model(preset, **{**fields, **overrides})


def rows_seen(model: mz.Model) -> list[int]:
    """Return a list to which every call of the network adds its number of images."""
    rows: list[int] = []
    model.backbone.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    return rows


def tiny(preset: str = "unet-tiny", seed: int = 0, **overrides) -> mz.Model:
    """Return a small network with random weights, also where a new one has zeros."""
    torch.manual_seed(seed)
    model = mz.create_model(preset, **{**SMALL[preset], **overrides})
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.08)
    return model.eval().requires_grad_(False)
