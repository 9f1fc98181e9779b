"""Which tensors of a training step are float32 and which bfloat16: the table of the documents."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mezzotint as mz
from mezzotint.backbones import dummy_condition, text_width
from mezzotint.backbones.blocks import repeated_blocks
from mezzotint.backbones.precision import product_parameters
from mezzotint.core.registry import build
from mezzotint.models import get_schedule, preset_info
from mezzotint.process import objectives
from mezzotint.process.denoiser import Cond
from mezzotint.recipes import recipe_for

TINY = ["unet", "uvit", "sid2", "dimr", "jit", "diffit", "uvit-text", "diffit-latent"]
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
PAGE = Path(__file__).parents[2] / "docs/performance.md"

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ATTENTION = {"_softmax", "_scaled_dot_product_flash_attention_for_cpu"}
# Of a norm: its outputs after the first are the statistics that the backward pass reads.
NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm"}
WAVES = {"sin", "cos", "sigmoid", "atan", "exp"}  # of times and positions


class Dtypes(TorchDispatchMode):
    """Collects the floating dtypes that operations read and write, and who reads a parameter."""

    def __init__(self, model: mz.Model):
        super().__init__()
        self.read: dict[str, set[torch.dtype]] = defaultdict(set)
        self.written: dict[str, set[torch.dtype]] = defaultdict(set)
        self.casts: set[str] = set()
        self.storages = {
            p.untyped_storage().data_ptr(): name for name, p in model.backbone.named_parameters()
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        given, made = (
            [t for t in tree_leaves(x) if isinstance(t, Tensor) and t.is_floating_point()]
            for x in (args, out)
        )
        self.read[name] |= {t.dtype for t in given}
        self.written[name] |= {t.dtype for t in (made[1:] if name in NORMS else made)}
        if name == "_to_copy" and out.dtype == torch.bfloat16:
            self.casts.add(self.storages.get(args[0].untyped_storage().data_ptr(), ""))
        return out


def documented() -> dict[str, dict[str, str]]:
    """Return the table of the documents: family -> column -> dtype."""
    paragraphs = PAGE.read_text().split("## Precision\n", 1)[1].split("\n\n")
    rows = next(p for p in paragraphs if p.lstrip().startswith("| family")).strip().splitlines()
    header, _, *body = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    return {row[0].strip("`"): dict(zip(header[1:], row[1:], strict=True)) for row in body}


PLAN = documented()


def perturbed(preset: str) -> mz.Model:
    torch.manual_seed(0)
    size = {} if "latent" in preset or "text" in preset else {"size": 16}
    model = mz.create_model(f"{preset}-tiny", **size)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    return model


def step(model: mz.Model) -> tuple[Dtypes, Dtypes, Tensor, dict[str, set[torch.dtype]]]:
    """Return what a forward and a backward pass computed in, the loss, and the blocks' streams."""
    c = model.info.config
    x, eps = torch.randn(2, 2, c.channels, c.size, c.size)
    cond = Cond(label=torch.tensor([1, 2])) if c.num_classes else dummy_condition(c, x)
    if width := text_width(c):
        cond = Cond(text=torch.randn(2, 5, width), text_mask=torch.ones(2, 5, dtype=torch.bool))
    logsnr = get_schedule(model)(torch.tensor([0.3, 0.6], dtype=torch.float64))
    streams: dict[str, set[torch.dtype]] = defaultdict(set)

    def look(block, args, out):
        streams[type(block).__name__] |= {args[0].dtype, out.dtype}

    for block in repeated_blocks(model.backbone):
        block.register_forward_hook(look)
    forward, backward = Dtypes(model), Dtypes(model)
    objective = build(objectives.registry, recipe_for(model.info.preset).objective)
    with torch.autocast("cpu", torch.bfloat16), forward:
        loss = objective(model, x, eps, logsnr, cond)
    with backward:
        loss.sum().backward()
    return forward, backward, loss, streams


def test_the_table_names_every_family():
    families = {preset_info(f"{name}-tiny").backbone for name in TINY}
    assert families == set(mz.backbones.registry) == set(PLAN)


@pytest.mark.parametrize("preset", TINY)
def test_a_step_computes_in_the_dtypes_of_the_table(preset):
    model = perturbed(preset)
    plan = {k: DTYPES[v] for k, v in PLAN[model.info.backbone].items()}
    forward, backward, loss, streams = step(model)
    for part in (forward, backward):
        for name in PRODUCTS & part.read.keys():
            assert part.read[name] == {plan["products"]}, name
        for name in NORMS & part.written.keys():
            assert part.written[name] <= {plan["norm statistics"]}, name
    assert PRODUCTS & forward.read.keys()
    assert PRODUCTS & backward.read.keys()
    assert ATTENTION & forward.read.keys()
    for name in WAVES & forward.read.keys():
        assert torch.bfloat16 not in forward.read[name], name
    assert loss.dtype == plan["loss"]
    stream = {dtype for name, found in streams.items() for dtype in found if "Up" not in name}
    assert stream == {plan["residual stream"]}, streams
    # Positions, tables and gains are read in float32: only the weights of products are cast.
    assert not forward.casts - {""} - product_parameters(model.backbone)
    for name, p in model.backbone.named_parameters():
        assert p.grad is None or p.grad.dtype == plan["weights"], name


def test_the_page_says_what_follows_for_tf32():
    part = PAGE.read_text().split("## Precision", 1)[1].split("\n## ", 1)[0]
    assert re.search(r"TF32", part)
