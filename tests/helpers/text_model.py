"""A tiny model that reads text, saved with the name of its text encoder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

import mezzotint as mz
from mezzotint.data.text_encoder import open_text_encoder


def fill_zeros(model) -> None:
    """Replace zero-initialised weights by random ones, so that images depend on their seeds."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)


def save_text_model(folder: Path, t5: Path, name: str) -> None:
    """Save a uvit-text-tiny of 16 pixels whose info names that text encoder."""
    torch.manual_seed(0)
    small = {
        "size": 16,
        "width": 8,
        "emb_dim": 16,
        "multipliers": (1, 2),
        "blocks": (1,),
        "depth": 1,
        "heads": 2,
    }
    model = mz.create_model("uvit-text-tiny", **small, text_dim=16)
    fill_zeros(model)
    text = {"encoder": name, "encoder_hash": open_text_encoder(str(t5)).hash, "max_tokens": 16}
    model.info = dataclasses.replace(model.info, extra={"text": text})
    mz.save_model(model, folder)
