"""Optimisers and the learning rate as a function of images seen."""

from __future__ import annotations

import math

import torch
from torch import nn

from mezzotint.backbones import Backbone
from mezzotint.config import Optim


def learning_rate(optim: Optim, images: int, total: int) -> float:
    """Return the rate of the update after `images` of `total`: warm-up, then constant or cosine."""
    warm = min(1.0, images / optim.warmup_images) if optim.warmup_images else 1.0
    decay = 1.0
    if optim.decay == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * min(1.0, images / total)))
    return optim.lr * warm * decay


def group_by_decay(backbone: Backbone, weight_decay: float) -> list[dict]:
    """Return the trained parameters in two groups: decayed, and `no_decay_parameters`.

    DiMR section 4. The second group is left out where it is empty.
    """
    names = backbone.no_decay_parameters()
    trained = [(n, p) for n, p in backbone.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if n not in names]
    exempt = [p for n, p in trained if n in names]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    return [*groups, {"params": exempt, "weight_decay": 0.0}] if exempt else groups


def make_optimisers(optim: Optim, backbone: Backbone, fused: bool) -> list[torch.optim.Optimizer]:
    """Return AdamW or RAdam for all parameters, or Muon for hidden matrices and AdamW for the rest.

    Hidden matrices are weights of linear layers inside repeated blocks (members of a ModuleList).
    As Muon's authors advise, AdamW takes embeddings, positions, bias tables, the first and last
    layers, convolutions, gains and biases.

    Errors: ValueError where Muon finds no hidden matrix.
    """
    adam = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "fused": fused}
    decayed, *exempt = group_by_decay(backbone, optim.weight_decay)
    if optim.name == "radam":
        del adam["fused"]  # it has no fused form
        return [torch.optim.RAdam([decayed, *exempt], **adam, decoupled_weight_decay=True)]
    if optim.name == "adamw":
        return [torch.optim.AdamW([decayed, *exempt], **adam)]
    inside = {
        id(linear.weight)
        for module in backbone.modules()
        if isinstance(module, nn.ModuleList)
        for linear in module.modules()
        if isinstance(linear, nn.Linear)
    }
    # A parameter exempt from decay is no hidden matrix either, so only the decayed ones are split.
    hidden = [p for p in decayed["params"] if id(p) in inside]
    rest = [p for p in decayed["params"] if id(p) not in inside]
    if not hidden:
        raise ValueError(
            "optim.name=muon needs 2-D weights inside repeated blocks; this backbone has none; "
            "use adamw"
        )
    muon = torch.optim.Muon(
        hidden,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        # Scales Muon's update to the size of AdamW's, so that one learning rate fits both.
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, torch.optim.AdamW([{**decayed, "params": rest}, *exempt], **adam)]


def set_learning_rate(optimisers: list[torch.optim.Optimizer], lr: float) -> None:
    """Set the rate of every group of every optimiser."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr
