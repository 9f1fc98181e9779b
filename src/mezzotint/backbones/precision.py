"""Which parameters autocast reads in its own dtype, and a copy of a model that stores them in it.

docs/performance.md, "Precision", has the dtypes of every family; a test compares it with a step.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from mezzotint.backbones.diffit import TMSA
from mezzotint.backbones.dimr_cascade import Cascade
from mezzotint.process.denoiser import Model

PRODUCTS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def product_parameters(backbone: nn.Module) -> set[str]:
    """Return the names of the parameters that only products and convolutions read.

    Autocast casts these at every call. All others stay float32: time vectors, positions, embedding
    tables, norms, DiffiT's bias tables and the biases that it adds to its time vectors, the bias
    that DiMR's cascade adds to its float32 sums.
    """
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in backbone.named_modules()
        if isinstance(module, PRODUCTS)
        for name, _ in module.named_parameters(recurse=False)
    }
    added = {
        f"{name}.{'project' if isinstance(module, Cascade) else 'qkv'}.bias"
        for name, module in backbone.named_modules()
        if isinstance(module, (Cascade, TMSA))
    }
    return names - added


def share_weights(model: Model, products: torch.dtype | None = None) -> Model:
    """Return a model of new modules that share the weights of `model`, to be cast or compiled.

    Under autocast in `products` its outputs are those of `model`, without casting a weight at each
    call. Weights that are cast no longer follow those of `model`.

    Args:
        products: dtype in which float32 weights of products are stored; None shares them too.
    """
    low = set[str]() if products is None else product_parameters(model.backbone)
    shared: dict[int, object] = {id(buffer): buffer for buffer in model.backbone.buffers()}
    for name, weight in model.backbone.named_parameters():
        if name in low and weight.dtype == torch.float32:
            cast = nn.Parameter(weight.detach().to(products), requires_grad=False)
            shared[id(weight)] = cast
        else:
            shared[id(weight)] = weight
    first = model.input_dtype or next(model.backbone.parameters()).dtype
    backbone = copy.deepcopy(model.backbone, shared)
    copied = Model(backbone, model.parameterisation, model.info, input_dtype=first)
    return copied.train(model.training)
