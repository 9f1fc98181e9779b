"""The repeated blocks of a backbone: the unit of sharding and of compiling."""

from __future__ import annotations

import torch
from torch import nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Members of the innermost ModuleLists, in order."""
    if isinstance(module, nn.ModuleList):
        return [block for member in module for block in (repeated_blocks(member) or [member])]
    return [block for child in module.children() for block in repeated_blocks(child)]


def compile_blocks(backbone: nn.Module) -> None:
    """torch.compile of each repeated block by itself: one short compilation per kind of block instead of a long one.

    Blocks of every width share their code, and each width, with and without gradients, and each batch size may be a
    compilation of its own. Beyond 8 of them torch would go back, with a warning, to running them as they are.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in repeated_blocks(backbone):
        block.compile(
            dynamic=False
        )  # or all but the first width would get kernels for any size, which are slower
