"""FSDP2 gathers the weights of blocks in bfloat16, and computes what copies do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

import mezzotint as mz
from mezzotint.backbones.precision import product_parameters
from mezzotint.process.denoiser import Cond
from mezzotint.train.parallel import full_tensor, shard


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(model: mz.Model):
    """Return the outputs and gradients of a step under autocast."""
    torch.manual_seed(1)
    c = model.info.config
    z, target = torch.randn(2, 2, c.channels, c.size, c.size)
    with torch.autocast("cpu", torch.bfloat16):
        outs = model.raw(z, torch.tensor([-1.0, 1.0]), Cond(label=torch.tensor([1, 2])))
    (outs[-1].float() - target).square().mean().backward()
    gradients = {
        name: full_tensor(p.grad)
        for name, p in model.backbone.named_parameters()
        if p.grad is not None
    }
    return [out.detach() for out in outs], gradients


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize("preset", ["dimr-tiny", "sid2-tiny", "jit-tiny"])
def test_shards_gathered_in_bf16_compute_what_copies_do(preset, one_rank):
    torch.manual_seed(0)
    model = mz.create_model(preset, size=16)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    sharded = copy.deepcopy(model)
    shard(sharded.backbone, torch.bfloat16)
    products = product_parameters(model.backbone)
    dtypes: dict[str, torch.dtype] = {}
    for name, module in sharded.backbone.named_modules():

        def remember(module, args, name=name):
            for own, p in module.named_parameters(recurse=False):
                dtypes[f"{name}.{own}"] = p.dtype

        module.register_forward_pre_hook(remember)
    (outs, grads), (expected, true_grads) = step(sharded), step(model)
    # Only the weights of blocks are gathered in bf16; DiMR's blocks hold products alone.
    outside = [
        n for n in dtypes if n.startswith((".", "time.", "positions.", "label.", "branches"))
    ]
    kept = {n for n in outside if n.lstrip(".") not in products}
    assert kept
    assert {dtypes[n] for n in kept} == {torch.float32}, {n: dtypes[n] for n in kept}
    assert torch.bfloat16 in dtypes.values()
    exact = preset == "dimr-tiny"
    for a, b in zip(outs, expected, strict=True):
        assert torch.equal(a, b) if exact else (a - b).norm() < 0.03 * b.norm()
    assert grads.keys() == true_grads.keys()
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    joined, truth = (torch.cat([g[n].flatten() for n in grads]) for g in (grads, true_grads))
    assert (joined - truth).norm() <= 0.05 * truth.norm()
