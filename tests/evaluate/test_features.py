"""Feature sets: independence of batches, names of distances, checks of weights and downloads."""

from __future__ import annotations

import hashlib
import io
import re
import urllib.error

import pytest
import torch

from mezzotint.core import files
from mezzotint.evaluate import features, inception
from mezzotint.evaluate.digit_classifier import train_digit_classifier
from mezzotint.evaluate.features import (
    NETWORK_BATCH,
    compute_features,
    from_hub,
    from_module,
    open_features,
)
from mezzotint.evaluate.metrics import Gaussian, Moments
from mezzotint.evaluate.resize import as_uint8

WEIGHTS = "data/inception/inception_2015_to_mixed7a.safetensors"


def random_images(n, size=16, channels=3):
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


class Net(torch.nn.Module):
    """A convolution and a batch norm, which in training mode would mix the images of a batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.conv(x)).square().mean((2, 3))


def feature_set():
    return from_module(Net(), name="own", dims=6, size=16)


@pytest.fixture
def small_batches(monkeypatch):
    """Four images per Inception batch, so that tests of few images are not padded to 32."""
    monkeypatch.setattr(features, "NETWORK_BATCH", 4)


# --- computing features ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 64, 75])
def test_features_are_bitwise_the_same_for_any_batch_size(batch):
    x = random_images(75)
    want = feature_set()(x)
    assert want.shape == (75, 6)
    assert want.dtype == torch.float32
    assert compute_features([feature_set()], x.split(batch))["own"].equal(want)
    assert feature_set()(x.flip(0)).flip(0).equal(want)
    assert feature_set()(x[3:5]).equal(want[3:5])


def test_the_network_always_gets_full_batches():
    sizes = []
    s = feature_set()
    s.network.module.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    s(random_images(NETWORK_BATCH * 2 + 1))
    assert sizes == [NETWORK_BATCH] * 3


def test_inception_distances_are_bitwise_the_same_for_any_batch_size(shared, small_batches):
    sets = open_features(["inception-768", "inception-64"], shared(WEIGHTS))
    x = random_images(9)
    at_once = compute_features(sets, [x])
    one_by_one = compute_features(sets, x.split(1))
    for name in ("inception-768", "inception-64"):
        assert at_once[name].equal(one_by_one[name])
    reference = Gaussian.of(Moments.of(torch.randn(100, 64, dtype=torch.float64)))
    with pytest.warns(UserWarning, match="9 images in 64 dimensions"):
        a, b = (
            Gaussian.of(Moments.of(features["inception-64"])).distance(reference)
            for features in (at_once, one_by_one)
        )
    assert a == b


def test_a_shared_network_runs_once(shared, small_batches):
    sets = open_features(["inception-192", "inception-64"], shared(WEIGHTS))
    runs = []
    sets[0].network.Conv2d_1a_3x3.register_forward_hook(lambda *_: runs.append(1))
    computed = compute_features(sets, [random_images(2)])
    assert {k: tuple(v.shape) for k, v in computed.items()} == {
        "inception-192": (2, 192),
        "inception-64": (2, 64),
    }
    assert len(runs) == 1


def test_no_images_give_no_features():
    assert compute_features([feature_set()], [])["own"].shape == (0, 6)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "1 channels"),
        (torch.full((2, 3, 8, 8), torch.nan), "NaN"),
        (torch.full((2, 3, 8, 8), -0.5), r"\[-0.5, -0.5\]"),
        (torch.full((2, 3, 8, 8), 255.0), r"\[255, 255\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"\(3, 8, 8\)"),
    ],
)
def test_bad_images_are_refused(images, named):
    with pytest.raises(ValueError, match=named):
        feature_set()(images)


def test_mixed_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(3, 16, 16\)"):
        compute_features([feature_set()], [random_images(2), random_images(2, 8)])


def test_floats_in_the_unit_interval_are_rounded():
    values = torch.tensor([0.0, 0.5 / 255 + 1e-4, 0.49 / 255, 1.0])
    images = values.reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    assert as_uint8(images, 3)[:, 0, 0, 0].tolist() == [0, 1, 0, 255]


def test_the_caller_s_matmul_precision_is_restored():
    torch.set_float32_matmul_precision("high")
    try:
        feature_set()(random_images(2))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- names and hashes -----------------------------------------------------------------------------


def test_only_the_published_inception_is_called_fid(shared, tmp_path):
    from safetensors.torch import load_file, save_file

    path = shared(WEIGHTS)
    names = ["inception-768", "inception-1280", "inception-sfid", "inception-sfid:clean"]
    assert [s.distance_name for s in open_features(names, path)] == [
        "FD-Inception-768",
        "FD-Inception-1280",
        "sFID",
        "sFID (clean resize)",
    ]
    other = load_file(path)
    other["Mixed_7a.branch3x3_1.bias"] += 1
    save_file(other, tmp_path / "other.safetensors")
    (changed,) = open_features(["inception-sfid"], tmp_path / "other.safetensors")
    assert changed.distance_name == f"FD-Inception-sfid (weights {changed.weights[:8]})"
    published = inception.INCEPTION_FILE.sha256
    assert features._inception_distance_name("2048", "", published) == "FID"
    with_rule = features._inception_distance_name("2048", "pytorch", published)
    assert with_rule == "FID (pytorch resize)"
    with pytest.raises(ValueError, match="inception-2048"):
        open_features(["inception-2048"], path)


def test_hashes_depend_on_weights_and_resize(shared, small_batches):
    a, b = open_features(["inception-768", "inception-768:clean"], shared(WEIGHTS))
    assert a.hash != b.hash
    assert a.hash == open_features(["inception-768"], shared(WEIGHTS))[0].hash
    changed = Net()
    changed.conv.bias.data[0] += 1
    assert (
        feature_set().hash
        == feature_set().hash
        != from_module(changed, name="own", dims=6, size=16).hash
    )
    x = random_images(3)
    assert not a(x).equal(b(x))


@pytest.mark.parametrize("name", ["FID", "my fid", "inception-2048", "", "a b"])
def test_misleading_names_are_refused(name):
    with pytest.raises(ValueError, match=f"name '{name}'"):
        from_module(Net(), name=name, dims=6)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["inception-2049"], "inception-2048"),
        (["digit"], "digits"),
        (["digits", "digits"], "digits"),
        ([], "inception-2048.*dinov2"),
    ],
)
def test_unknown_sets_are_refused_with_the_known_ones(names, named):
    with pytest.raises(ValueError, match=named):
        open_features(names)


def test_grey_and_colour_sets_cannot_be_mixed():
    (digits,) = open_features(["digits"])
    with pytest.raises(ValueError, match=r"\[1, 3\] channels"):
        compute_features([feature_set(), digits], [random_images(2)])


def test_user_modules_are_checked():
    with pytest.raises(ValueError, match=r"\(32, 6\).*\(32, 5\)"):
        from_module(Net(), name="own", dims=5, size=16)(random_images(1))
    with pytest.raises(ValueError, match="`input`"):
        from_module(Net(), name="own", dims=6, prepare=lambda x: x.float())
    own = from_module(
        Net(), name="own", dims=6, prepare=lambda x: x.float() / 255, input="as is, v / 255"
    )
    assert own.metadata()["input"] == "as is, v / 255"
    broken = Net()
    broken.conv.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        from_module(broken, name="own", dims=6, size=16)(random_images(1))


# --- digits and DINOv2 ----------------------------------------------------------------------------


def load_digits(split, size):
    from mezzotint.data.image_dataset import open_images

    dataset = open_images(f"digits:{split}", size=size, channels=1)
    return dataset.batch(range(len(dataset)))


def test_the_digit_classifier_reads_digits_of_other_sizes():
    pytest.importorskip("sklearn")
    classifier = train_digit_classifier()
    assert classifier.accuracy > 0.95
    images, labels = load_digits("test", size=8)
    assert (classifier.predict(images) == labels).double().mean() > 0.93


def test_the_digits_distance_grows_with_missing_classes_and_noise():
    pytest.importorskip("sklearn")
    (digits,) = open_features(["digits"])
    assert digits.distance_name == "FD-digits"

    def gaussian(images):
        return Gaussian.of(Moments.of(digits(images)))

    train, labels = load_digits("train", size=16)
    reference = gaussian(train[:600])
    real = gaussian(load_digits("test", size=8)[0]).distance(reference)
    half_the_classes = gaussian(train[:1200][labels[:1200] < 5]).distance(reference)
    noise = gaussian(random_images(300, 16, 1)).distance(reference)
    assert real < half_the_classes / 3
    assert real < noise / 10


def test_digits_take_no_weights(tmp_path):
    with pytest.raises(ValueError, match="'digits'"):
        open_features(["digits"], tmp_path / "w.pth")


def test_features_of_a_vision_transformer_are_its_class_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    tiny = from_hub(str(tmp_path), name="tiny", size=28)
    assert (tiny.dims, tiny.distance_name) == (32, "FD-tiny")
    x = random_images(2, 28)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        z = (x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        want = model(pixel_values=z).pooler_output
    torch.testing.assert_close(tiny(x), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="32 dimensions"):
        open_features(["dinov2"], tmp_path)
    with pytest.raises(ValueError, match="absent"):
        from_hub(str(tmp_path / "absent"), name="tiny")


# --- files of weights -----------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A small published file, what the network serves for it, and its path in an empty cache."""
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    content = bytes(range(256)) * 5000
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


def test_weights_are_downloaded_once(published):
    file, served, target = published
    assert files.locate_file(file) == target
    assert files.locate_file(file) == target
    assert served["requests"] == 1
    assert [p.name for p in target.parent.iterdir()] == ["w.pth"]


@pytest.mark.parametrize("content", [bytes(range(256)) * 4999, b"", b"<html>Not here</html>"])
def test_a_download_of_other_bytes_is_refused_and_removed(published, content):
    file, served, target = published
    served["content"] = content
    with pytest.raises(ValueError, match=rf"{re.escape(file.url)} is not w\.pth") as error:
        files.locate_file(file)
    for text in (file.sha256, hashlib.sha256(content).hexdigest(), str(target)):
        assert text in str(error.value)
    assert "partial" not in str(error.value)  # which is gone
    assert not list(target.parent.iterdir())


class Broken(io.BytesIO):
    """An answer of one byte, and then an error."""

    def __init__(self, error):
        super().__init__(b"x")
        self.error = error

    def read(self, size=-1):
        if block := super().read(size):
            return block
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionAbortedError(103, "Software caused connection abort"),
        TimeoutError(110, "Connection timed out"),
        TimeoutError("The read operation timed out"),
    ],
)
def test_a_connection_that_breaks_is_told_as_that(published, monkeypatch, error):
    file, _, target = published
    monkeypatch.setattr(files.urllib.request, "urlopen", lambda url, timeout: Broken(error))
    message = (
        rf"could not be downloaded \(.*{error.args[-1]}.*\)\. Download {re.escape(file.url)} on a "
        rf"machine with a network and put it at {re.escape(str(target))}"
    )
    with pytest.raises(ValueError, match=message):
        files.locate_file(file)
    assert not list(target.parent.iterdir())


def test_without_a_network_the_error_names_address_and_path(published):
    file, served, target = published
    served["content"] = None
    with pytest.raises(ValueError, match=r"no route to host.*https://example\.org/w\.pth") as error:
        files.locate_file(file)
    assert str(target) in str(error.value)


@pytest.mark.parametrize(("value", "asked"), [("1", 0), ("true", 0), ("0", 1), ("", 1)])
def test_offline_nothing_is_asked_of_the_network(published, monkeypatch, value, asked):
    file, served, target = published
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    if asked:
        assert files.locate_file(file) == target
    else:
        with pytest.raises(
            ValueError, match=r"HF_HUB_OFFLINE.*https://example\.org/w\.pth"
        ) as error:
            files.locate_file(file)
        assert str(target) in str(error.value)
    assert served["requests"] == asked


def test_another_file_of_the_published_name_is_refused(published, tmp_path):
    path = tmp_path / inception.INCEPTION_FILE.name
    path.write_bytes(b"PK\3\4 cut short")
    with pytest.raises(ValueError, match=inception.INCEPTION_FILE.sha256):
        open_features(["inception-2048"], path)
    with pytest.raises(ValueError, match=r"absent\.pth"):
        open_features(["inception-2048"], tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("home", "found"), [("{}/torch", "torch"), ("", ".cache/torch"), (None, ".cache/torch")]
)
def test_torch_hub_s_copy_is_found(published, tmp_path, monkeypatch, home, found):
    file, served, _ = published
    monkeypatch.setenv("HOME", str(tmp_path))
    if home is None:
        monkeypatch.delenv("TORCH_HOME")
    else:
        monkeypatch.setenv("TORCH_HOME", home.format(tmp_path))
    folder = tmp_path / found / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "w.pth").write_bytes(served["content"])
    assert files.locate_file(file) == folder / "w.pth"
    assert not served["requests"]
