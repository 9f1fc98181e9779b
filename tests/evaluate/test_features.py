"""Feature sets: the same features whatever the batches, honest names, weights that are what they claim."""

from __future__ import annotations

import io
import urllib.error

import pytest
import torch

from mezzotint.core import files
from mezzotint.evaluate import features, inception
from mezzotint.evaluate.digit_classifier import train_digit_classifier
from mezzotint.evaluate.features import (
    NETWORK_BATCH,
    compute_features,
    feature_set_names,
    from_hub,
    from_module,
    open_features,
)
from mezzotint.evaluate.metrics import Gaussian, Moments
from mezzotint.evaluate.resize import as_uint8

WEIGHTS = "data/inception/inception_2015_to_mixed7a.safetensors"


def pictures(n, size=16, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)


class Net(torch.nn.Module):
    """A convolution and a batch norm, whose features would change with the batch if it were left in training mode."""

    def __init__(self, dims=6):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = torch.nn.Conv2d(3, dims, 3), torch.nn.BatchNorm2d(dims)

    def forward(self, x):
        return self.norm(self.conv(x)).square().mean((2, 3))


def net(name="own", dims=6):
    return from_module(Net(dims), name=name, dims=dims, size=16)


@pytest.fixture
def small_batches(monkeypatch):
    """Inception by fours, so that tests of a few images do not pay for padding."""
    monkeypatch.setattr(features, "NETWORK_BATCH", 4)


# --- the stream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 64, 75])
def test_features_are_bitwise_the_same_for_any_batches(batch):
    x = pictures(75)
    want = net()(x)
    assert want.shape == (75, 6)
    assert want.dtype == torch.float32
    assert compute_features([net()], x.split(batch))["own"].equal(want)
    assert net()(x.flip(0)).flip(0).equal(want)
    assert net()(x[3:5]).equal(want[3:5])


def test_the_network_always_sees_one_batch_size():
    seen = []
    s = net()
    s.network.module.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    s(pictures(NETWORK_BATCH * 2 + 1))
    assert seen == [NETWORK_BATCH] * 3


def test_inception_features_and_distance_are_the_same_for_any_batches(shared, small_batches):
    sets = open_features(["inception-768", "inception-64"], shared(WEIGHTS))
    x = pictures(9)
    whole = compute_features(sets, [x])
    parts = compute_features(sets, x.split(1))
    reference = Gaussian.of(Moments.of(torch.randn(100, 64, dtype=torch.float64)))
    for name in ("inception-768", "inception-64"):
        assert whole[name].equal(parts[name])
    with pytest.warns(UserWarning, match="9 images in 64 dimensions"):
        a, b = (
            Gaussian.of(Moments.of(f["inception-64"])).distance(reference) for f in (whole, parts)
        )
    assert a == b


def test_sets_of_one_network_run_it_once(shared, small_batches):
    sets = open_features(["inception-192", "inception-64"], shared(WEIGHTS))
    runs = []
    sets[0].network.Conv2d_1a_3x3.register_forward_hook(lambda *_: runs.append(1))
    found = compute_features(sets, [pictures(2)])
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "inception-192": (2, 192),
        "inception-64": (2, 64),
    }
    assert len(runs) == 1


def test_no_images_give_no_features():
    assert net().dims == 6
    assert compute_features([net()], [])["own"].shape == (0, 6)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
            "1 channels, the feature network reads 3; repeat the grey",
        ),
        (torch.full((2, 3, 8, 8), torch.nan), "NaN"),
        (torch.full((2, 3, 8, 8), -0.5), r"lie in \[-0.5, -0.5\], outside \[0, 1\]"),
        (torch.full((2, 3, 8, 8), 255.0), "outside"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "expected"),
    ],
)
def test_bad_images_are_refused(images, words):
    with pytest.raises(ValueError, match=words):
        net()(images)


def test_mixed_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) after images of \(3, 16, 16\)"):
        compute_features([net()], [pictures(2), pictures(2, 8)])


def test_floats_in_the_unit_interval_are_rounded():
    x = (
        torch.tensor([0.0, 0.5 / 255 + 1e-4, 0.49 / 255, 1.0])
        .reshape(4, 1, 1, 1)
        .expand(4, 3, 2, 2)
    )
    assert as_uint8(x, 3)[:, 0, 0, 0].tolist() == [0, 1, 0, 255]


def test_training_and_matmul_settings_survive():
    torch.set_float32_matmul_precision("high")
    try:
        net()(pictures(2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- names ----------------------------------------------------------------------------------------------------------


def test_only_the_published_inception_is_called_fid(shared, tmp_path):
    from safetensors.torch import load_file, save_file

    path = shared(WEIGHTS)
    names = ["inception-768", "inception-1280", "inception-sfid", "inception-sfid:clean"]
    assert [s.distance for s in open_features(names, path)] == [
        "FD-Inception-768",
        "FD-Inception-1280",
        "sFID",
        "sFID (clean resize)",
    ]
    other = load_file(path)
    other["Mixed_7a.branch3x3_1.bias"] += 1
    save_file(other, tmp_path / "other.safetensors")
    (mine,) = open_features(["inception-sfid"], tmp_path / "other.safetensors")
    assert mine.distance == f"FD-Inception-sfid (weights {mine.weights[:8]})"
    assert features._inception_distance("2048", "", inception.INCEPTION_FILE.sha256) == "FID"
    assert (
        features._inception_distance("2048", "pytorch", inception.INCEPTION_FILE.sha256)
        == "FID (pytorch resize)"
    )
    with pytest.raises(ValueError, match="ends at Mixed_7a and has no inception-2048"):
        open_features(["inception-2048"], path)


def test_hashes_tell_networks_and_inputs_apart(shared, small_batches):
    a, b = open_features(["inception-768", "inception-768:clean"], shared(WEIGHTS))
    assert a.hash != b.hash
    assert a.hash == open_features(["inception-768"], shared(WEIGHTS))[0].hash
    changed = Net()
    changed.conv.bias.data[0] += 1
    assert net().hash == net().hash != from_module(changed, name="own", dims=6, size=16).hash
    x = pictures(3)
    assert not a(x).equal(b(x))


def test_names_are_checked():
    for name in ("FID", "my fid", "inception-2048", "", "a b"):
        with pytest.raises(ValueError, match="name"):
            from_module(Net(), name=name, dims=6)
    with pytest.raises(ValueError, match="did you mean inception-2048"):
        open_features(["inception-2049"])
    with pytest.raises(ValueError, match="did you mean digits"):
        open_features(["digit"])
    with pytest.raises(ValueError, match="none twice"):
        open_features(["digits", "digits"])
    assert "inception-2048" in feature_set_names()
    assert "dinov2" in feature_set_names()
    with pytest.raises(ValueError, match="read images of"):
        compute_features([net(), open_features(["digits"])[0]], [pictures(2)])


def test_user_modules_are_checked():
    with pytest.raises(ValueError, match=r"returned \(32, 6\); expected \(32, 5\)"):
        from_module(Net(), name="own", dims=5, size=16)(pictures(1))
    with pytest.raises(ValueError, match="together"):
        from_module(Net(), name="own", dims=6, prepare=lambda x: x.float())
    own = from_module(
        Net(), name="own", dims=6, prepare=lambda x: x.float() / 255, input="as is, v / 255"
    )
    assert own.card()["input"] == "as is, v / 255"
    broken = Net()
    broken.conv.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        from_module(broken, name="own", dims=6, size=16)(pictures(1))


# --- digits, DINOv2 -------------------------------------------------------------------------------------------------


def test_digits_are_read_and_their_distance_sees_classes():
    pytest.importorskip("sklearn")
    from mezzotint.data.image_dataset import open_images

    reader = train_digit_classifier()
    assert reader.accuracy > 0.95
    held = open_images("digits:test", size=8, channels=1)
    images, labels = held.batch(range(len(held)))
    assert (
        reader.read(images) == labels
    ).double().mean() > 0.93  # another size than the network's own
    (digits,) = open_features(["digits"])
    assert digits.distance == "FD-digits"
    train = open_images("digits:train", size=16, channels=1)
    known_images, known_labels = train.batch(range(600))
    f, g = digits(known_images), digits(held.batch(range(len(held)))[0])
    reference = Gaussian.of(Moments.of(f))
    close = Gaussian.of(Moments.of(g)).distance(reference)
    one_class = Gaussian.of(
        Moments.of(digits(train.batch(range(1200))[0])[train.batch(range(1200))[1] < 5])
    )
    assert close < one_class.distance(reference) / 3
    noise = Gaussian.of(Moments.of(digits(pictures(300, 16, 1))))
    assert close < noise.distance(reference) / 10
    assert len(known_labels) == 600


def test_digits_take_no_weights(tmp_path):
    with pytest.raises(ValueError, match="reads no weights"):
        open_features(["digits"], tmp_path / "w.pth")


def test_a_vision_transformer_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    tiny = from_hub(str(tmp_path), name="tiny", size=28)
    assert (tiny.dims, tiny.distance) == (32, "FD-tiny")
    x = pictures(2, 28)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        z = (x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        want = model(pixel_values=z).pooler_output
    torch.testing.assert_close(tiny(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="32 dimensions"):
        open_features(["dinov2"], tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        from_hub(str(tmp_path / "absent"), name="tiny")


# --- weight files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A small "published" file, a cache of its own, and a network that serves what the test puts on it."""
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    content = bytes(range(256)) * 5000
    import hashlib

    file = files.PublishedFile(
        name="w.pth",
        url="https://example.org/w.pth",
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        licence="MIT",
    )
    served = {"content": content, "requests": 0}

    def urlopen(url, timeout):
        served["requests"] += 1
        assert url == file.url
        if served["content"] is None:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(served["content"])

    monkeypatch.setattr(files.urllib.request, "urlopen", urlopen)
    return file, served, tmp_path / "cache" / "w.pth"


def test_weights_are_fetched_once_and_checked(published):
    file, served, target = published
    assert files.locate_file(file) == target
    assert files.locate_file(file) == target
    assert served["requests"] == 1
    assert [p.name for p in target.parent.iterdir()] == ["w.pth"]


def test_a_truncated_download_is_refused_and_leaves_nothing(published):
    file, served, target = published
    served["content"] = served["content"][:-1]
    with pytest.raises(ValueError, match=f"expected SHA-256 {file.sha256}.*found") as error:
        files.locate_file(file)
    assert files.hashlib.sha256(served["content"]).hexdigest() in str(error.value)
    assert not list(target.parent.iterdir())


def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(published):
    file, served, target = published
    served["content"] = None
    with pytest.raises(
        ValueError, match=r"no route to host.*fetch https://example\.org/w\.pth"
    ) as error:
        files.locate_file(file)
    assert str(target) in str(error.value)


def test_a_truncated_file_under_the_published_name_is_refused(published, tmp_path):
    path = tmp_path / inception.INCEPTION_FILE.name
    path.write_bytes(b"PK\3\4 cut short")
    with pytest.raises(ValueError, match=inception.INCEPTION_FILE.sha256):
        open_features(["inception-2048"], path)
    with pytest.raises(ValueError, match="cannot be read"):
        open_features(["inception-2048"], tmp_path / "absent.pth")


def test_torch_hub_s_copy_is_found(published, tmp_path):
    file, served, _ = published
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "w.pth").write_bytes(served["content"])
    assert files.locate_file(file) == folder / "w.pth"
    assert not served["requests"]
