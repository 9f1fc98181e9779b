"""Optimisers and the learning rate as a function of images seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from mezzotint.config import Optim


def learning_rate(optim: Optim, images: int, total: int) -> float:
    """Rate of the update that starts when `images` have been seen: linear warm-up from 0, then constant or cosine."""
    warm = min(1.0, images / optim.warmup_images) if optim.warmup_images else 1.0
    fall = (
        0.5 * (1 + math.cos(math.pi * min(1.0, images / total))) if optim.decay == "cosine" else 1.0
    )
    return optim.lr * warm * fall


def groups(backbone: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters in two groups: decayed, and those the backbone's `no_decay_parameters` names (DiMR section 4)."""
    method = getattr(backbone, "no_decay_parameters", None)
    exempt = method() if method is not None else set()
    named = [(n, p) for n, p in backbone.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if n not in exempt]
    spared = [p for n, p in named if n in exempt]
    result = [{"params": decayed, "weight_decay": weight_decay}]
    return [*result, {"params": spared, "weight_decay": 0.0}] if spared else result


def make_optimisers(optim: Optim, backbone: nn.Module, fused: bool) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the hidden matrices and AdamW over the rest.

    Muon takes the weights of linear layers that sit inside repeated blocks (members of a ModuleList); embeddings,
    positions and bias tables, the first and last layers, convolutions, gains and biases stay with AdamW, as its authors
    advise.
    """
    adam = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "fused": fused}
    if optim.name == "adamw":
        return [torch.optim.AdamW(groups(backbone, optim.weight_decay), **adam)]
    inside = {
        id(linear.weight)
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList)
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    }
    decayed, *spared = groups(
        backbone, optim.weight_decay
    )  # what the backbone spares from decay is no hidden matrix
    hidden = [p for p in decayed["params"] if id(p) in inside]
    if not hidden:
        raise ValueError(
            "optim.name=muon needs 2-D weights inside repeated blocks; this backbone has none; use adamw"
        )
    rest = [{**decayed, "params": [p for p in decayed["params"] if id(p) not in inside]}, *spared]
    muon = torch.optim.Muon(
        # "match_rms_adamw" scales Muon's update to AdamW's size, so that one learning rate serves both.
        hidden, lr=optim.lr, weight_decay=optim.weight_decay, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    return [muon, torch.optim.AdamW(rest, **adam)]


def set_learning_rate(optimisers: list[torch.optim.Optimizer], lr: float) -> None:
    """The same rate for every group of every optimiser."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr
