"""Regional compilation: whole graphs, one per kind of block, none after the first step.

Everything runs in another process, since shape checks wrap all functions here. With the oldest
supported torch it is run by hand, because PyPI's Linux build of it brings CUDA, 7 GB installed:

    PYTHONPATH=src python tests/backbones/test_compile.py diffit dimr jit sid2 unet uvit

With torch 2.10.0 that printed no breaks, and as many graphs as with 2.13.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

import mezzotint as mz
from mezzotint.backbones import get_backbone, registry
from mezzotint.backbones.blocks import compile_blocks, repeated_blocks
from mezzotint.backbones.dimr_cascade import Cascade, NormedProjection
from mezzotint.process.denoiser import Cond

# One network per family, as shallow as its kinds of blocks allow: tracing takes the time.
NETWORKS = {
    "diffit": ("diffit-latent-tiny", {"depth": 2}),
    "diffit_image": ("diffit-tiny", {}),
    "dimr": ("dimr-latent-tiny", {"depths": (3, 3)}),
    "jit": ("jit-tiny", {}),
    "sid2": ("sid2-tiny", {}),
    "unet": ("unet-tiny", {"multipliers": (1, 2), "blocks": (1, 1), "attention": (False, True)}),
    "uvit": ("uvit-tiny", {}),
}
FAST = ("diffit", "dimr", "jit")
SLOW = ("diffit_image", "sid2", "unet", "uvit")


def example(model, batch):
    c = model.info.config
    z = torch.randn(batch, c.channels, c.size, c.size)
    cond = Cond(label=torch.zeros(batch, dtype=torch.long))
    return z, model.parameterisation.noise(torch.linspace(-4, 3, batch)), cond


def kinds_of_blocks(backbone, inputs):
    """The distinct (class, shapes of weights and inputs) among the blocks, dtypes aside."""
    kinds = set()

    def note(block, given):
        shapes = [p.shape for p in block.parameters()]
        kinds.add(str((type(block), shapes, [getattr(t, "shape", t) for t in given])))

    hooks = [b.register_forward_pre_hook(note) for b in repeated_blocks(backbone)]
    backbone(*inputs)
    for hook in hooks:
        hook.remove()
    return len(kinds)


def compile_and_run(family):
    """Kinds of blocks, and graphs after each of three training steps and of two samplings."""
    torch.manual_seed(0)
    preset, fields = NETWORKS[family]
    model = mz.create_model(preset, **fields)
    backbone = get_backbone(model)
    kinds = kinds_of_blocks(backbone, example(model, 2))
    torch.compiler.reset()
    counters.clear()
    compile_blocks(backbone, backend="eager")
    graphs = []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            outputs = model.train().backbone(*example(model, 2))
            sum(out.float().square().mean() for out in outputs).backward()
            graphs.append(counters["stats"]["unique_graphs"])
        for _ in range(2):
            with torch.no_grad():
                model.eval().backbone(*example(model, 2))
            graphs.append(counters["stats"]["unique_graphs"])
    return {"kinds": kinds, "graphs": graphs, "breaks": list(counters["graph_break"])}


def compile_cascade():
    """Largest relative error of a GPU's cascade and its gradients, compiled against plain."""
    torch.manual_seed(0)
    cascade = Cascade(8, 3, 4, 2)
    features = [torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3)]
    gain, shift = (torch.randn(2, 1, 1, 24, requires_grad=True) for _ in range(2))
    weights = [gain, shift, cascade.project.weight, cascade.project.bias]
    results = []
    for backend in (None, "aot_eager"):
        if backend:
            cascade.compile_parts(partial(torch.compile, dynamic=False, backend=backend))
        counters.clear()
        out = NormedProjection.apply(*weights, torch.float32, cascade.parts, *features)
        gradients = torch.autograd.grad(out.square().sum(), [*weights, *features])
        results.append([out.detach(), *gradients])
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True)]
    graphs = counters["stats"]["unique_graphs"]
    return {"error": max(errors), "graphs": graphs, "breaks": list(counters["graph_break"])}


@functools.cache
def compiled(families):
    run = [sys.executable, __file__, *families]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found):
    assert found["breaks"] == []
    first = found["graphs"][0]
    assert 0 < first <= found["kinds"]
    assert found["graphs"] == [first] * 3 + [2 * first] * 2


def test_every_family_is_here():
    assert sorted(FAST + SLOW) == sorted(NETWORKS) == sorted(registry)


@pytest.mark.parametrize("family", FAST)
def test_blocks_are_whole_graphs_and_none_is_compiled_again(family):
    check(compiled(FAST)[family])


def test_a_compiled_cascade_is_the_plain_one():
    found = compiled(FAST)["cascade"]
    assert found["breaks"] == []
    assert found["graphs"] <= 5  # normalise is in both passes
    assert found["error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_blocks_of_convolutions_are_too(family):
    check(compiled(SLOW)[family])


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {family: compile_and_run(family) for family in sys.argv[1:]}
    print(json.dumps(found | {"cascade": compile_cascade()}))
