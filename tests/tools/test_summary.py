"""Counts of the presets: the shipped file against fresh counts, layers against the total."""

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
from mezzotint.tools import count, summary

PRESETS = list(backbones.presets())
TINY = [name for name in PRESETS if name.endswith("tiny")]
FAST = [*TINY, "diffit-256"]


def text(renderable):
    console = Console(file=io.StringIO(), width=160)
    console.print(renderable)
    return console.file.getvalue()


def test_the_shipped_file_has_every_preset():
    assert [r["name"] for r in summary.read_summaries()] == PRESETS


@pytest.mark.parametrize(
    "preset", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in PRESETS]
)
def test_shipped_counts_are_those_of_the_network(preset):
    """On a failure, write the file again: `python -m mezzotint.tools.summary`."""
    net = count.meta_backbone(preset)
    row, layers = count.count_preset(preset), count.count_layers(preset)
    assert json.loads(json.dumps(row)) == summary.read_summary(preset)
    assert json.loads(json.dumps(layers)) == summary.read_layers(preset)
    assert sum(r["params"] for r in layers) == sum(p.numel() for p in net.parameters())
    assert sum(r["gmac"] for r in layers) == pytest.approx(row["gmac"], rel=1e-9)


def test_written_file_is_read_back(tmp_path, monkeypatch):
    only = {"unet-tiny": backbones.presets()["unet-tiny"]}
    monkeypatch.setattr(backbones, "presets", lambda: only)
    summary.write_summary(tmp_path / "summary.json")
    values = json.loads((tmp_path / "summary.json").read_text())
    assert list(values) == ["unet-tiny"]
    assert values["unet-tiny"].pop("layers") == summary.read_layers("unet-tiny")
    assert values["unet-tiny"] == summary.read_summary("unet-tiny")


def test_tables_show_every_count():
    rows = summary.read_summaries()
    printed = text(summary.render_presets(rows))
    assert all(r["name"] in printed for r in rows)
    assert all(summary.format_count(r["params"]) in printed for r in rows)
    assert all(r["note"][:30] in printed for r in rows)
    for r in rows:
        layers = summary.read_layers(r["name"])
        printed = text(summary.render_layers(r["name"], layers))
        assert all(layer["name"].split("...")[0] in printed for layer in layers)
        assert summary.format_count(r["params"]) in printed


def test_gmac_includes_attention_and_skipped_work():
    for r in summary.read_summaries():
        assert r["gmac"] > r["gmac_attention"] + r["gmac_skipped"] >= 0


@pytest.mark.parametrize("preset", TINY)
def test_activation_bytes_are_what_autograd_keeps(preset):
    """The same network with real storage and unfused attention; kernels differ between devices."""
    net = create_model(preset).backbone
    size = net.config.size
    seen = {p.untyped_storage().data_ptr(): 0 for p in net.parameters()}
    held = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if seen.setdefault(storage.data_ptr(), storage.nbytes()):
            held.append(tensor)  # or its address would be used again
        return tensor

    with sdpa_kernel(SDPBackend.MATH), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(torch.randn(1, net.config.channels, size, size), torch.rand(1), Cond())
    counted = sum(r["activation_bytes"] for r in summary.read_layers(preset))
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
        trace = count.LayerTrace(net, dict(count.find_layers(net)))
        with trace:
            net(x)
    assert trace.saved_bytes == {"blocks.0": 160, "": 3 * 160, "blocks.1": 160, "blocks.2": 160}


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
    assert count.format_resolution(shape, (32, 32)) == expected


def test_preset_added_after_the_file_was_written_is_counted(monkeypatch):
    shipped = summary.read_summary("unet-tiny"), summary.read_layers("unet-tiny")
    monkeypatch.setattr(summary, "_counts", dict)
    summary._counts_of.cache_clear()
    counted = summary.read_summary("unet-tiny"), summary.read_layers("unet-tiny")
    summary._counts_of.cache_clear()
    assert json.loads(json.dumps(counted)) == json.loads(json.dumps(shipped))


def test_unknown_preset_lists_neighbours():
    for function in (summary.read_summary, summary.read_layers, count.count_preset):
        with pytest.raises(ValueError, match=r"diffit-255.*diffit-256"):
            function("diffit-255")
