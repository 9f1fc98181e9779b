"""Latent DiffiT against recorded numbers, and against its plain twin where nothing was recorded."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from helpers.plain import plain_module
from mezzotint.backbones.diffit import DiffiT, DiffiTConfig, resize_table, sincos_positions
from mezzotint.convert.official import TensorSlice, registry
from mezzotint.convert.official.load import load_official, to_official
from mezzotint.models import create_model
from mezzotint.process.denoiser import Cond
from mezzotint.process.guidance import classifier_free, null_label, power_cosine
from mezzotint.process.schedules.ddpm import linear_ddpm

GOLDEN = ["A_in8_p2", "C_in32_p4"]


def golden(shared, name):
    return load_file(shared(f"golden/diffit/{name}.safetensors"))


def part(tensors, prefix):
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def close(ours, theirs, tolerance):
    assert_close(ours, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def gradients_by_official_name(model, names):
    own = {name: p.grad for name, p in model.backbone.named_parameters()}
    keys = registry["diffit"].keys(model.info.config)
    return {name: torch.cat([own[r.name][r.start : r.stop] for r in keys[name]]) for name in names}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("grad", [False, True], ids=["fused", "materialised"])
def test_golden_outputs_and_activations(shared, name, grad):
    g = golden(shared, name)
    model = load_official(part(g, "sd/"))
    net, seen = model.backbone, {}
    for key, module in [
        *((f"block{i}", b) for i, b in enumerate(net.blocks)),
        ("final", net.final),
    ]:
        module.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
    cond = Cond(label=g["in/y"])
    with torch.set_grad_enabled(grad):
        (out,) = net(g["in/x"], g["in/t"].float(), cond)
        close(net.condition(g["in/t"].float(), cond), g["mid/cond"], 1e-5)
    close(out, g["out/forward"], 1e-5)
    for key, value in seen.items():
        close(value.flatten(1, 2), g[f"mid/{key}"], 1e-5)
    assert (
        len(seen) == sum(k.startswith("mid/") for k in g) - 2
    )  # all but cond and the tokens that enter block 0


@torch.no_grad()
def solve_condition(net, inputs, target, start):
    """Return the condition (b, width) and the output nearest to `target`: two Gauss-Newton steps.

    The images of a batch are independent, so one difference along a channel serves them all.
    """

    def forward(c):
        net.condition = lambda *_: c
        return net(*inputs)[0].flatten(1)

    cond = start
    for _ in range(2):
        steps = 1e-4 * torch.eye(start.shape[1], dtype=start.dtype)
        columns = [(forward(cond + step) - forward(cond - step)) / 2e-4 for step in steps]
        missing = (target.flatten(1) - forward(cond))[..., None]
        cond = cond + torch.linalg.lstsq(torch.stack(columns, -1), missing).solution[..., 0]
    return cond, forward(cond).view_as(target)


# exp of float32 in the frequencies is another one on Intel's and on AMD's processors, by 5e-7. So
# the recorded output is held against the network at a condition that differs from ours by no more
# than this explains: width free numbers against side^2 channels per image, all to 1e-13.
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_float64(shared, name):
    g = golden(shared, name)
    net = load_official(
        {k: t.double() if t.is_floating_point() else t for k, t in part(g, "sd/").items()}
    ).backbone
    inputs = g["in/x"].double(), g["in/t"].double(), Cond(label=g["in/y"])
    with torch.no_grad():
        ours = net.condition(*inputs[1:])
    assert ours.shape[1] <= g["out/forward_f64"][0].numel() / 4
    theirs, out = solve_condition(net, inputs, g["out/forward_f64"], ours)
    close(out, g["out/forward_f64"], 1e-13)
    close(ours, theirs, 1e-5)


def test_golden_gradients(shared):
    g = golden(shared, "A_in8_p2")
    model = load_official(part(g, "sd/"))
    (out,) = model.backbone(g["in/x"], g["in/t"].float(), Cond(label=g["in/y"]))
    out.backward(g["grad/cotangent"])
    theirs = {k: t for k, t in part(g, "grad/").items() if k != "cotangent"}
    for key, ours in gradients_by_official_name(model, theirs).items():
        close(ours, theirs[key], 1e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_guidance(shared, name):
    g = golden(shared, name)
    model = load_official(part(g, "sd/"))
    (both,) = model.backbone(g["cfg/x"], g["cfg/t"].float(), Cond(label=g["cfg/y"]))
    close(both, g["cfg/out_none"], 1e-5)
    table, n = linear_ddpm(), len(g["cfg/t"]) // 2
    logsnr = table.logsnr[g["cfg/t"][:n]].float()
    recorded = [k for k in g if k.startswith("cfg/out_s")]
    assert recorded
    for key in recorded:
        peak, power = (float(word[1:]) for word in key.removeprefix("cfg/out_").split("_"))
        scale = power_cosine(peak, power, lambda logsnr: table.index(logsnr) / 1000)
        guided = classifier_free(
            model, null_label(model.info.config.num_classes), scale, channels=3
        )
        guess = guided(g["cfg/x"][:n], logsnr, Cond(label=g["cfg/y"][:n]))
        close(torch.cat([guess.eps, guess.var], 1), g[key][:n], 2e-5)


@pytest.mark.parametrize("name", GOLDEN)
def test_way_back_is_bitwise(shared, name):
    official = part(golden(shared, name), "sd/")
    back = to_official(load_official(official))
    assert back.keys() == official.keys()
    for key, tensor in official.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key


# The plain twin is the oracle where nothing was recorded.


def pair(config, seed=0):
    """The plain twin with every parameter drawn at random, and ours from its state dict."""
    generator = torch.Generator().manual_seed(seed)
    plain = plain_module("diffit").PlainDiffiT(config)
    with torch.no_grad():
        for p in plain.parameters():
            std = 0.3 if p.ndim < 2 else p[0].numel() ** -0.5
            p.add_(torch.randn(p.shape, generator=generator) * std)
    return plain.double(), load_official(
        {k: t.double() if t.is_floating_point() else t for k, t in plain.state_dict().items()}
    )


CONFIGS = {
    "one block": DiffiTConfig(size=4, num_classes=3, patch=1, width=16, depth=1, heads=1),
    "windows": DiffiTConfig(size=16, num_classes=7, patch=2, width=32, depth=2, heads=4, window=4),
    "windows of one": DiffiTConfig(
        size=4, num_classes=7, patch=2, width=32, depth=2, heads=2, window=1
    ),
    "no variance": DiffiTConfig(
        size=12, channels=3, num_classes=2, width=24, depth=2, heads=2, learned_variance=False
    ),
    "other ratios": DiffiTConfig(
        size=12, num_classes=2, patch=3, width=40, depth=3, heads=5, mlp_ratio=2.3
    ),
    "one class": DiffiTConfig(
        size=8, channels=1, num_classes=0, patch=4, width=16, depth=2, heads=2
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_plain_twin_outputs_and_gradients(name, checkpointing):
    config = CONFIGS[name]
    plain, ours = pair(config)
    assert ours.info.config == replace(config, mlp_ratio=ours.info.config.mlp_ratio)
    ours.backbone.checkpointing = checkpointing
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.channels, config.size, config.size, generator=generator).double()
    t = torch.tensor([0.0, 499.5, 999.0], dtype=torch.float64)
    y = torch.randint(0, config.num_classes + 1, (3,), generator=generator)
    label = Cond(label=y) if config.num_classes else Cond()
    expected, (out,) = plain(x, t, y), ours.backbone(x, t, label)
    close(out, expected, 1e-12)
    with torch.no_grad():
        close(ours.backbone(x, t, label)[0], expected, 1e-12)
    cotangent = torch.randn(out.shape, generator=generator).double()
    expected.backward(cotangent)
    out.backward(cotangent)
    theirs = {k: p.grad for k, p in plain.named_parameters() if p.requires_grad}
    scale = max(t.abs().max() for t in theirs.values())
    for key, grad in gradients_by_official_name(ours, theirs).items():
        assert_close(
            grad,
            theirs[key],
            rtol=0,
            atol=1e-11 * scale.item(),
            msg=lambda m, key=key: f"{key}: {m}",
        )


def test_bfloat16_stays_near():
    plain, ours = pair(CONFIGS["windows"])
    x, t = (
        torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2)).double(),
        torch.tensor([3.0, 700.0]),
    )
    expected = plain(x, t, torch.tensor([1, 2])).detach()
    (out,) = ours.backbone.bfloat16()(x.bfloat16(), t, Cond(label=torch.tensor([1, 2])))
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.05 * expected.norm()


# The dead term.


def test_temporal_key_has_no_effect_in_the_published_form():
    plain, ours = pair(CONFIGS["windows"])
    x, t, y = (
        torch.randn(2, 4, 16, 16, dtype=torch.float64),
        torch.tensor([10.0, 900.0]),
        torch.tensor([1, 7]),
    )
    before = plain(x, t, y)
    with torch.no_grad():
        for block in plain.blocks:
            width = block.attn.proj.in_features
            block.attn.qkv_temb.weight[width : 2 * width] *= 1000
            block.attn.qkv_temb.bias[width : 2 * width] = 0
    close(plain(x, t, y), before, 1e-9)
    close(ours.backbone(x, t, Cond(label=y))[0], before, 1e-12)


def test_temporal_key_gradient_is_exactly_zero_and_all_others_are_not():
    _, ours = pair(CONFIGS["windows"])
    c = ours.info.config
    ours.backbone(torch.randn(2, 4, 16, 16).double(), torch.tensor([5.0, 800.0]), Cond())[
        0
    ].square().sum().backward()
    live = 2 * c.depth * c.width
    assert not ours.backbone.temporal.weight.grad[live:].any()
    assert ours.backbone.temporal.weight.grad[:live].abs().amin(1).gt(0).float().mean() > 0.9
    for name, p in ours.backbone.named_parameters():
        assert p.grad is None or p.grad.any(), name
        assert p.requires_grad == (name != "positions"), name


# Other sizes.


def test_table_resized_to_its_own_size_is_itself():
    table = torch.randn(49, 3, dtype=torch.float64)
    assert_close(resize_table(table, 4, 4, 4), table, rtol=0, atol=1e-14)


def test_table_keeps_values_where_displacements_coincide():
    side, fine = 4, 7  # displacements of 7 tokens over the same extent are halves of those of 4
    table = torch.randn((2 * side - 1) ** 2, 2, dtype=torch.float64)
    grid = resize_table(table, side, fine, side).view(2 * fine - 1, 2 * side - 1, 2)
    assert_close(grid[::2], table.view(2 * side - 1, 2 * side - 1, 2), rtol=0, atol=1e-14)
    assert_close(grid[1], (grid[0] + grid[2]) / 2)


def test_single_row_of_tokens_uses_the_middle_of_the_table():
    table = torch.randn(49, 2, dtype=torch.float64)
    assert_close(resize_table(table, 4, 1, 4), table.view(7, 7, 2)[3])


def test_positions_follow_the_device_where_linspace_does_not(monkeypatch):
    """After transformers has loaded a model, linspace no longer follows `with torch.device`."""
    own = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, **kwargs: own(*args, **kwargs))
    with torch.device("meta"):
        assert sincos_positions(4, 4, 4, 16).device.type == "meta"


def test_positions_keep_their_extent():
    native, fine = sincos_positions(4, 4, 4, 16), sincos_positions(7, 4, 4, 16)
    assert_close(fine.view(7, 4, 16)[::2], native.view(4, 4, 16))


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (4, 2), (2, 2)])
def test_other_sizes_and_shapes(shape):
    _, ours = pair(CONFIGS["no variance"])
    z = torch.randn(2, 3, *shape).double()
    (out,) = ours.backbone(z, torch.tensor([10.0, 400.0]), Cond())
    assert out.shape == z.shape
    assert out.isfinite().all()


def test_windows_are_independent_and_global_attention_is_not():
    for window, same in ((4, True), (None, False)):
        _, ours = pair(replace(CONFIGS["windows"], window=window))
        z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).double()
        changed = z.clone()
        changed[..., 8:] += 1
        t = torch.tensor([100.0])
        a, b = (ours.backbone(i, t, Cond())[0][..., :8] for i in (z, changed))
        assert torch.equal(a, b) == same


# Bad input.


@pytest.mark.parametrize("shape", [(7, 8), (8, 3)])
def test_size_that_does_not_fit_names_valid_ones(shape):
    model = create_model("diffit-latent-tiny", size=8)
    with pytest.raises(ValueError, match="multiples of 2; nearest: "):
        model.backbone(torch.zeros(1, 4, *shape), torch.zeros(1), Cond())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 15}, "multiples of 2; nearest: 14x14"),
        ({"window": 3}, "multiples of 6"),
        ({"width": 130}, "multiple of 4"),
        ({"heads": 3}, "heads 3"),
        ({"depth": 0}, "depth 0"),
        ({"num_classes": -1}, "num_classes -1 must be"),
    ],
)
def test_config_that_does_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        create_model("diffit-latent-tiny", **changes)


def official_state():
    return plain_module("diffit").PlainDiffiT(CONFIGS["windows"]).state_dict()


def without(state, key):
    return {k: t for k, t in state.items() if k != key}


BROKEN = {
    "renamed": (
        lambda s: {
            **without(s, "blocks.1.mlp.fc1.bias"),
            "blocks.1.mlp.fc9.bias": s["blocks.1.mlp.fc1.bias"],
        },
        r"unused keys \[blocks.1.mlp.fc9.bias\]; missing \[blocks.1.mlp.fc1.bias\]",
    ),
    "missing": (lambda s: without(s, "pos_embed"), r"missing \[pos_embed\]"),
    "gap": (
        lambda s: {k.replace("blocks.1.", "blocks.2."): t for k, t in s.items()},
        r"unused keys \[blocks.2.*missing \[blocks.1",
    ),
    "shape": (
        lambda s: {**s, "blocks.0.attn.proj.bias": torch.zeros(31)},
        r"blocks.0.attn.proj.bias \(31,\)",
    ),
    "dimensions": (
        lambda s: {**s, "x_embedder.proj.weight": torch.zeros(31)},
        "expected 4 dimensions",
    ),
    "outputs": (lambda s: {**s, "final_layer.linear.weight": torch.zeros(17, 32)}, "17 outputs"),
    "table": (
        lambda s: {**s, "blocks.0.attn.relative_position_bias_table": torch.zeros(50, 4)},
        "not the square",
    ),
    "index": (
        lambda s: {
            **s,
            "blocks.1.attn.relative_position_index": s[
                "blocks.1.attn.relative_position_index"
            ].flip(0),
        },
        "blocks.1.attn.relative_position_index is not the table",
    ),
    "index size": (
        lambda s: {**s, "blocks.0.attn.relative_position_index": torch.zeros(9, 9).long()},
        "index is",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(name):
    change, words = BROKEN[name]
    with pytest.raises(ValueError, match=words):
        load_official(change(official_state()))


def test_licence_is_printed_on_load(capsys):
    model = load_official(official_state())
    assert "no commercial use" in capsys.readouterr().err
    assert "CC-BY-NC-SA-4.0" in model.info.licence


def test_key_map_of_the_published_sizes_is_total():
    for size, expected in ((32, 16**2), (64, 32**2)):
        config = DiffiTConfig(size=size)
        official = registry["diffit"]
        keys, constants = official.keys(config), official.constants(config)
        assert len(keys) + len(constants) == 346
        assert constants["blocks.27.attn.relative_position_index"].shape == (expected, expected)
        with torch.device("meta"):
            own = DiffiT(config).state_dict()
        rows = dict.fromkeys(own, 0)
        for parts in keys.values():
            for r in parts:
                assert isinstance(r, TensorSlice)
                rows[r.name] += (own[r.name].shape[0] if r.stop is None else r.stop) - r.start
        assert rows == {name: tensor.shape[0] for name, tensor in own.items()}


def test_initialisation_is_the_published_one():
    torch.manual_seed(0)
    net = create_model("diffit-latent-tiny").backbone
    width = net.config.width
    assert not net.final.weight.any()
    for weight in (net.temporal.weight, net.blocks[0].attn.qkv.weight):
        bound = math.sqrt(6 / (4 * width))  # Xavier of (3 width, width)
        assert 0.99 * bound < weight.abs().max() <= bound
    assert net.label.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.time.fc2.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(not m.bias.any() for m in net.modules() if isinstance(m, torch.nn.Linear))


def test_parameterisation_tells_table_indices_and_splits_the_variance():
    model = create_model("diffit-latent-tiny")
    entries = linear_ddpm().logsnr.float()
    assert torch.equal(model.parameterisation.noise(entries), torch.arange(1000.0))
    guess = model(torch.randn(2, 4, 16, 16), entries[[10, 900]], Cond())
    assert guess.var.shape == guess.eps.shape == (2, 4, 16, 16)
    assert (
        create_model("diffit-latent-tiny", learned_variance=False)(
            torch.randn(1, 4, 16, 16), entries[:1], Cond()
        ).var
        is None
    )
