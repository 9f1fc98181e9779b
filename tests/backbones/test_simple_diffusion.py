"""simple diffusion's networks: published sizes, input transforms, dropout, residuals, embedding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mezzotint.backbones as backbones
import mezzotint.backbones.layers as layers
from mezzotint.backbones.layers import (
    FiLM,
    ResBlock,
    TransformerBlock,
    inv_cos,
    sinusoidal_embedding,
)
from mezzotint.models import create_model
from mezzotint.process.denoiser import Cond
from mezzotint.process.schedules import cosine, invert


def block_gmac(name):
    """Return the GMAC per image inside the blocks, without FiLM, and the millions of parameters."""
    _, preset = backbones.presets()[name]
    with torch.device("meta"):
        model = create_model(name).backbone.eval()
        z = torch.empty(1, preset.config.channels, preset.config.size, preset.config.size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(z, torch.empty(1), Cond())
    root, flops, counts = type(model).__name__, 0, counter.get_flop_counts()
    for key, module in model.named_modules():
        count = sum(counts.get(f"{root}.{key}", {}).values())
        flops += count * (
            isinstance(module, ResBlock | TransformerBlock) - isinstance(module, FiLM)
        )
    return flops / 2e9, sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(("name", "gmac"), [("sid2-512", 137.439), ("sid2-256-flop", 652.835)])
def test_sid2_counts(name, gmac):
    counted, millions = block_gmac(name)
    assert abs(counted - gmac) < 1e-3
    assert (
        393 < millions < 401
    )  # specs/simple-diffusion.md section 9: 393 M by arithmetic, without stem and embeddings


def test_uvit_counts():
    counted, millions = block_gmac("uvit-256")
    assert abs(counted - 546.0) < 0.1  # 36 x 13.153 + 15 x 4.832
    assert abs(millions - 2460) < 10


def test_flop_heavy_sid2_has_the_weights_of_the_plain_one():
    with torch.device("meta"):
        plain, heavy = (
            create_model(name).backbone.state_dict() for name in ("sid2-512", "sid2-512-flop")
        )
    assert plain.keys() == heavy.keys()
    differ = {key for key in plain if plain[key].shape != heavy[key].shape}
    assert differ == {
        "stem.conv.weight",
        "head.conv.weight",
        "positions.2.table",
        "positions.3.table",
    }


@pytest.mark.parametrize(
    ("transform", "patch"),
    [("none", 1), ("dwt", 2), ("dwt", 4), ("conv", 1), ("conv", 2), ("conv", 3), ("conv", 4)],
)
@pytest.mark.parametrize("name", ["unet-tiny", "uvit-tiny", "sid2-tiny"])
def test_input_transforms(name, transform, patch):
    size = 8 * patch
    model = create_model(name, size=size, transform=transform, patch=patch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    out = model.raw(torch.randn(2, 3, size, 2 * size), torch.zeros(2), Cond())[0]
    assert out.shape == (2, 3, size, 2 * size)
    assert out.std() > 0
    levels = len(model.info.config.multipliers)
    assert model.backbone.factor == 2 ** (levels - 1) * patch


@pytest.mark.parametrize(
    ("transform", "patch"),
    [("none", 2), ("dwt", 1), ("dwt", 3), ("dwt", 8), ("fft", 2)],
)
def test_transforms_that_do_not_exist(transform, patch):
    with pytest.raises(ValueError, match="choose 'none'"):
        create_model("unet-tiny", size=96, transform=transform, patch=patch)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"width": 18}, "multiple of 4"),
        ({"heads": 3}, "3 heads"),
        ({"blocks": (1,)}, "equally long"),
        ({"size": 30}, "28x28.*32x32"),
        ({"prediction": "nosie"}, "unknown prediction"),
    ],
)
def test_configs_that_do_not_fit(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_model("unet-tiny", **overrides)


def test_dropout_from_a_resolution_down():
    model = create_model("unet-tiny", size=32, dropout=0.25, dropout_from=16).backbone
    probabilities = [{b.res.dropout.p for b in stage} for stage in model.down]
    assert probabilities == [{0.0}, {0.25}, {0.25}]
    assert {b.res.dropout.p for b in model.up[0]} == {0.0}
    assert {b.res.dropout.p for b in model.middle} == {0.25}
    with torch.device("meta"):
        published = create_model("unet-256").backbone
    assert [stage[0].res.dropout.p for stage in published.down] == [0, 0, 0, 0, 0.1, 0.1]
    z, noise = torch.randn(1, 3, 32, 32), torch.zeros(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.train()
        assert not torch.equal(model(z, noise, Cond())[0], model(z, noise, Cond())[0])
        model.eval()
        assert torch.equal(model(z, noise, Cond())[0], model(z, noise, Cond())[0])


def test_sid2_decoder_starts_from_the_features_of_the_encoder():
    """At initialisation each block is the identity: h = q at the bottom, and up starts from p."""
    model = create_model("sid2-tiny").backbone.double()
    entries = {}
    model.up[0][0].register_forward_pre_hook(lambda _, args: entries.update(up=args[0]))
    model.down[0][0].register_forward_pre_hook(lambda _, args: entries.update(down=args[0]))
    model(
        torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), Cond()
    )
    torch.testing.assert_close(entries["up"], entries["down"], rtol=0, atol=0)


def test_unet_weights_do_not_depend_on_the_size():
    small, large = create_model("unet-tiny", size=16), create_model("unet-tiny", size=64)
    large.load_state_dict(small.state_dict())


def test_positions_of_another_size_are_resized():
    model = create_model("uvit-tiny", size=16).backbone
    with torch.no_grad():
        model.positions.table.copy_(torch.arange(4.0)[:, None].expand(4, 4))
    out = model.positions(torch.zeros(1, 128, 8, 4))
    torch.testing.assert_close(
        out[0, 0, :, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    )
    torch.testing.assert_close(out, out[:, :, :, :1].expand_as(out))


FAMILIES = ["unet-tiny", "uvit-tiny", "sid2-tiny"]


def run_with_gradients(network, dtype=torch.float64):
    """Return the output and all gradients of a network whose every weight has an effect."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z = torch.randn(2, 3, 32, 32, dtype=dtype)
    (out,) = network(z, torch.tensor([-1.0, 3.0], dtype=dtype), Cond(label=torch.tensor([1, 4])))
    out.float().pow(2).mean().backward()
    return [out, *(p.grad for p in network.parameters())]


@pytest.mark.parametrize("name", FAMILIES)
def test_layout_of_gpus_changes_nothing(name, monkeypatch):
    network = create_model(name).backbone.double()
    seen = []
    for module in network.modules():
        if isinstance(module, ResBlock):
            module.register_forward_hook(lambda _m, args, out: seen.extend([args[0], out]))
    expected = run_with_gradients(network)
    assert not any(h.is_contiguous(memory_format=torch.channels_last) for h in seen)
    network.zero_grad()
    seen.clear()
    monkeypatch.setattr(
        layers, "to_gpu_layout", lambda h: h.contiguous(memory_format=torch.channels_last)
    )
    for a, b in zip(run_with_gradients(network), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # Every block is given the layout and gives it on.
    assert seen
    assert all(h.is_contiguous(memory_format=torch.channels_last) for h in seen)


@pytest.mark.parametrize("name", FAMILIES)
def test_stream_has_one_dtype(name):
    network = create_model(name).backbone
    dtypes = set()
    for module in network.modules():
        if isinstance(module, ResBlock | TransformerBlock):
            module.register_forward_hook(lambda _m, _a, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        run_with_gradients(network, torch.float32)
    assert dtypes == {torch.bfloat16}


def test_embedding_input_is_the_time_of_the_plain_cosine():
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    logsnr = -2 * torch.log(torch.tan(torch.pi / 2 * u))
    torch.testing.assert_close(inv_cos(logsnr), u)
    bounded = cosine(64, 64)
    torch.testing.assert_close(inv_cos(bounded(u)), u, rtol=0, atol=1e-3)
    torch.testing.assert_close(invert(bounded, bounded(u)), u)
    assert inv_cos(torch.tensor([-torch.inf, torch.inf])).isfinite().all()


def test_embedding_is_computed_wide_in_a_narrow_network():
    model = create_model("unet-tiny").backbone.to(torch.bfloat16)
    seen = []
    model.conditioning.noise[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logsnr = torch.tensor([1.234, 1.244])  # equal in bfloat16
    model.conditioning(logsnr, Cond())
    expected = sinusoidal_embedding(1000 * inv_cos(logsnr.double()), 16)
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=5e-3)
    assert not torch.equal(seen[0][0], seen[0][1])


def test_configs_are_values():
    for name in ("unet-tiny", "uvit-tiny", "sid2-tiny"):
        config = backbones.presets()[name][1].config
        assert hash(config) == hash(dataclasses.replace(config))
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.size = 1
