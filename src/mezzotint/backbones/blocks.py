"""The repeated blocks of a backbone: the unit of sharding and of compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the members of the innermost ModuleLists, in order."""
    if isinstance(module, nn.ModuleList):
        return [block for member in module for block in (repeated_blocks(member) or [member])]
    return [block for child in module.children() for block in repeated_blocks(child)]


def compile_blocks(backbone: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each repeated block by itself: short compilations instead of one long one.

    All blocks of a kind share their code. Each width, with and without gradients, and each batch
    size is a compilation of its own.

    Args:
        backend: of torch.compile.
    """
    # Beyond its default of 8 compilations torch warns and runs the blocks uncompiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in repeated_blocks(backbone):
        # With dynamic shapes all but the first width would get the slower kernels for any size.
        block.compile(dynamic=False, backend=backend)
