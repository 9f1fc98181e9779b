"""The repeated blocks of a backbone: the unit of sharding and of compiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from mezzotint.backbones.dimr_cascade import Cascade


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the members of the innermost ModuleLists, in order."""
    if isinstance(module, nn.ModuleList):
        return [block for member in module for block in (repeated_blocks(member) or [member])]
    return [block for child in module.children() for block in repeated_blocks(child)]


def compile_blocks(backbone: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each repeated block and DiMR's cascades: short compilations instead of one long one.

    All blocks of a kind share their code. Each width, with and without gradients, and each batch
    size is a compilation of its own.

    Args:
        backend: of torch.compile.
    """
    # Beyond its default of 8 compilations torch warns and runs the blocks uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # With dynamic shapes all but the first width would get the slower kernels for any size.
    for block in repeated_blocks(backbone):
        block.compile(dynamic=False, backend=backend)
    for module in backbone.modules():
        if isinstance(module, Cascade):
            module.compile_parts(partial(torch.compile, dynamic=False, backend=backend))
