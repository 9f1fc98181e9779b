"""`mezzotint.info` on every preset, without allocating."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import mezzotint.backbones as backbones
from mezzotint.models import create_model
from mezzotint.process.denoiser import Cond
from mezzotint.tools import summary

PRESETS = list(backbones.presets())
SMALL = [name for name in PRESETS if name.endswith("tiny")]


def text(renderable):
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.slow
def test_every_preset_has_a_row():
    rows = summary.table()
    assert [r["name"] for r in rows] == list(backbones.presets())
    check_rows(rows)


def test_small_presets_have_a_json_row_and_a_line():
    names = [*SMALL, "diffit-256"]
    rows = json.loads(json.dumps([summary.describe(name) for name in names]))
    assert [r["name"] for r in rows] == names
    check_rows(rows)
    assert "leaves out the two attention products" in text(summary.render_table(rows))


def check_rows(rows):
    for r in rows:
        assert r["params"] > 0
        assert r["gmac"] > r["gmac_attention"] >= 0
        assert len(r["input_shape"]) == 3
        assert r["paper"]
    printed = text(summary.render_table(rows))
    assert all(r["name"] in printed and summary.si(r["params"]) in printed for r in rows)


@pytest.mark.parametrize(
    "preset",
    [
        p if p in SMALL or p == "diffit-256" else pytest.param(p, marks=pytest.mark.slow)
        for p in PRESETS
    ],
)
def test_layers_add_up_to_the_whole(preset):
    net = summary.on_meta(preset)[0]
    rows = json.loads(json.dumps(summary.layers(preset)))
    assert sum(r["params"] for r in rows) == sum(p.numel() for p in net.parameters())
    assert sum(r["gmac"] for r in rows) == pytest.approx(summary.describe(preset)["gmac"], rel=1e-9)
    assert all(r["params"] >= 0 and r["gmac"] >= 0 and r["activation_bytes"] >= 0 for r in rows)
    printed = text(summary.render_layers(preset, rows))
    assert all(r["name"].split("...")[0] in printed for r in rows)


@pytest.mark.parametrize("preset", SMALL)
def test_activation_bytes_are_what_autograd_keeps(preset):
    """The same network with real storage and unfused attention; kernels differ between devices, so nearly."""
    net = create_model(preset).backbone
    _, z, noise = summary.on_meta(preset)
    seen = {p.untyped_storage().data_ptr(): 0 for p in net.parameters()}
    held = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if seen.setdefault(storage.data_ptr(), storage.nbytes()):
            held.append(tensor)  # or its address would be used again
        return tensor

    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(torch.randn(z.shape), torch.rand(noise.shape), Cond())
    counted = sum(r["activation_bytes"] for r in summary.layers(preset))
    assert counted == pytest.approx(sum(seen.values()), rel=0.1)


def test_activations_of_a_known_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = block(x).square()  # keeps the input of each Linear and its output
            return x

    with torch.device("meta"):
        net, x = Net(), torch.empty(5, 8)
        trace = summary.Trace(net, dict(summary.groups(net)))
        with trace:
            net(x)
    assert trace.kept == {"blocks.0": 160, "": 3 * 160, "blocks.1": 160, "blocks.2": 160}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 8, 8), "8x8"),
        ((8, 8, 12), "8x8"),
        ((1, 64, 12), "8x8"),
        ((65, 12), "65 tokens"),
        ((12,), ""),
        ((), ""),
    ],
)
def test_resolution(shape, expected):
    assert summary.resolution(shape, 32) == expected


def test_unknown_preset_lists_neighbours():
    for function in (summary.describe, summary.layers):
        with pytest.raises(ValueError, match="did you mean"):
            function("diffit-255")
