"""FID's Inception: its layers, its input, and its weights in both layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mezzotint.evaluate.inception import (
    BN_EPS,
    PARTIAL_TAPS,
    TAPS,
    BlockA,
    BlockC,
    BlockE,
    Conv,
    Inception,
    fold_batch_norms,
    inception_from_state_dict,
    load_inception,
)
from mezzotint.evaluate.resize import inception_clean, inception_pytorch, inception_tf1, tf1_resize

WEIGHTS = "data/inception/inception_2015_to_mixed7a.safetensors"

# (name, channels, height) of each output for a 299 px image (Szegedy et al. 2016, table 1).
LAYERS = [
    ("Conv2d_1a_3x3", 32, 149),
    ("Conv2d_2a_3x3", 32, 147),
    ("Conv2d_2b_3x3", 64, 147),
    ("Conv2d_3b_1x1", 80, 73),
    ("Conv2d_4a_3x3", 192, 71),
    ("Mixed_5b", 256, 35),
    ("Mixed_5c", 288, 35),
    ("Mixed_5d", 288, 35),
    ("Mixed_6a", 768, 17),
    ("Mixed_6b", 768, 17),
    ("Mixed_6c", 768, 17),
    ("Mixed_6d", 768, 17),
    ("Mixed_6e", 768, 17),
    ("Mixed_7a", 1280, 8),
    ("Mixed_7b", 2048, 8),
    ("Mixed_7c", 2048, 8),
]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Inception().eval().requires_grad_(False)


def unfolded(model):
    """Return a state dict in the layout of the published .pth, with random batch norms."""
    g = torch.Generator().manual_seed(0)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv):
            n = module.out_channels
            state[f"{name}.conv.weight"] = module.weight.clone()
            state[f"{name}.bn.weight"] = 0.5 + torch.rand(n, generator=g)
            state[f"{name}.bn.bias"] = torch.randn(n, generator=g)
            state[f"{name}.bn.running_mean"] = torch.randn(n, generator=g)
            state[f"{name}.bn.running_var"] = 0.1 + torch.rand(n, generator=g)
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(7)
        elif isinstance(module, torch.nn.Linear):
            state |= {f"{name}.weight": module.weight.clone(), f"{name}.bias": module.bias.clone()}
    return state


def test_every_layer_has_the_shape_of_the_graph(network):
    shapes = {}
    hooks = [
        m.register_forward_hook(
            lambda _, __, out, name=name: shapes.__setitem__(name, tuple(out.shape))
        )
        for name, m in network.named_children()
        if name != "fc"
    ]
    features = network(torch.randn(1, 3, 299, 299), tuple(TAPS))
    for hook in hooks:
        hook.remove()
    assert [(name, *shape[1:3]) for name, shape in shapes.items()] == LAYERS
    assert {tap: tuple(f.shape) for tap, f in features.items()} == {
        tap: (1, dims) for tap, dims in TAPS.items()
    }


def test_parameters_are_those_of_the_published_file(network):
    convolutions = [m for m in network.modules() if isinstance(m, Conv)]
    assert len(convolutions) == 94  # 76 up to Mixed_7a, 9 in each block after it
    # 23,834,568 are published for Inception-v3 with 1,000 classes and no auxiliary classifier, two
    # for each channel of a batch norm. Without the classifier's 1000 x 2049 they must be ours.
    folded_parameters = sum(m.weight.numel() + 2 * m.out_channels for m in convolutions)
    assert folded_parameters == 23_834_568 - 1000 * 2049
    assert sum(p.numel() for p in network.fc.parameters()) == 1008 * 2049


def test_stages_after_the_last_tap_are_not_computed(network):
    ran = []
    hook = network.Mixed_6a.register_forward_hook(lambda *_: ran.append(1))
    assert list(network(torch.randn(1, 3, 299, 299), ["192", "64"])) == ["64", "192"]
    hook.remove()
    assert not ran


def averaging(block):
    """Set every weight to 1 / fan-in and every bias to 0, so that constants pass unchanged."""
    for m in block.modules():
        if isinstance(m, Conv):
            m.weight.data.fill_(1 / m.weight[0].numel())
            m.bias.data.zero_()
    return block.requires_grad_(False)


@pytest.mark.parametrize(
    ("block", "side", "channels"),
    [(BlockA(8, pool=4), 5, 4), (BlockC(8, inner=4), 5, 192), (BlockE(8, max_pool=False), 4, 192)],
)
def test_average_pools_exclude_the_padding(block, side, channels):
    """A constant image stays constant; with the padding, a corner would be 4/9 of it."""
    pooled = averaging(block)(torch.full((1, 8, side, side), 2.0))[:, -channels:]
    torch.testing.assert_close(pooled, torch.full_like(pooled, 2.0))


def test_block_e_pools_by_maximum_or_average():
    x = torch.zeros(1, 8, 5, 5)
    x[:, :, 2, 2] = 9.0
    assert (
        averaging(BlockE(8, max_pool=True))(x)[0, -1].tolist()
        == F.pad(torch.full((3, 3), 9.0), (1, 1, 1, 1)).tolist()
    )
    mean = averaging(BlockE(8, max_pool=False))(x)[0, -1]
    torch.testing.assert_close(mean, F.pad(torch.ones(3, 3), (1, 1, 1, 1)))


def test_only_the_last_block_pools_by_maximum(network):
    assert not network.Mixed_7b.max_pool
    assert network.Mixed_7c.max_pool


def test_sfid_takes_seven_channels_in_the_order_row_column_channel(network):
    maps = {}
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: maps.update(map=out))
    features = network(torch.randn(2, 3, 299, 299), ["sfid"])["sfid"]
    hook.remove()
    want = maps["map"].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, 2023)
    np.testing.assert_array_equal(features.numpy(), want)


def test_logits_have_no_bias(network):
    features = network(torch.randn(1, 3, 299, 299), ["2048", "logits"])
    torch.testing.assert_close(features["logits"], features["2048"] @ network.fc.weight.T)


def test_folding_a_batch_norm_keeps_the_function():
    g = torch.Generator().manual_seed(0)
    conv, bn = (
        torch.nn.Conv2d(5, 6, 3, bias=False).double(),
        torch.nn.BatchNorm2d(6, eps=BN_EPS).double().eval(),
    )
    for t in (bn.weight.data, bn.bias.data, bn.running_mean):
        t.copy_(torch.randn(6, generator=g))
    bn.running_var.copy_(torch.rand(6, generator=g))
    state = {f"L.conv.{k}": v for k, v in conv.state_dict().items()}
    out = fold_batch_norms(state | {f"L.bn.{k}": v for k, v in bn.state_dict().items()})
    assert sorted(out) == ["L.bias", "L.weight"]
    x = torch.randn(2, 5, 8, 8, generator=g, dtype=torch.float64)
    got = F.conv2d(x, out["L.weight"].double(), out["L.bias"].double())
    torch.testing.assert_close(got, bn(conv(x)), rtol=1e-5, atol=1e-5)


def test_the_published_layout_loads_complete_or_partial(network, tmp_path):
    state = unfolded(network)
    torch.save(state, tmp_path / "w.pth")
    model = load_inception(tmp_path / "w.pth")
    assert model.taps == tuple(TAPS)
    for name, value in fold_batch_norms(state).items():
        torch.testing.assert_close(model.state_dict()[name], value)
    cut = {k: v for k, v in state.items() if not k.startswith(("Mixed_7b", "Mixed_7c", "fc"))}
    assert inception_from_state_dict(cut).taps == PARTIAL_TAPS
    with pytest.raises(ValueError, match=r"missing \['Mixed_5b.branch1x1.bias'"):
        inception_from_state_dict(
            {k: v for k, v in state.items() if not k.startswith("Mixed_5b.branch1x1")}
        )
    with pytest.raises(ValueError, match=r"unknown \['AuxLogits"):
        inception_from_state_dict(state | {"AuxLogits.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no Mixed_5b\.branch1x1\.bn\.bias"):
        inception_from_state_dict(
            {k: v for k, v in state.items() if k != "Mixed_5b.branch1x1.bn.bias"}
        )
    with pytest.raises(ValueError, match=r"another shape \['fc.weight'"):
        inception_from_state_dict(state | {"fc.weight": torch.zeros(1000, 2048)})


def test_damaged_files_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:700])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "s.png").write_bytes(b"\x89PNG\r\n\x1a\n and so on")
    for name in ("cut.pth", "s.png", "cut.safetensors", "list.pth", "absent.pth"):
        with pytest.raises(ValueError, match=name) as error:
            load_inception(tmp_path / name)
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)


def test_partial_weights_have_no_later_taps():
    with pytest.raises(ValueError, match=r"'2048'.*Mixed_7a"):
        Inception(partial=True)(torch.zeros(1, 3, 299, 299), ["2048"])


# --- input ----------------------------------------------------------------------------------------


def test_tf1_resize_of_one_row():
    row = torch.tensor([0.0, 10, 20, 40]).reshape(1, 1, 1, 4)
    # Scale 4/6: positions 0, 2/3, 4/3, 2, 8/3, 10/3; the last is clamped to the last pixel.
    want = [0, 20 / 3, 10 + 10 / 3, 20, 20 + 20 * 2 / 3, 40]
    torch.testing.assert_close(
        tf1_resize(row, 6)[0, 0, 0], torch.tensor(want), rtol=1e-6, atol=1e-5
    )
    # Shrinking skips pixels without any averaging: positions 0 and 2.
    assert tf1_resize(row, 2)[0, 0, 0].tolist() == [0.0, 20.0]
    # Columns as rows, and the identity.
    torch.testing.assert_close(
        tf1_resize(row.mT, 6)[0, 0, :, 0], torch.tensor(want), rtol=1e-6, atol=1e-5
    )
    square = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert tf1_resize(square, 4).equal(square)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (400, 301)])
def test_tf1_resize_matches_its_formula(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float64)
    got = tf1_resize(torch.from_numpy(image.astype(np.uint8))[None, None], 299)[0, 0]
    for i, j in [(0, 0), (1, 298), (298, 298), (150, 7), (297, 40), (13, 211)]:
        y, x = i * height / 299, j * width / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        a, b = y - top, x - left
        want = (image[top, left] * (1 - b) + image[top, right] * b) * (1 - a)
        want += (image[bottom, left] * (1 - b) + image[bottom, right] * b) * a
        assert got[i, j].item() == pytest.approx(want, abs=0.02)  # float32 positions


def test_the_three_input_rules():
    images = torch.randint(
        0, 256, (2, 3, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    tf1, clean, pytorch = (
        rule(images) for rule in (inception_tf1, inception_clean, inception_pytorch)
    )
    assert tf1.shape == clean.shape == pytorch.shape == (2, 3, 299, 299)
    flat = torch.full((1, 3, 9, 9), 255, dtype=torch.uint8)
    assert inception_tf1(flat).unique().tolist() == [127 / 128]
    assert inception_clean(flat).unique().tolist() == [127 / 128]
    torch.testing.assert_close(inception_pytorch(flat), torch.ones(1, 3, 299, 299))
    assert (tf1 - clean).abs().mean() > 0.01
    assert (tf1 - pytorch).abs().mean() > 0.01
    from PIL import Image

    channel = Image.fromarray(images[1, 2].numpy().astype(np.float32)).resize(
        (299, 299), Image.Resampling.BICUBIC
    )
    np.testing.assert_allclose(
        clean[1, 2].numpy(), (np.clip(np.array(channel), 0, 255) - 128) / 128, atol=1e-6
    )


# --- published weights ----------------------------------------------------------------------------


def test_a_photograph_is_nearest_to_its_mirror_image(shared):
    from PIL import Image

    model = load_inception(shared(WEIGHTS))
    assert model.taps == PARTIAL_TAPS
    files = [shared(f"data/photos/kodim{i:02d}.png") for i in (1, 5, 9, 15)]
    images = np.stack([np.asarray(Image.open(f).convert("RGB").resize((128, 128))) for f in files])
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = model(inception_tf1(torch.cat([x, x.flip(3)])), PARTIAL_TAPS)
    for tap in ("64", "192", "768", "1280"):
        rows = features[tap]
        assert (rows >= 0).all()
        assert torch.cdist(rows[:4], rows[4:]).argmin(1).tolist() == [0, 1, 2, 3], tap


def test_the_stem_matches_plain_convolutions(shared):
    """Strides, padding and pools of the graph, computed from the file's tensors."""
    from safetensors.torch import load_file

    w = load_file(shared(WEIGHTS))
    x = inception_tf1(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))

    def conv(y, name, **options):
        return F.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"], **options).clamp_min(0)

    with torch.inference_mode():
        y = conv(x, "Conv2d_1a_3x3", stride=2)
        y = conv(conv(y, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
        first = F.max_pool2d(y, 3, 2)
        second = F.max_pool2d(conv(conv(first, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
        features = load_inception(shared(WEIGHTS))(x, ["64", "192"])
    torch.testing.assert_close(features["64"], first.mean((2, 3)))
    torch.testing.assert_close(features["192"], second.mean((2, 3)))
